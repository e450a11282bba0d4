"""What users do with adapters on transformers models: train, checkpoint, resume, generate, merge, save, load."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn
from toys import Mlp, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import peft
from peft import (
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.core.model.walk import layers_of
from peft.tuners.tuners_utils import BaseTunerLayer


IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])  # padding on the left
TARGETS = ["q_proj", "v_proj"]


def lora(**kwargs: Any) -> LoraConfig:
    """A small LoRA on the attention of a tiny llama."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **kwargs})


def disturb(model: nn.Module, adapter: str = "default", seed: int = 1) -> nn.Module:
    """Move every tensor of an adapter away from its start, so that it has an effect."""
    generator = torch.Generator().manual_seed(seed)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    moved = {k: v + 0.2 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}
    set_peft_model_state_dict(model, moved, adapter)
    return model


def adapted(config: Any = None, base: nn.Module | None = None) -> PeftModel:
    """A tiny llama with a disturbed adapter."""
    torch.manual_seed(0)
    return disturb(get_peft_model(base if base is not None else tiny_llama(), config or lora()))


def logits(model: nn.Module, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    """Outputs in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        result = model(input_ids=ids, **kwargs).logits
    model.train(training)
    return result


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def grads(model: nn.Module, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Gradients of the language modelling loss in training mode."""
    model.train()
    model.zero_grad()
    if "inputs_embeds" not in kwargs:
        kwargs["input_ids"] = IDS
    model(labels=IDS, use_cache=False, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], **tolerance: float) -> None:
    """Both have the same names and values."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# --- Trainer --------------------------------------------------------------------------------------------------


class Tokens(torch.utils.data.Dataset):
    """Sixteen fixed sequences."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 30, (16, 6), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def arguments(folder: Any, **kwargs: Any) -> TrainingArguments:
    """Four quiet steps."""
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **kwargs})


def losses(trainer: Trainer) -> dict[int, float]:
    """Training loss by step."""
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def fresh(**kwargs: Any) -> PeftModel:
    """The same undisturbed adapter on the same base, each time."""
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), lora(**kwargs))


class TestTrainer:
    def test_training_changes_the_adapter_only_and_lowers_the_loss(self, tmp_path):
        model = fresh()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        trainer = Trainer(model, arguments(tmp_path, max_steps=12), train_dataset=Tokens())
        trainer.train()
        for name, tensor in model.state_dict().items():
            assert torch.equal(before[name], tensor) == ("lora_" not in name), name
        found = losses(trainer)
        assert found[12] < found[1]

    def test_the_trainer_saves_an_adapter(self, tmp_path):
        model = fresh()
        trainer = Trainer(model, arguments(tmp_path), train_dataset=Tokens())
        trainer.train()
        trainer.save_model(str(tmp_path / "out"))
        names = set(os.listdir(tmp_path / "out"))
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
        assert not {"model.safetensors", "config.json"} & names
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, tmp_path, dropout):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
        whole = Trainer(fresh(lora_dropout=dropout), arguments(tmp_path, **options), train_dataset=Tokens())
        whole.train()
        second = Trainer(fresh(lora_dropout=dropout), arguments(tmp_path, **options), train_dataset=Tokens())
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert losses(second) == losses(whole)
        equal(get_peft_model_state_dict(second.model), get_peft_model_state_dict(whole.model), rtol=0, atol=0)

    def test_a_run_with_two_adapters_resumes(self, tmp_path):
        def two() -> PeftModel:
            model = fresh()
            model.add_adapter("other", lora(r=2, lora_dropout=0.2))
            model.set_adapter("other")
            return model

        options = {"save_strategy": "steps", "save_steps": 2}
        whole = Trainer(two(), arguments(tmp_path, **options), train_dataset=Tokens())
        whole.train()
        second = Trainer(two(), arguments(tmp_path, **options), train_dataset=Tokens())
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert losses(second) == losses(whole)
        for name in ("default", "other"):
            left = get_peft_model_state_dict(second.model, adapter_name=name)
            equal(left, get_peft_model_state_dict(whole.model, adapter_name=name), rtol=0, atol=0)

    def test_load_best_model_at_end(self, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        model = fresh()
        trainer = Trainer(
            model, arguments(tmp_path, max_steps=6, **options, **best), train_dataset=Tokens(), eval_dataset=Tokens()
        )
        trainer.train()
        # "best" is the highest loss here, so it is the first checkpoint and not the state at the end of training
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        stored = peft.load_peft_weights(trainer.state.best_model_checkpoint)
        equal(get_peft_model_state_dict(model), stored, rtol=0, atol=0)
        last = peft.load_peft_weights(tmp_path / "checkpoint-6")
        assert any(not torch.equal(last[k], stored[k]) for k in stored)


# --- task classes ---------------------------------------------------------------------------------------------


def bert(cls: type) -> nn.Module:
    """A tiny BERT with one of its heads."""
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=2 if cls is BertForQuestionAnswering else 3,
    )
    return cls(config)


def bart() -> nn.Module:
    """A tiny BART."""
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16, max_position_embeddings=16, **sizes))


def t5() -> nn.Module:
    """A tiny T5."""
    config = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config)


TASKS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, torch.Tensor], str | None]] = {
    "CAUSAL_LM": (tiny_llama, "PeftModelForCausalLM", {"labels": IDS}, None),
    "SEQ_2_SEQ_LM": (t5, "PeftModelForSeq2SeqLM", {"labels": IDS}, None),
    "SEQ_CLS": (
        lambda: bert(BertForSequenceClassification),
        "PeftModelForSequenceClassification",
        {"labels": torch.tensor([0, 2, 1])},
        "classifier",
    ),
    "TOKEN_CLS": (
        lambda: bert(BertForTokenClassification),
        "PeftModelForTokenClassification",
        {"labels": IDS % 3},
        "classifier",
    ),
    "QUESTION_ANS": (
        lambda: bert(BertForQuestionAnswering),
        "PeftModelForQuestionAnswering",
        {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([3, 2, 4])},
        "qa_outputs",
    ),
    "FEATURE_EXTRACTION": (lambda: bert(BertModel), "PeftModelForFeatureExtraction", {}, None),
}


@pytest.mark.parametrize("task", TASKS)
class TestTasks:
    def build(self, task: str) -> tuple[nn.Module, PeftModel, dict[str, torch.Tensor]]:
        make, _, inputs, _ = TASKS[task]
        torch.manual_seed(0)
        base = make()
        plain = copy.deepcopy(base)
        return plain, get_peft_model(base, LoraConfig(task_type=task, r=4)), {"input_ids": IDS, **inputs}

    def step(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        optimizer = torch.optim.Adam(trained(model).values(), lr=0.05)
        for _ in range(2):
            out = model(**inputs)
            loss = out.loss if "loss" in out else out.last_hidden_state[..., 0].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def test_it_trains_saves_and_loads(self, task, tmp_path):
        plain, model, inputs = self.build(task)
        head = TASKS[task][3]
        assert type(model).__name__ == TASKS[task][1]
        before = {k: v.detach().clone() for k, v in trained(model).items()}
        assert before and all("lora_" in k or (head and f"{head}.modules_to_save.default" in k) for k in before)
        assert any("modules_to_save" in k for k in before) == (head is not None)
        self.step(model.train(), inputs)
        for name, p in trained(model).items():
            assert not torch.equal(p, before[name]), name
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
        assert type(again) is type(model)
        model.eval()
        with torch.no_grad():
            expected, found, start = model(**inputs), again(**inputs), plain.eval()(**inputs)
        for left, right, base in zip(expected.to_tuple(), found.to_tuple(), start.to_tuple()):
            if isinstance(left, torch.Tensor):
                assert torch.equal(left, right)
                assert not torch.equal(left, base)

    def test_inputs_can_be_given_by_position(self, task):
        _, model, inputs = self.build(task)
        model.eval()
        kwargs = {k: v for k, v in inputs.items() if k != "input_ids"}
        with torch.no_grad():
            by_name = model(**inputs).to_tuple()[0]
            by_position = model(inputs["input_ids"], torch.ones_like(IDS), **kwargs).to_tuple()[0]
        torch.testing.assert_close(by_position, by_name)

    def test_disabled_and_unloaded_it_is_the_base(self, task):
        plain, model, inputs = self.build(task)
        self.step(model.train(), inputs)
        model.eval()
        with torch.no_grad():
            expected = plain.eval()(**inputs).to_tuple()[0]
            with model.disable_adapter():
                torch.testing.assert_close(model(**inputs).to_tuple()[0], expected)
            torch.testing.assert_close(model.unload()(**inputs).to_tuple()[0], expected)

    def test_merged_it_is_the_same(self, task):
        _, model, inputs = self.build(task)
        self.step(model.train(), inputs)
        model.eval()
        with torch.no_grad():
            expected = model(**inputs).to_tuple()[0]
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).to_tuple()[0], expected, rtol=1e-4, atol=1e-5)
        assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())


# --- gradient checkpointing -----------------------------------------------------------------------------------


CHECKPOINTED = {
    "lora": lambda: lora(),
    "lora on the embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "tokens beside lora": lambda: lora(trainable_token_indices=[3, 9]),
    "head trained whole": lambda: lora(modules_to_save=["lm_head"]),
    "dora": lambda: lora(use_dora=True),
    "tokens": lambda: TrainableTokensConfig(token_indices=[3, 9], task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "oft": lambda: OFTConfig(target_modules=["q_proj"], oft_block_size=4, task_type="CAUSAL_LM"),
    "vera": lambda: VeraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"),
    "hira": lambda: HiraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"),
    "ln": lambda: LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
}
PLACES = ["before get_peft_model", "on the PeftModel", "on the base object", "without the help of transformers"]


def checkpointed(config: Any, reentrant: bool, place: str) -> PeftModel:
    """The adapted model with checkpointing turned on somewhere."""
    torch.manual_seed(0)
    base = tiny_llama()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if place == PLACES[0]:
        base.gradient_checkpointing_enable(**options)
    model = disturb(get_peft_model(base, config))
    if place == PLACES[1]:
        model.gradient_checkpointing_enable(**options)
    elif place != PLACES[0]:
        base.gradient_checkpointing_enable(**options)
    if place == PLACES[3]:
        base.disable_input_require_grads()  # transformers has a hook of its own for some models
    assert base.is_gradient_checkpointing
    return model


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
class TestGradientCheckpointing:
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("name", CHECKPOINTED)
    def test_every_tensor_trains_as_without_checkpointing(self, name, place, reentrant):
        expected = grads(adapted(CHECKPOINTED[name]()))
        model = checkpointed(CHECKPOINTED[name](), reentrant, place)
        found = grads(model)
        assert found.keys() == trained(model).keys() and found
        assert all(g.abs().sum() > 0 for g in found.values())
        equal(found, expected)

    @pytest.mark.parametrize("place", PLACES)
    def test_every_tensor_trains_from_inputs_embeds(self, place, reentrant):
        def run(model: PeftModel) -> dict[str, torch.Tensor]:
            embeds = model.get_input_embeddings()(IDS).detach()
            result = grads(model, inputs_embeds=embeds)
            assert not embeds.requires_grad  # the caller's tensor is left alone
            return result

        expected = run(adapted())
        model = checkpointed(lora(), reentrant, place)
        found = run(model)
        assert found.keys() == trained(model).keys()
        equal(found, expected)

    def test_it_can_be_turned_off_again(self, reentrant):
        model = checkpointed(lora(), reentrant, PLACES[3])
        grads(model)
        model.gradient_checkpointing_disable()
        seen = []
        handle = (
            model.get_base_model()
            .model.layers[0]
            .register_forward_pre_hook(
                lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].requires_grad),
                with_kwargs=True,
            )
        )
        equal(grads(model), grads(adapted()))
        handle.remove()
        assert seen == [False]  # a frozen embedding gives no gradient when nobody needs it

    @pytest.mark.parametrize("name", ["lora", "lora on the embedding", "tokens beside lora"])
    def test_by_training_arguments(self, name, reentrant, tmp_path):
        found = []
        for options in (
            {},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
        ):
            model = adapted(CHECKPOINTED[name]())
            before = {k: v.detach().clone() for k, v in trained(model).items()}
            trainer = Trainer(model, arguments(tmp_path, max_steps=2, **options), train_dataset=Tokens())
            trainer.train()
            if "embedding" not in name and "tokens" not in name:
                for key, p in trained(model).items():
                    assert not torch.equal(p, before[key]), key
            found.append((losses(trainer), get_peft_model_state_dict(model)))
        assert found[0][0] == pytest.approx(found[1][0])
        equal(found[1][1], found[0][1], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("place", PLACES)
    def test_a_mixed_batch(self, place, reentrant):
        names = ["default", "__base__", "other"]

        def prepare(model: PeftModel) -> PeftModel:
            model.add_adapter("other", lora(r=2, target_modules=["k_proj", "v_proj"]))
            disturb(model, "other", seed=5)
            model.set_requires_grad(["default", "other"], True)
            return model

        expected = grads(prepare(adapted()), adapter_names=names)
        assert any(".other." in name for name in expected) and any(".default." in name for name in expected)
        model = prepare(checkpointed(lora(), reentrant, place))
        equal(grads(model, adapter_names=names), expected)
        # the names of a call do not outlive it: the next one uses the active adapter for all rows
        plain = grads(model)
        assert not any(".other." in name and g.abs().sum() > 0 for name, g in plain.items())

    def test_a_reference_call_between_forward_and_backward(self, reentrant):
        """As in preference tuning: the recomputation still knows which row had which adapter."""
        names = ["default", "__base__", "default"]
        expected = grads(adapted(), adapter_names=names)
        model = checkpointed(lora(), reentrant, PLACES[1])
        model.train()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False, adapter_names=names).loss
        with torch.no_grad():
            with model.disable_adapter():
                model(input_ids=IDS[:1])
            model(input_ids=IDS[:2])
            model(input_ids=IDS[:2], adapter_names=["__base__", "default"])
        loss.backward()
        equal({name: p.grad for name, p in trained(model).items()}, expected)

    def test_the_other_task_classes(self, reentrant):
        for task in ("SEQ_2_SEQ_LM", "SEQ_CLS"):
            make, _, inputs, _ = TASKS[task]
            results = []
            for on in (False, True):
                torch.manual_seed(0)
                base = make()
                for module in base.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = 0.0
                model = disturb(get_peft_model(base, LoraConfig(task_type=task, r=4)))
                if on:
                    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.train()
                model(input_ids=IDS, **inputs).loss.backward()
                results.append({k: p.grad for k, p in trained(model).items()})
            assert all(g is not None for g in results[1].values())
            equal(results[1], results[0])


# --- generation -----------------------------------------------------------------------------------------------


HOW = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.2},
    "beams": {"do_sample": False, "num_beams": 3},
}


class TestGenerate:
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}

    def two(self) -> PeftModel:
        model = adapted(lora(r=8, lora_alpha=128)).eval()
        model.add_adapter("other", lora(r=2, lora_alpha=64, target_modules=["k_proj", "v_proj", "up_proj"]))
        return disturb(model, "other", seed=5).eval()

    def run(self, model: nn.Module, how: str, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
        torch.manual_seed(7)
        return model.generate(input_ids=ids, **self.options, **HOW[how], **kwargs)

    @pytest.mark.parametrize("how", HOW)
    def test_merged_equals_unmerged_and_differs_from_the_base(self, how):
        model = self.two()
        with model.disable_adapter():
            base = self.run(model, how)
        expected = self.run(model, how)
        assert expected.shape == (3, 12)
        assert not torch.equal(expected, base)
        assert torch.equal(self.run(model, how), expected)
        assert torch.equal(self.run(model.merge_and_unload(), how), expected)

    @pytest.mark.parametrize("how", ["greedy", "beams"])  # random numbers are drawn for the batch as a whole
    def test_left_padding(self, how):
        model = self.two()
        batch = self.run(model, how, attention_mask=MASK)
        for row, (ids, mask) in enumerate(zip(IDS, MASK)):
            alone = self.run(model, how, ids[mask.bool()][None])
            assert torch.equal(batch[row, -6:], alone[0, -6:])

    @pytest.mark.parametrize("how", ["greedy", "beams"])  # random numbers are drawn for the batch as a whole
    def test_each_row_with_its_own_adapter(self, how):
        model = self.two()
        names = ["other", "__base__", "default"]
        mixed = self.run(model, how, attention_mask=MASK, adapter_names=names)
        alone = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = self.run(model, how, attention_mask=MASK)
        with model.disable_adapter():
            alone["__base__"] = self.run(model, how, attention_mask=MASK)
        for row, name in enumerate(names):
            assert torch.equal(mixed[row], alone[name][row]), name
        assert len({tuple(alone[name][0].tolist()) for name in alone}) > 1
        # afterwards the active adapter answers again
        assert torch.equal(self.run(model, how, attention_mask=MASK), alone["other"])


# --- many processes, compilation, precision --------------------------------------------------------------------


def _mlp() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"], bias="lora_only")
    return disturb(get_peft_model(Mlp(), config))


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)


COMPILED = {
    "lora": LoraConfig(r=2, target_modules=["lin0", "lin1"]),
    "dora": LoraConfig(r=2, target_modules=["lin0", "lin1"], use_dora=True),
    "ia3": IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"]),
    "oft": OFTConfig(target_modules=["lin0", "lin1"], oft_block_size=2),
    "vera": VeraConfig(target_modules=["lin0", "lin1"], r=2),
    "hira": HiraConfig(target_modules=["lin0", "lin1"], r=2),
    "ln": LNTuningConfig(target_modules=["norm"]),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_graph_breaks(name):
    torch._dynamo.reset()
    model = adapted(copy.deepcopy(COMPILED[name]), Mlp())
    x = _batch()[0]
    expected = model(x)
    expected.sum().backward()
    gradients = {k: p.grad.clone() for k, p in trained(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    equal({k: p.grad for k, p in trained(model).items()}, gradients)
    plain = get_peft_model_state_dict(model)
    equal(get_peft_model_state_dict(compiled, unwrap_compiled=True), plain, rtol=0, atol=0)


def test_a_compiled_language_model():
    torch._dynamo.reset()
    model = adapted(lora(target_modules="all-linear")).eval()
    expected = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft", "vera", "hira", "ln", "lora on the embedding"])
def test_autocast(name):
    model = adapted(CHECKPOINTED[name]())
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):  # torch 2.8 keeps what it cast without gradients while a context lasts
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    for key, p in trained(model).items():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all(), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_the_adapter(dtype, autocast, tmp_path):
    base = tiny_llama().to(dtype)
    model = get_peft_model(base, lora(), autocast_adapter_dtype=autocast)
    wanted = torch.float32 if autocast else dtype
    assert {p.dtype for p in trained(model).values()} == {wanted}
    model.add_adapter("other", lora(), autocast_adapter_dtype=autocast)
    assert {p.dtype for name, p in model.named_parameters() if ".other." in name} == {wanted}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {dtype}
    disturb(model)
    assert logits(model).dtype == dtype
    model.save_pretrained(tmp_path)
    for flag in (True, False):
        again = PeftModel.from_pretrained(copy.deepcopy(base_of(model)), tmp_path, autocast_adapter_dtype=flag)
        found = {p.dtype for name, p in again.named_parameters() if "lora_" in name}
        assert found == {torch.float32 if flag else dtype}
        torch.testing.assert_close(logits(again), logits(model), rtol=2e-2, atol=2e-2)


def base_of(model: PeftModel) -> nn.Module:
    """The plain base of a copy of the model."""
    return copy.deepcopy(model).unload()


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_low_cpu_mem_usage(name, tmp_path):
    model = adapted(CHECKPOINTED[name]())
    model.save_pretrained(tmp_path)
    plain = base_of(model)
    state = torch.get_rng_state()
    lean = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    assert {t.device.type for t in [*lean.parameters(), *lean.buffers()]} == {"cpu"}
    assert torch.equal(logits(lean), logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)))
    torch.testing.assert_close(logits(lean), logits(model))
    lean.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert {t.device.type for t in [*lean.parameters(), *lean.buffers()]} == {"cpu"}
    lean.set_adapter("other")
    torch.testing.assert_close(logits(lean), logits(model))
    assert trained(lean)
    again = get_peft_model(plain, CHECKPOINTED[name](), low_cpu_mem_usage=True)
    adapter = get_peft_model_state_dict(again, save_embedding_layers=False)
    copies = ("lm_head", "trainable_tokens", "layernorm", "base_model.vera_")  # these are made from the base, or drawn
    drawn = {t.device.type for name, t in adapter.items() if not any(part in name for part in copies)}
    assert drawn <= {"meta"} and (drawn or name in ("tokens", "ln"))
    set_peft_model_state_dict(again, peft.load_peft_weights(tmp_path), low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_deepcopy_is_independent(name):
    model = adapted(CHECKPOINTED[name]())
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    disturb(twin, seed=9)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    with twin.disable_adapter():
        with model.disable_adapter():
            torch.testing.assert_close(logits(twin), logits(model))
        assert torch.equal(logits(model), expected)
    rows = ["default", "__base__", "default"]
    mixed = logits(twin, adapter_names=rows)
    torch.testing.assert_close(mixed[0], logits(twin)[0])
    merged = twin.merge_and_unload()
    assert not torch.equal(logits(merged), expected)
    assert torch.equal(logits(model), expected)


def test_deepcopy_keeps_trained_biases_apart():
    model = adapted(LoraConfig(r=2, target_modules=["lin0"], bias="all"), Mlp())
    twin = copy.deepcopy(model)
    x = _batch()[0]
    expected = model(x)
    disturb(twin, seed=8)
    assert torch.equal(model(x), expected)
    with twin.disable_adapter(), model.disable_adapter():
        assert torch.equal(twin(x), model(x))
    assert not torch.equal(twin(x), expected)


# --- merging --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_merge_for_generation_and_unmerge_between_steps(name):
    """What online trainers do: merge, generate, unmerge, take a step, and again."""
    model = adapted(CHECKPOINTED[name]())
    base = {k: v.clone() for k, v in model.state_dict().items() if "default" not in k}
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.05)
    outputs = []
    for _ in range(5):
        unmerged = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        outputs.append(unmerged)
    after = {k: v for k, v in model.state_dict().items() if "default" not in k}
    equal(after, base, rtol=1e-4, atol=1e-5)
    assert not torch.equal(outputs[0], outputs[-1])


@pytest.mark.parametrize("name", list(CHECKPOINTED))
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_merged_model_is_a_plain_model_on_disk(name, tie, tmp_path):
    model = adapted(CHECKPOINTED[name](), tiny_llama(tie)).eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not any(key in name for name, _ in merged.named_parameters() for key in ("base_layer", "lora", "default"))
    assert not hasattr(merged, "peft_config")
    merged.save_pretrained(tmp_path)
    assert "adapter_config.json" not in os.listdir(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


# --- tied embeddings ------------------------------------------------------------------------------------------


def tied(config: LoraConfig) -> PeftModel:
    """A tiny llama whose head is its embedding, with a disturbed adapter."""
    return adapted(config, tiny_llama(tie=True))


@pytest.mark.filterwarnings("ignore")
class TestTied:
    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    def test_merging_one_end_leaves_the_other(self, target):
        model = tied(lora(target_modules=[target, "q_proj"])).eval()
        with model.disable_adapter():
            base = logits(model)
        expected = logits(model)
        assert not torch.allclose(base, expected)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        plain = model.unload()
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        torch.testing.assert_close(logits(plain), base)

    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    def test_ensure_weight_tying_adapts_both_ends(self, target, tmp_path):
        config = lora(target_modules=[target, "q_proj"], ensure_weight_tying=True)
        model = tied(config).eval()
        plain = base_of(model)
        layer = model.get_base_model().model.embed_tokens
        delta = layer.get_delta_weight("default")
        torch.testing.assert_close(model.get_base_model().lm_head.get_delta_weight("default"), delta)
        assert not any("lm_head" in name for name in trained(model))
        expected = logits(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(plain, tmp_path)
        torch.testing.assert_close(logits(again), expected)
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert merged.config.tie_word_embeddings
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("architecture", ["t5", "bart"])
    def test_ensure_weight_tying_reaches_every_embedding(self, architecture, tmp_path):
        def base():
            torch.manual_seed(0)
            return (t5() if architecture == "t5" else bart()).eval()

        config = lora(target_modules=["shared"], ensure_weight_tying=True, init_lora_weights=False, task_type=None)
        model = get_peft_model(base(), config).eval()
        holders = [layer for _, layer in layers_of(model.get_base_model())]
        assert len(holders) == 4 and sum(len(list(layer.adapter_parameters("default"))) for layer in holders) == 2
        for layer in holders:
            torch.testing.assert_close(
                layer.get_delta_weight("default"), holders[0].get_delta_weight("default"), check_stride=False
            )
        expected = logits(model, decoder_input_ids=IDS)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base(), tmp_path)
        torch.testing.assert_close(logits(again, decoder_input_ids=IDS), expected)
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.get_encoder().embed_tokens.weight
        torch.testing.assert_close(logits(merged, decoder_input_ids=IDS), expected, rtol=1e-4, atol=1e-5)

    def test_ensure_weight_tying_trains_both_ends_as_one(self):
        model = tied(lora(target_modules=["embed_tokens"], ensure_weight_tying=True)).double()
        found = grads(model)
        # the update of W by finite differences of one entry of B, through both ends at once
        name = next(n for n in found if "lora_embedding_B" in n)
        p = dict(model.named_parameters())[name]
        step = 1e-2
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p[0, 0] += sign * step
            found_logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
            values.append(nn.functional.cross_entropy(found_logits, IDS[:, 1:].flatten()).item())  # in float64
            with torch.no_grad():
                p[0, 0] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(found[name][0, 0].item(), rel=2e-2, abs=1e-5)

    def test_ensure_weight_tying_of_modules_to_save(self, tmp_path):
        model = tied(lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True))
        base = model.get_base_model()
        mine = base.model.embed_tokens.modules_to_save["default"].weight
        assert base.lm_head.modules_to_save["default"].weight is mine
        assert mine is not base.model.embed_tokens.original_module.weight
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.5)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        expected = logits(model)
        model.save_pretrained(tmp_path)
        stored = peft.load_peft_weights(tmp_path)
        again = PeftModel.from_pretrained(base_of(model), tmp_path)
        assert torch.equal(logits(again), expected)
        assert any(key.endswith("embed_tokens.weight") for key in stored)
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("method", ["beside lora", "alone"])
    def test_tokens_reach_both_ends(self, method, tmp_path):
        if method == "alone":
            config: Any = TrainableTokensConfig(token_indices=[3, 9], task_type="CAUSAL_LM")
        else:
            config = lora(trainable_token_indices=[3, 9], ensure_weight_tying=True)
        model = tied(config).eval()
        rows = [name for name in trained(model) if "trainable_tokens_delta" in name]
        assert len(rows) == 1 and "embed_tokens" in rows[0]
        delta = dict(model.named_parameters())[rows[0]]
        expected = logits(model)
        reference = base_of(model)
        if method == "alone":
            with torch.no_grad():
                reference.model.embed_tokens.weight[[3, 9]] = delta
            torch.testing.assert_close(logits(reference), expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base_of(model), tmp_path)
        torch.testing.assert_close(logits(again), expected)
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)

    def test_tokens_leave_a_head_that_is_trained_whole(self):
        model = tied(lora(trainable_token_indices=[3], modules_to_save=["lm_head"])).eval()
        assert len([name for name in trained(model) if "trainable_tokens_delta" in name]) == 1
        expected = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)

    def test_both_ends_with_different_tokens(self, tmp_path):
        model = tied(lora(trainable_token_indices={"embed_tokens": [3], "lm_head": [9]})).eval()
        assert len([name for name in trained(model) if "trainable_tokens_delta" in name]) == 2
        expected = logits(model)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(base_of(model), tmp_path / "adapter")
        torch.testing.assert_close(logits(again), expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": ["embed_tokens"]},
            {"modules_to_save": ["embed_tokens"]},
            {"trainable_token_indices": [3]},
        ],
        ids=["target", "modules_to_save", "tokens"],
    )
    def test_ensure_weight_tying_without_ties_changes_nothing_else(self, options):
        plain = adapted(lora(**options))
        asked = adapted(lora(**options, ensure_weight_tying=True))
        assert trained(plain).keys() == trained(asked).keys()
        assert torch.equal(logits(plain), logits(asked))


# --- layer replication ----------------------------------------------------------------------------------------


class TestLayerReplication:
    config = staticmethod(lambda **kwargs: lora(layer_replication=[[0, 2], [1, 2]], **kwargs))

    def test_copies_share_the_base_and_have_their_own_adapters(self):
        model = adapted(self.config())
        layers = model.get_base_model().model.layers
        assert len(layers) == 3 and model.get_base_model().config.num_hidden_layers == 3
        assert layers[2].mlp.up_proj.weight is layers[1].mlp.up_proj.weight
        assert layers[2].self_attn.q_proj.base_layer.weight is layers[1].self_attn.q_proj.base_layer.weight
        assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
        assert len([n for n in trained(model) if "q_proj.lora_A" in n]) == 3
        found = grads(model)
        assert len(found) == 12 and all(g.abs().sum() > 0 for g in found.values())
        plain = tiny_llama()
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + sum(
            p.numel() for p in trained(model).values()
        )

    def test_saved_and_loaded_onto_a_fresh_base(self, tmp_path):
        model = adapted(self.config())
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        assert torch.equal(logits(again), logits(model))

    def test_merged(self, tmp_path):
        model = adapted(self.config()).eval()
        expected = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)

    def test_a_second_adapter_and_unloading(self, tmp_path):
        torch.manual_seed(0)
        base = tiny_llama()
        before = logits(base)
        model = adapted(self.config(), base)
        first = logits(model)
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "again")  # the layers are not replicated once more
        assert len(model.get_base_model().model.layers) == 3
        model.set_adapter("again")
        assert torch.equal(logits(model), first)
        with pytest.raises(ValueError, match="layer_replication"):
            model.add_adapter("else", lora(layer_replication=[[0, 1], [0, 2]]))
        assert torch.equal(logits(model), first)
        plain = model.unload()
        assert plain is base and len(plain.model.layers) == 2 and plain.config.num_hidden_layers == 2
        assert torch.equal(logits(plain), before)

    def test_it_generates(self):
        model = adapted(self.config()).eval()
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached = model.generate(input_ids=IDS, **options)
        assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))

    def test_a_range_beyond_the_model_is_refused_and_changes_nothing(self):
        base = tiny_llama()
        before = logits(base)
        with pytest.raises(ValueError, match="layer_replication"):
            get_peft_model(base, lora(layer_replication=[[0, 5]]))
        assert len(base.model.layers) == 2 and torch.equal(logits(base), before)

    def test_a_failing_config_leaves_the_depth_as_it_was(self):
        base = tiny_llama()
        before = logits(base)
        with pytest.raises(ValueError, match="q_prog"):
            get_peft_model(base, self.config(target_modules=["q_prog"]))
        assert len(base.model.layers) == 2 and base.config.num_hidden_layers == 2
        assert torch.equal(logits(base), before)


# --- modules_to_save and biases -------------------------------------------------------------------------------


class TestModulesToSave:
    def two(self) -> PeftModel:
        model = adapted(lora(modules_to_save=["lm_head"]))
        model.add_adapter("other", lora(r=2, modules_to_save=["lm_head"]))
        disturb(model, "other", seed=4)
        model.add_adapter("bare", lora(r=2))
        return disturb(model, "bare", seed=5)

    def test_switching(self):
        model = self.two()
        base = base_of(model)
        results = {}
        for name in ("default", "other", "bare"):
            model.set_adapter(name)
            results[name] = logits(model)
            names = {n for n in trained(model) if "modules_to_save" in n}
            prefix = f"base_model.model.lm_head.modules_to_save.{name}"
            assert names == ({f"{prefix}.weight"} if name != "bare" else set())
        assert not torch.allclose(results["default"], results["other"])
        rows = logits(model, adapter_names=["other", "default", "bare"])
        for i, name in enumerate(["other", "default", "bare"]):
            torch.testing.assert_close(rows[i], results[name][i])
        rows = logits(model, adapter_names=["__base__", "default", "__base__"])
        torch.testing.assert_close(rows[2], logits(base)[2])

    def test_saving_loading_and_deleting(self, tmp_path):
        model = self.two()
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base_of(model), tmp_path)
        again.load_adapter(tmp_path / "other", "other")
        again.load_adapter(tmp_path / "bare", "bare")
        for name in ("default", "other", "bare"):
            model.set_adapter(name)
            again.set_adapter(name)
            assert torch.equal(logits(again), logits(model))
        again.set_adapter("default")
        before = logits(again)
        again.delete_adapter("other")
        assert torch.equal(logits(again), before)
        assert "lm_head.modules_to_save.other.weight" not in dict(again.get_base_model().named_parameters())
        merged = again.merge_and_unload(adapter_names=["default"])
        torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)

    def test_two_whole_copies_cannot_be_active_together(self):
        model = self.two()
        with pytest.raises(ValueError, match="other"):
            model.base_model.set_adapter(["default", "other"])
        assert model.active_adapters == ["default"]
        model.base_model.set_adapter(["default", "bare"])
        assert model.active_adapters == ["default", "bare"]


@pytest.mark.parametrize("mode", ["all", "lora_only"])
class TestBiases:
    def two(self, mode: str) -> tuple[nn.Module, PeftModel]:
        torch.manual_seed(0)
        base = Mlp()
        plain = copy.deepcopy(base)
        model = disturb(get_peft_model(base, LoraConfig(r=2, target_modules=["lin0"], bias=mode)))
        return plain, model

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))

    def test_which_biases_train(self, mode):
        _, model = self.two(mode)
        names = {n.removeprefix("base_model.model.") for n in trained(model) if n.endswith("bias")}
        assert names == {"lin0.base_layer.bias"} | ({"lin1.bias", "norm.bias"} if mode == "all" else set())

    def test_disabled_it_is_the_base(self, mode):
        plain, model = self.two(mode)
        out = model(self.x)
        assert not torch.allclose(out, plain(self.x))
        with model.disable_adapter():
            assert torch.equal(model(self.x), plain(self.x))
        assert torch.equal(model(self.x), out)

    def test_saved_and_loaded(self, mode, tmp_path):
        plain, model = self.two(mode)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
        assert torch.equal(again(self.x), model(self.x))

    def test_unload_restores_and_merge_keeps(self, mode):
        plain, model = self.two(mode)
        expected = model(self.x)
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(self.x), expected)
        bare = model.unload()
        equal(bare.state_dict(), plain.state_dict(), rtol=0, atol=0)

    def test_two_adapters_switched(self, mode, tmp_path):
        plain, model = self.two(mode)
        first = model(self.x)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["lin0", "lin1"], bias=mode))
        assert torch.equal(model(self.x), first)
        model.set_adapter("other")
        torch.testing.assert_close(model(self.x), plain(self.x))  # it starts at the base's own biases
        disturb(model, "other", seed=6)
        second = model(self.x)
        assert not torch.allclose(second, first)
        model.set_adapter("default")
        assert torch.equal(model(self.x), first)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
        again.load_adapter(tmp_path / "other", "other")
        assert torch.equal(again(self.x), first)
        again.set_adapter("other")
        assert torch.equal(again(self.x), second)
        again.delete_adapter("other")
        assert torch.equal(again(self.x), first)
        with again.disable_adapter():
            assert torch.equal(again(self.x), plain(self.x))

    def test_an_optimizer_step_reaches_the_file(self, mode, tmp_path):
        plain, model = self.two(mode)
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        model(self.x).square().sum().backward()
        optimizer.step()
        with model.disable_adapter():  # switching off and on again keeps the trained values
            model(self.x)
        optimizer.zero_grad()
        model(self.x).square().sum().backward()
        optimizer.step()
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(plain, tmp_path)(self.x), model(self.x))

    def test_low_cpu_mem_usage(self, mode, tmp_path):
        plain, model = self.two(mode)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, low_cpu_mem_usage=True)
        assert torch.equal(again(self.x), model(self.x))
        with again.disable_adapter():
            assert torch.equal(again(self.x), plain(self.x))


# --- adapters without a PeftModel -----------------------------------------------------------------------------


class TestInjection:
    x = TestBiases.x

    def test_a_plain_model(self):
        model = Mlp()
        before = model(self.x)
        result = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"]), model)
        assert result is model and torch.equal(model(self.x), before)
        tensors = get_peft_model_state_dict(model)
        assert set(tensors) == {"lin0.lora_A.weight", "lin0.lora_B.weight"}
        assert set(trained(model)) == {"lin0.lora_A.default.weight", "lin0.lora_B.default.weight"}
        values = {k: torch.randn_like(v) for k, v in tensors.items()}
        outcome = set_peft_model_state_dict(model, values)
        assert outcome.unexpected_keys == []
        equal(get_peft_model_state_dict(model), values, rtol=0, atol=0)
        assert not torch.equal(model(self.x), before)

    def test_two_adapters_by_name(self):
        model = Mlp()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"]), model, "one")
        inject_adapter_in_model(LoraConfig(r=3, target_modules=["lin1"]), model, "two", low_cpu_mem_usage=False)
        assert set(get_peft_model_state_dict(model, adapter_name="one")) == {
            "lin0.lora_A.weight",
            "lin0.lora_B.weight",
        }
        assert set(get_peft_model_state_dict(model, adapter_name="two")) == {
            "lin1.lora_A.weight",
            "lin1.lora_B.weight",
        }
        assert set(model.peft_config) == {"one", "two"}

    def test_targets_from_a_state_dict(self):
        donor = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin1"]), Mlp())
        values = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(donor).items()}
        model = Mlp()
        inject_adapter_in_model(LoraConfig(r=2), model, state_dict=values)
        set_peft_model_state_dict(model, values)
        equal(get_peft_model_state_dict(model), values, rtol=0, atol=0)

    def test_low_cpu_mem_usage(self):
        donor = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"]), Mlp())
        values = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(donor).items()}
        model = Mlp()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"]), model, low_cpu_mem_usage=True)
        assert {p.device.type for p in trained(model).values()} == {"meta"}
        set_peft_model_state_dict(model, values, low_cpu_mem_usage=True)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        equal(get_peft_model_state_dict(model), values, rtol=0, atol=0)

    def test_methods_with_shared_tensors(self):
        model = inject_adapter_in_model(VeraConfig(r=2, target_modules=["lin0", "lin1"]), Mlp())
        values = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(model).items()}
        set_peft_model_state_dict(model, values)
        equal(get_peft_model_state_dict(model), values, rtol=0, atol=0)


class TestTransformersIntegration:
    """`model.add_adapter` and its relatives are transformers' own; they call this package."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return tiny_llama()

    def test_add_set_disable_enable_delete(self):
        model = self.model()
        base = logits(model)
        model.add_adapter(lora(), adapter_name="one")
        disturb(model, "one")
        first = logits(model)
        assert not torch.allclose(first, base)
        model.add_adapter(lora(r=2, target_modules=["k_proj"]), adapter_name="two")
        disturb(model, "two", seed=2)
        model.set_adapter("two")
        assert model.active_adapters() == ["two"]
        second = logits(model)
        model.set_adapter("one")
        assert torch.equal(logits(model), first)
        model.disable_adapters()
        assert torch.equal(logits(model), base)
        model.enable_adapters()
        assert torch.equal(logits(model), first)
        model.set_adapter("two")
        model.delete_adapter("one")
        assert torch.equal(logits(model), second)
        assert set(model.peft_config) == {"two"}

    def test_save_and_load(self, tmp_path):
        model = self.model()
        model.add_adapter(lora())
        disturb(model)
        model.save_pretrained(tmp_path)
        assert "adapter_model.safetensors" in os.listdir(tmp_path) and "model.safetensors" not in os.listdir(tmp_path)
        again = self.model()
        again.load_adapter(str(tmp_path))
        assert torch.equal(logits(again), logits(model))
        as_peft = PeftModel.from_pretrained(self.model(), tmp_path)
        assert torch.equal(logits(as_peft), logits(model))

    def test_loading_what_this_package_saved(self, tmp_path):
        model = adapted(lora(modules_to_save=None))
        model.save_pretrained(tmp_path)
        plain = self.model()
        plain.load_adapter(str(tmp_path), adapter_name="mine")
        assert torch.equal(logits(plain), logits(model))

    def test_from_pretrained_of_an_adapter_folder(self, tmp_path):
        base = self.model()
        base.save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = disturb(get_peft_model(base, lora()))
        model.save_pretrained(tmp_path / "adapter")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(logits(again), logits(model))
        auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(logits(auto), logits(model))

    def test_it_trains_with_the_trainer(self, tmp_path):
        model = self.model()
        model.add_adapter(lora())
        before = {k: v.clone() for k, v in model.state_dict().items()}
        Trainer(model, arguments(tmp_path), train_dataset=Tokens()).train()
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed and all("lora_" in k for k in changed)

    @pytest.mark.parametrize("embedded", [False, True])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, reentrant, embedded):
        results = []
        for on in (False, True):
            model = self.model()
            model.add_adapter(lora())
            disturb(model)
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            inputs = {"inputs_embeds": model.get_input_embeddings()(IDS).detach()} if embedded else {}
            results.append(grads(model, **inputs))
        assert len(results[0]) == 8
        equal(results[1], results[0])
