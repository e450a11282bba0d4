"""The loss in chunks equals the model's own, in value and gradient, and keeps no logits of the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import tiny_llama
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, Trainer, TrainingArguments

from peft import LoraConfig, get_peft_model
from peft.kernels import chunked_cross_entropy, loss


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """Several chunks for the smallest model."""
    monkeypatch.setattr(loss, "CHUNK", 300)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": 0.3}, {"num_items_in_batch": 7}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_value_and_gradients(options, bias, dtype, tolerance):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 9, 6), torch.randn(50, 6)] + ([torch.randn(50)] if bias else [])
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    labels = torch.randint(50, (2, 9))
    labels[0, :3] = -100
    h, w, b = (*tensors, None)[:3]
    logits = F.linear(h, w, b) * options.get("scale", 1.0)
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    count = options.get("num_items_in_batch", 15)
    wanted = F.cross_entropy(logits.float().view(-1, 50), labels.view(-1), reduction="sum") / count
    got = chunked_cross_entropy(h, w, labels, b, **options)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(got, wanted, **close)
    pairs = zip(torch.autograd.grad(got * 3, tensors), torch.autograd.grad(wanted * 3, tensors))
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **close)


SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def gemma() -> nn.Module:
    """Logits with a soft cap."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.1, attn_implementation="eager"))


def cohere() -> nn.Module:
    """Logits with a factor."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25))


def adapted(base: nn.Module, **options) -> nn.Module:
    """The model with a LoRA."""
    torch.manual_seed(1)
    config = {"target_modules": ["q_proj", "v_proj"], **options}
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)).train()


def gradients(model: nn.Module, **call) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**call).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "llama": (tiny_llama, {}),
    "soft cap": (gemma, {}),
    "factor": (cohere, {}),
    "adapted head": (tiny_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "trained head": (tiny_llama, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("items", [None, 11])
def test_models(case, items):
    make, options = CASES[case]
    model = adapted(make(), **options)
    ids = torch.randint(3, 30, (2, 12))
    labels = ids.clone()
    labels[0, :4] = -100
    call = {"input_ids": ids, "labels": labels} | ({} if items is None else {"num_items_in_batch": items})
    wanted, theirs = gradients(model, **call)
    got, ours = gradients(model, **call, chunked_loss=True)
    torch.testing.assert_close(got, wanted)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)
    again, _ = gradients(model, **call)  # nothing of it stays
    assert torch.equal(again, wanted)
    assert model(**call).logits.shape[1] == 12 and model(**call, chunked_loss=True).logits.shape[1] == 1


def test_no_logits_of_the_batch_are_kept():
    model, ids = adapted(tiny_llama()), torch.randint(3, 30, (2, 12))
    vocabulary, sizes = model.config.vocab_size, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(input_ids=ids, labels=ids, chunked_loss=True)
        assert 24 * vocabulary not in sizes
        model(input_ids=ids, labels=ids)
        assert 24 * vocabulary in sizes


def test_trainer(tmp_path):
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 30, (8, 10)).tolist()]
    losses = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = adapted(tiny_llama())
        model.chunked_loss = chunked
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            seed=0,
            save_strategy="no",
            learning_rate=0.1,
            optim="sgd",
            eval_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert len(trainer.predict(data).predictions[0]) == 10  # evaluation has all logits
    assert losses[0] == pytest.approx(losses[1], abs=2e-4) and len(losses[0]) == 3


def test_what_is_not_known_is_refused():
    model, ids = adapted(tiny_llama()), torch.randint(3, 30, (2, 6))
    base = model.get_base_model()
    forward = copy.copy(base.loss_function)

    def own(*args, **kwargs):
        return forward(*args, **kwargs)

    base.loss_function = own
    with pytest.raises(ValueError, match="usual loss"):
        model(input_ids=ids, labels=ids, chunked_loss=True)
    assert base.loss_function is own
    other = adapted(gemma())
    inner = other.get_base_model()
    inner.config.final_logit_softcapping = 0.1
    usual = loss._logit_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_logit_options", lambda model: (None, usual(model)[1]))  # a cap that no config tells of
        with pytest.raises(ValueError, match="does not know"):
            other(input_ids=ids, labels=ids, chunked_loss=True)
