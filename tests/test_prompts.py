"""Prompts and prefixes in use: generation, tasks, training, files, several in one model, caches.

What a prompt is, is checked against the same model fed by hand with the virtual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from peft import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)
from peft.core.model.manager import INTERFACE
from peft.core.prompts import caches


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 39}
PADDED = torch.tensor([[0, 0, 0, 7, 8], [0, 0, 5, 6, 9], [3, 4, 12, 13, 14], [0, 21, 22, 23, 24]])
MASK = (PADDED != 0).long()
DECODERS = {
    "llama": lambda **kw: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **kw)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_head=4, n_layer=2, eos_token_id=39)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=40, hidden_size=16, num_attention_heads=4, num_hidden_layers=2, ffn_dim=24,
                     word_embed_proj_dim=16, pad_token_id=0, eos_token_id=39)
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=6)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
}  # fmt: skip
SEQ2SEQ = {
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=40, d_model=16, d_kv=4, num_heads=4, d_ff=24, num_layers=2, decoder_start_token_id=0)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0,
                      bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)
    ),
}  # fmt: skip
CONFIGS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}


def base(name: str) -> nn.Module:
    """A tiny model with weights large enough to tell tokens apart; the same ones each time."""
    return with_large_weights({**DECODERS, **SEQ2SEQ}[name]).eval()


def with_large_weights(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model


def adapted(name: str, method: str, tokens: int = 3, **kwargs: Any) -> PeftModel:
    torch.manual_seed(1)
    task = "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM"
    return get_peft_model(base(name), CONFIGS[method](task_type=task, num_virtual_tokens=tokens, **kwargs)).eval()


def by_hand(model: PeftModel, method: str, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy decoding of a decoder, one full forward of the plain model for each token: no cache is kept."""
    plain, prompt = model.get_base_model(), model.get_prompt(len(ids))
    count = model.active_peft_config.num_virtual_tokens
    whole = torch.cat([mask.new_ones(len(ids), count), mask], 1)
    for _ in range(steps):
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        if method == "prompt":
            embeds = torch.cat([prompt, plain.get_input_embeddings()(ids)], 1)
            logits = plain(inputs_embeds=embeds, attention_mask=whole, position_ids=positions).logits
        else:
            cache = model.get_prompt(len(ids))
            logits = plain(
                input_ids=ids, attention_mask=whole, position_ids=positions[:, count:],
                **{caches.cache_argument(plain.forward): cache},
            ).logits  # fmt: skip
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        whole = torch.cat([whole, whole.new_ones(len(ids), 1)], 1)
    return ids


GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": -1}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_generate_equals_the_model_fed_by_hand(name: str, method: str) -> None:
    model = adapted(name, method)
    wanted = by_hand(model, method, PADDED, MASK, 8)
    got = model.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY)
    assert got.tolist() == wanted.tolist()
    plain = base(name).generate(input_ids=PADDED, attention_mask=MASK, **GREEDY)
    logits = model(input_ids=PADDED, attention_mask=MASK).logits[:, -1]
    assert (logits - model.get_base_model()(input_ids=PADDED, attention_mask=MASK).logits[:, -1]).abs().max() > 0.1
    with model.disable_adapter():
        assert model.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY).tolist() == plain.tolist()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_generate_of_an_encoder_decoder_equals_the_model_fed_by_hand(name: str, method: str) -> None:
    model = adapted(name, method)
    plain, start = model.get_base_model(), model.config.decoder_start_token_id
    target = torch.full((4, 1), start)
    for _ in range(8):
        if method == "prompt":
            embeds = torch.cat([model.get_prompt(4)[:, :3], plain.get_input_embeddings()(PADDED)], 1)
            mask = torch.cat([MASK.new_ones(4, 3), MASK], 1)
            logits = plain(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=target).logits
        else:
            cache = {caches.cache_argument(plain.forward): model.get_prompt(4)}
            logits = plain(input_ids=PADDED, attention_mask=MASK, decoder_input_ids=target, **cache).logits
        target = torch.cat([target, logits[:, -1:].argmax(-1)], 1)
    got = model.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY)
    assert got.tolist() == target.tolist()
    assert got.tolist() != plain.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY).tolist()


WAYS: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"do_sample": True, "top_k": 5},
    {"num_return_sequences": 2, "do_sample": True},
    {"use_cache": False, "do_sample": False},
]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kwargs", WAYS, ids=str)
@torch.no_grad()
def test_other_ways_to_generate(method: str, kwargs: dict[str, Any]) -> None:
    """Beams, samples and generation without a cache equal plain `generate` fed with the prompt, or give its shape."""
    model = adapted("llama", method)
    plain = model.get_base_model()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, **kwargs}
    torch.manual_seed(3)
    got = model.generate(input_ids=PADDED, attention_mask=MASK, **options)
    if method == "prefix":
        assert got.shape == (4 * options.get("num_return_sequences", 1), 11)
        if options.get("do_sample") is False:
            options["use_cache"] = True
            assert got.tolist() == model.generate(input_ids=PADDED, attention_mask=MASK, **options).tolist()
        return
    embeds = torch.cat([model.get_prompt(4), plain.get_input_embeddings()(PADDED)], 1)
    torch.manual_seed(3)
    wanted = plain.generate(inputs_embeds=embeds, attention_mask=torch.cat([MASK.new_ones(4, 3), MASK], 1), **options)
    assert got[:, 5:].tolist() == wanted.tolist()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
@torch.no_grad()
def test_static_caches(name: str, method: str) -> None:
    model = adapted(name, method)
    inputs = {"input_ids": PADDED, "attention_mask": MASK}
    wanted = model.generate(**inputs, **GREEDY)
    got = model.generate(**inputs, cache_implementation="static", disable_compile=True, **GREEDY)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_a_conversation_goes_on_with_its_cache(method: str) -> None:
    model = adapted("llama", method)
    ids = torch.tensor([[3, 4, 12, 13, 14]])
    first = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **GREEDY)
    cache = {n: first[n] for n in caches.ARGUMENTS[:1] if n in first} or {"past_key_values": first.past_key_values}
    ids = torch.cat([first.sequences, torch.tensor([[5, 6]])], 1)
    mask = torch.ones_like(ids)
    wanted = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert model.generate(input_ids=ids, attention_mask=mask, **cache, **GREEDY).tolist() == wanted.tolist()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5", "bart"])
@torch.no_grad()
def test_embeddings_and_positions_may_be_given(name: str, method: str) -> None:
    """Embeddings in the place of ids give the same; positions are those in the text, without the virtual tokens."""
    model = adapted(name, method)
    embed = model.get_base_model().get_input_embeddings()
    decoder = {"decoder_input_ids": PADDED.flip(1)} if name in SEQ2SEQ else {}
    if name == "bart":
        decoder = {"decoder_inputs_embeds": embed(PADDED.flip(1))}
    inputs = {"attention_mask": MASK, **decoder}
    wanted = model(input_ids=PADDED, **inputs).logits
    torch.testing.assert_close(model(inputs_embeds=embed(PADDED), **inputs).logits, wanted)
    generated = model.generate(inputs_embeds=embed(PADDED), attention_mask=MASK, **GREEDY)
    ids = model.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY)
    assert generated.tolist() == (ids if name in SEQ2SEQ else ids[:, 5:]).tolist()
    if name not in SEQ2SEQ:
        positions = torch.arange(5).expand(4, -1)
        torch.testing.assert_close(model(input_ids=PADDED, position_ids=positions, **inputs).logits, wanted)
        moved = model(input_ids=PADDED, position_ids=positions * 2, **inputs).logits
        assert (moved - wanted).abs().max() > 1e-3


# --- tasks ----------------------------------------------------------------------------------------------------

BERT, LLAMA = {**SIZES, "num_labels": 3}, {**GROUPED, "num_labels": 3}
EACH_TOKEN = {"labels": (PADDED % 3).tolist()}
TASKS = {
    "bert-SEQ_CLS": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)), {"labels": [0, 1, 2, 0]}),
    "bert-TOKEN_CLS": (lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT)), EACH_TOKEN),
    "bert-QUESTION_ANS": (
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SIZES)),
        {"start_positions": [3, 2, 0, 1], "end_positions": [4, 4, 1, 3]},
    ),
    "bert-FEATURE_EXTRACTION": (lambda: hf.BertModel(hf.BertConfig(**SIZES)), {}),
    "llama-SEQ_CLS": (lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA)), {"labels": [0, 1, 2, 0]}),
    "llama-TOKEN_CLS": (lambda: hf.LlamaForTokenClassification(hf.LlamaConfig(**LLAMA)), EACH_TOKEN),
    "llama-QUESTION_ANS": (
        lambda: hf.LlamaForQuestionAnswering(hf.LlamaConfig(**GROUPED)),
        {"start_positions": [3, 4, 3, 3], "end_positions": [4, 4, 3, 4]},
    ),
    "llama-FEATURE_EXTRACTION": (lambda: hf.LlamaModel(hf.LlamaConfig(**GROUPED)), {}),
    "llama-CAUSAL_LM": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), {"labels": PADDED.tolist()}),
    "t5-SEQ_2_SEQ_LM": (SEQ2SEQ["t5"], {"labels": PADDED.tolist()}),
    "bart-SEQ_2_SEQ_LM": (SEQ2SEQ["bart"], {"labels": PADDED.tolist()}),
}  # fmt: skip
METHODS = {
    "prompt": PromptTuningConfig,
    "prefix": PrefixTuningConfig,
    "projection": lambda **kw: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=12, **kw),
    "ptuning": lambda **kw: PromptEncoderConfig(encoder_hidden_size=12, **kw),
    "lstm": lambda **kw: PromptEncoderConfig(encoder_hidden_size=12, encoder_reparameterization_type="LSTM", **kw),
    "multitask": lambda **kw: MultitaskPromptTuningConfig(num_tasks=2, num_ranks=2, **kw),
}


def task_base(case: str) -> nn.Module:
    return without_dropout(with_large_weights(TASKS[case][0]))


def for_task(case: str, method: str, **kwargs: Any) -> PeftModel:
    config = METHODS[method](task_type=case.split("-")[1], num_virtual_tokens=3, **kwargs)
    base = task_base(case)
    torch.manual_seed(1)
    return get_peft_model(base, config)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        for module in model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def batch_of(case: str, method: str) -> dict[str, torch.Tensor]:
    ids, mask = (PADDED.flip(1), MASK.flip(1)) if "bert" in case or "2" in case else (PADDED, MASK)
    batch = {"input_ids": ids, "attention_mask": mask}
    batch.update({name: torch.tensor(value) for name, value in TASKS[case][1].items()})
    return {**batch, "task_ids": torch.tensor([0, 1, 1, 0])} if method == "multitask" else batch


@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix"])
def test_positions_of_answers_are_those_of_the_logits(method: str) -> None:
    """A script takes the answer from the largest logit, as it is, and so the loss does."""
    case = "bert-QUESTION_ANS"
    batch, model = batch_of(case, method), for_task(case, method).eval()
    output = model(**batch)
    starts, ends = (
        F.cross_entropy(logits, batch[name])
        for logits, name in ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
    )
    torch.testing.assert_close(output.loss, (starts + ends) / 2)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**batch)
    if "loss" in output:
        return output.loss
    return (output.last_hidden_state * torch.linspace(-1, 1, output.last_hidden_state.shape[-1])).sin().mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", TASKS)
def test_a_task_trains_saves_and_trains_on(case: str, method: str, tmp_path: Any) -> None:
    batch, model = batch_of(case, method), for_task(case, method).train()
    losses = []
    for _ in range(2):
        loss_of(model, batch).backward()
        losses.append(loss_of(model, batch).item())
        with torch.no_grad():
            for name, p in trained(model).items():
                assert p.grad is not None or name.endswith(("lstm_head", "pooler")), name
                p -= (0.01 if "QUESTION" in case else 0.05) * p.grad
                p.grad = None
    assert loss_of(model, batch).item() < losses[0]
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        wanted = loss_of(model.eval(), batch)
        frozen = PeftModel.from_pretrained(task_base(case), str(tmp_path))
        torch.testing.assert_close(loss_of(frozen, batch), wanted)
        assert trained(frozen) == {}
    again = PeftModel.from_pretrained(task_base(case), str(tmp_path), is_trainable=True)
    assert trained(again).keys() == trained(model).keys()
    loss_of(again, batch).backward()
    loss_of(model.train(), batch).backward()
    for name, p in trained(again).items():
        torch.testing.assert_close(p.grad, trained(model)[name].grad, msg=name)


CHECKPOINTED = [*((method, False) for method in METHODS), ("prompt", True), ("prefix", True)]


@pytest.mark.parametrize(("method", "reentrant"), CHECKPOINTED)
@pytest.mark.parametrize("case", TASKS)
def test_gradient_checkpointing_gives_the_same_gradients(case: str, method: str, reentrant: bool) -> None:
    batch = batch_of(case, method)
    plain, model = for_task(case, method).train(), for_task(case, method).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with torch.no_grad():
        loss_of(model.eval(), batch)
    model.train()
    first = loss_of(model, batch)
    with torch.no_grad(), model.disable_adapter():
        loss_of(model, batch)  # between forward and backward
    first.backward()
    loss_of(plain, batch).backward()
    for name, p in trained(plain).items():
        torch.testing.assert_close(trained(model)[name].grad, p.grad, msg=name)


@torch.no_grad()
def test_a_head_that_looks_for_padding_finds_it_behind_a_prompt() -> None:
    """Text padded on the right is classified at its own last token, as each sample alone is."""
    model = for_task("llama-SEQ_CLS", "prompt").eval()
    ids, mask = PADDED.flip(1), MASK.flip(1)
    whole = model(input_ids=ids, attention_mask=mask).logits
    for row, n in enumerate(mask.sum(1)):
        torch.testing.assert_close(model(input_ids=ids[row : row + 1, :n]).logits[0], whole[row])


# --- several prompts ------------------------------------------------------------------------------------------


def with_three(case: str, method: str) -> PeftModel:
    """A model with prompts of 3, 2 and 5 tokens."""
    model = for_task(case, method)
    for name, tokens in (("two", 2), ("five", 5)):
        model.add_adapter(name, METHODS[method](task_type=case.split("-")[1], num_virtual_tokens=tokens))
    return model.eval()


ROWS = ["five", "__base__", "default", "two"]


@pytest.mark.parametrize("method", ["prompt", "prefix", "lstm", "multitask"])
@pytest.mark.parametrize("case", [case for case in TASKS if not case.startswith("bart")])
def test_a_row_of_a_mixed_batch_equals_its_prompt_alone(case: str, method: str) -> None:
    model, batch = with_three(case, method), batch_of(case, method)
    batch = {name: value for name, value in batch.items() if "label" not in name and "positions" not in name}
    if "2" in case:
        batch["decoder_input_ids"] = PADDED
    main = "start_logits" if "QUESTION" in case else "last_hidden_state" if "FEATURE" in case else "logits"
    mixed = model(**batch, adapter_names=ROWS)[main]
    for row, name in enumerate(ROWS):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        if name == "__base__":
            one.pop("task_ids", None)
            with model.disable_adapter():
                alone = model(**one)[main][0]
        else:
            model.set_adapter(name)
            alone = model(**one)[main][0]
        got = mixed[row]
        if got.shape != alone.shape:
            got = got[: len(alone)] if case.startswith("bert") else got[-len(alone) :]
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix", "lstm", "multitask"])
@pytest.mark.parametrize("case", ["bert-SEQ_CLS", "llama-CAUSAL_LM", "t5-SEQ_2_SEQ_LM"])
def test_a_mixed_batch_trains_each_prompt_on_its_rows(case: str, method: str) -> None:
    batch = batch_of(case, method)
    labels = batch.pop("labels")
    if "2" in case:
        batch["decoder_input_ids"] = PADDED
    own = {name: torch.tensor([float(name == row) for row in ROWS]) for name in set(ROWS)}

    def gradients(model: PeftModel, rows: torch.Tensor, **kwargs: Any) -> dict[str, list[torch.Tensor]]:
        model.set_requires_grad(list(model.peft_config), True)
        logits = model(**batch, **kwargs).logits
        last = logits[:, -labels.shape[1] :] if labels.dim() > 1 else logits
        (last.tanh().flatten(1).mean(1) * rows).sum().backward()
        return {name: [p.grad for p in model.prompt_encoder[name].parameters()] for name in model.peft_config}

    mixed = gradients(with_three(case, method), torch.ones(4), adapter_names=ROWS)
    for name in ("default", "two", "five"):
        model = with_three(case, method)
        model.set_adapter(name)
        alone = gradients(model, own[name])[name]
        assert any(grad is not None and grad.any() for grad in alone)
        for found, wanted in zip(mixed[name], alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5"])
@torch.no_grad()
def test_generation_with_a_prompt_for_each_row(name: str, method: str) -> None:
    model = adapted(name, method)
    for other, tokens in (("two", 2), ("five", 5)):
        task = model.peft_config["default"].task_type
        model.add_adapter(other, CONFIGS[method](task_type=task, num_virtual_tokens=tokens))
    inputs = {"input_ids": PADDED, "attention_mask": MASK}
    mixed = model.generate(**inputs, adapter_names=ROWS, **GREEDY)
    for row, adapter in enumerate(ROWS):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        if adapter == "__base__":
            with model.disable_adapter():
                alone = model.generate(**one, **GREEDY)
        else:
            model.set_adapter(adapter)
            alone = model.generate(**one, **GREEDY)
        assert mixed[row].tolist() == alone[0].tolist(), adapter
    beams = model.generate(**inputs, adapter_names=ROWS, num_beams=2, **GREEDY)
    assert beams.shape == mixed.shape


def test_switching_and_deleting() -> None:
    model = with_three("llama-CAUSAL_LM", "prompt")
    ids = {"input_ids": PADDED}
    shapes = {}
    for name in ("two", "five", "default"):
        model.set_adapter(name)
        shapes[name] = model(**ids).logits.shape[1]
        assert list(trained(model)) == [f"prompt_encoder.{name}.embedding.weight"]
        assert model.active_adapter == name and model.active_peft_config.num_virtual_tokens == shapes[name] - 5
    assert shapes == {"two": 7, "five": 10, "default": 8}
    with pytest.raises(ValueError, match="only one prompt can be active"):
        model.set_adapter(["two", "five"])
    model.delete_adapter("default")
    assert model.active_adapter == "two" and "default" not in model.prompt_encoder
    assert model(**ids).logits.shape[1] == 7
    with pytest.raises(ValueError, match="'nine' not found"):
        model.set_adapter("nine")


def test_unload_gives_the_base_back() -> None:
    case = "bert-SEQ_CLS"
    base = task_base(case)
    wanted = {name: value.clone() for name, value in base.state_dict().items()}
    model = for_task(case, "prefix")
    found = model.unload().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


# --- context-aware prompts and cartridges ---------------------------------------------------------------------

CONTEXT = {"cpt_token_ids": [3, 4, 5, 6, 7, 8, 9, 10, 11], "cpt_tokens_type_mask": [1, 2, 3, 4, 4, 6, 7, 8, 8]}


def context_model(**kwargs: Any) -> PeftModel:
    return get_peft_model(base("llama"), CPTConfig(task_type="CAUSAL_LM", **CONTEXT, **kwargs))


def test_a_context_starts_as_its_tokens() -> None:
    model = context_model().eval()
    ids = torch.tensor([[12, 13, 14]])
    whole = torch.cat([torch.tensor([CONTEXT["cpt_token_ids"]]), ids], 1)
    torch.testing.assert_close(model(input_ids=ids).logits, model.get_base_model()(input_ids=whole).logits)
    assert list(trained(model)) == ["prompt_encoder.default.delta_embedding.weight"]


def test_moves_of_a_context_are_bounded_and_labels_stay() -> None:
    model = context_model(opt_projection_epsilon=0.1, opt_projection_format_epsilon=0.3)
    encoder = model.prompt_encoder["default"]
    nn.init.ones_(encoder.delta_embedding.weight)
    scale = (16 / 2048) ** 0.5
    wanted = torch.tensor([0.3, 0.1, 0.3, 0, 0, 0.1, 0.3, 0, 0]) * scale
    torch.testing.assert_close(encoder.get_projection().norm(dim=1), wanted, atol=1e-8, rtol=1e-5)
    model(input_ids=PADDED, labels=PADDED).loss.backward()
    moved = encoder.delta_embedding.weight.grad.norm(dim=1) > 0
    assert moved.tolist() == (wanted > 1e-6).tolist()
    nn.init.constant_(encoder.delta_embedding.weight, 1e-6)
    torch.testing.assert_close(encoder.get_projection()[0], torch.full((16,), 1e-6))


def test_labels_of_a_context_count_less_the_earlier_they_are() -> None:
    model = context_model(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    ids, types = torch.tensor([[12, 13, 14, 15]]), torch.tensor([[1, 3, 4, 4]])
    output = model(input_ids=ids, labels=ids, input_type_mask=types)
    each = nn.functional.cross_entropy(
        output.logits[0, :-1], torch.tensor([*CONTEXT["cpt_token_ids"], *ids[0]])[1:], reduction="none"
    )
    picked = each[[2, 3, 6, 7, 10, 11]]  # before the labels 6 7, 10 11 of the context and 14 15 of the text
    wanted = (picked * torch.tensor([0.25, 0.25, 0.5, 0.5, 1, 1])).mean()
    torch.testing.assert_close(output.loss, wanted)
    plain = context_model()(input_ids=ids, labels=ids, input_type_mask=types)
    torch.testing.assert_close(plain.loss, picked.mean())


@torch.no_grad()
def test_hidden_tokens_of_a_context_are_not_seen() -> None:
    model = context_model(cpt_mask=[0, *[1] * 8]).eval()
    before = model(input_ids=PADDED).logits[:, -1]
    model.prompt_encoder["default"].embedding.weight[0] += 5
    torch.testing.assert_close(model(input_ids=PADDED).logits[:, -1], before)
    model.prompt_encoder["default"].embedding.weight[1] += 5
    assert (model(input_ids=PADDED).logits[:, -1] - before).abs().max() > 0.1


def test_a_context_is_saved_and_trained_on(tmp_path: Any) -> None:
    model = context_model(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    nn.init.normal_(model.prompt_encoder["default"].delta_embedding.weight)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base("llama"), str(tmp_path), is_trainable=True)
    for one in (model, again):
        one(input_ids=PADDED, labels=PADDED).loss.backward()
    ((name, p),) = trained(again).items()
    torch.testing.assert_close(p, trained(model)[name])
    torch.testing.assert_close(p.grad, trained(model)[name].grad)
    assert again.generate(input_ids=PADDED, attention_mask=MASK, input_type_mask=MASK, **GREEDY).shape == (4, 13)


@pytest.mark.parametrize(
    "kwargs",
    [{"cpt_mask": [1]}, {"task_type": "SEQ_CLS"}, {"opt_weighted_loss_type": "more"}],
)
def test_bad_contexts_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        CPTConfig(**{"task_type": "CAUSAL_LM", **CONTEXT, **kwargs})


def cartridge(**kwargs: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base("qwen3"), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **kwargs)).eval()


@torch.no_grad()
def test_a_cartridge_made_from_a_text_acts_as_that_text() -> None:
    model, text = cartridge(), torch.tensor([[3, 4, 12]])
    name = caches.cache_argument(model.get_base_model().forward)
    cache = hf.DynamicCache()
    model.get_base_model()(input_ids=text, **{name: cache})
    values = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert values.shape == (3, 2 * 2 * 2 * 8)
    ids = torch.tensor([[13, 14, 15]])
    wanted = model.get_base_model()(input_ids=torch.cat([text, ids], 1)).logits[:, 3:]
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)

    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    other = cartridge()
    got = initialize_kv_prefix_from_text(other, Tokenizer(), text="3 4 12 20 21", use_chat_template=False)
    torch.testing.assert_close(got, values)
    with pytest.raises(ValueError, match="at least 3 cached tokens, got 2"):
        initialize_kv_prefix_from_text(other, Tokenizer(), text="3 4", use_chat_template=False)
    with pytest.raises(ValueError, match="PromptTuningConfig adapter"):
        initialize_kv_prefix_from_past_key_values(adapted("llama", "prompt"), past_key_values=cache)


def test_the_first_tokens_of_a_cartridge_stay() -> None:
    model = cartridge(num_frozen_tokens=2).train()
    assert {name: list(p.shape) for name, p in trained(model).items()} == {
        "prompt_encoder.default.trainable_embedding": [1, 64]
    }
    model(input_ids=PADDED, labels=PADDED).loss.backward()
    assert model.prompt_encoder["default"].frozen_embedding.grad is None


@torch.no_grad()
def test_cartridges_are_saved_and_composed(tmp_path: Any) -> None:
    first, second = cartridge(), cartridge(num_frozen_tokens=0)
    nn.init.normal_(second.prompt_encoder["default"].trainable_embedding)
    for name, model in (("first", first), ("second", second)):
        model.save_pretrained(str(tmp_path / name))
        again = PeftModel.from_pretrained(base("qwen3"), str(tmp_path / name))
        torch.testing.assert_close(again(input_ids=PADDED).logits, model(input_ids=PADDED).logits)
    compose_cartridge_adapters([tmp_path / "first", tmp_path / "second"], output_path=tmp_path / "both")
    both = PeftModel.from_pretrained(base("qwen3"), str(tmp_path / "both"))
    saved = [model.get_prompt_embedding_to_save("default") for model in (first, second, both)]
    assert torch.equal(torch.cat(saved[:2]), saved[2])
    assert both.peft_config["default"].num_virtual_tokens == 6
    assert both.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY).shape == (4, 13)


# --- errors, starts and clients -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
def test_a_prompt_of_another_base_is_refused_with_both_sizes(method: str, tmp_path: Any) -> None:
    adapted("llama", method).save_pretrained(str(tmp_path))
    other = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "hidden_size": 32}))
    sizes = "token_dim=16, but LlamaForCausalLM has 32" if method == "prompt" else "token_dim=8, .* has 16"
    before = other.state_dict().keys()
    with pytest.raises(ValueError, match=sizes):
        PeftModel.from_pretrained(other, str(tmp_path))
    assert other.state_dict().keys() == before and not hasattr(other, "peft_config")
    if method == "prefix":
        deeper = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 3}))
        with pytest.raises(ValueError, match="num_layers=2, but LlamaForCausalLM has 3"):
            PeftModel.from_pretrained(deeper, str(tmp_path))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="needs num_virtual_tokens"):
        get_peft_model(base("llama"), PromptTuningConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="input embedding"):
        get_peft_model(nn.Linear(3, 3), PromptTuningConfig(num_virtual_tokens=3))
    model = adapted("llama", "prompt")
    with pytest.raises(ValueError, match=r"tensor \[batch, length\]"):
        model(input_ids=PADDED, attention_mask=torch.ones(4, 1, 5, 5))
    with pytest.raises(ValueError, match="nothing to merge"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="task_ids"):
        for_task("llama-CAUSAL_LM", "multitask")(input_ids=PADDED)
    with pytest.raises(ValueError, match="TEXT' needs prompt_tuning_init_text"):
        PromptTuningConfig(prompt_tuning_init="TEXT", num_virtual_tokens=3)


@torch.no_grad()
def test_starts_from_the_vocabulary_and_from_zero() -> None:
    model = adapted("llama", "prompt", prompt_tuning_init="SAMPLE_VOCAB")
    table = model.get_base_model().get_input_embeddings().weight
    rows = model.prompt_encoder["default"].embedding.weight
    assert all(any(torch.equal(row, token) for token in table) for row in rows)
    zero = adapted("llama", "prefix", init_weights="zero")
    assert not zero.prompt_encoder["default"].embedding.weight.any()


def test_starts_from_other_tasks(tmp_path: Any) -> None:
    source = for_task("llama-CAUSAL_LM", "multitask")
    source.save_pretrained(str(tmp_path))
    old = source.prompt_encoder["default"]
    path = str(tmp_path / "adapter_model.safetensors")
    for start in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"):
        config = MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=3, num_ranks=2, prompt_tuning_init=start,
            prompt_tuning_init_state_dict_path=path, prompt_tuning_init_task=1,
        )  # fmt: skip
        new = get_peft_model(base("llama"), config).prompt_encoder["default"]
        assert torch.equal(new.embedding.weight, old.embedding.weight)
        wanted = {"AVERAGE_SOURCE_TASKS": old.prefix_task_cols.mean(0), "EXACT_SOURCE_TASK": old.prefix_task_cols[1]}
        assert all(torch.equal(cols, wanted[start]) for cols in new.prefix_task_cols) if start in wanted else True


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_trainer_trains_a_prompt(method: str, tmp_path: Any) -> None:
    model = adapted("llama", method)
    data = [{"input_ids": row, "labels": row} for row in PADDED]
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.1, report_to=[], use_cpu=True, save_strategy="no",
        gradient_checkpointing=True,
    )  # fmt: skip
    before = model.get_prompt_embedding_to_save("default").clone()
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert not torch.equal(model.get_prompt_embedding_to_save("default"), before)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_tutorials_prefix_config_works() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10, encoder_hidden_size=512)
    model = get_peft_model(base("llama"), config)
    assert model.get_nb_trainable_parameters()[0] == 10 * 2 * 2 * 8
    assert model._is_prompt_learning and model.prompt_tokens["default"].tolist() == list(range(10))
    assert model.word_embeddings is model.base_model.get_input_embeddings()
    assert model.transformer_backbone_name == "model"


@pytest.mark.parametrize("method", CONFIGS)
def test_a_bfloat16_base(method: str) -> None:
    model = get_peft_model(base("llama").bfloat16(), CONFIGS[method](task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    model(input_ids=PADDED, attention_mask=MASK, labels=PADDED).loss.backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values())
    assert model.eval().generate(input_ids=PADDED, attention_mask=MASK, **GREEDY).shape == (4, 13)


# --- architectures, caches and sizes --------------------------------------------------------------------------

THREE = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
OLD = {"vocab_size": 40, "n_embd": 16, "n_head": 4, "n_layer": 2}
GEMMA4 = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"], "vocab_size_per_layer_input": 40,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
CACHES: dict[str, Callable[[], nn.Module]] = {
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**THREE, intermediate_size=24)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**THREE)),
    "falcon-40b": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**THREE, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**OLD, rotary_dim=4)),
    "codegen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(**OLD, rotary_dim=4)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=40, hidden_size=16, n_head=4, n_layer=2)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=40, d_model=16, n_heads=4, n_layers=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**OLD)),
    "gpt_bigcode": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**OLD, attn_pdrop=0.0)),
    "opt": DECODERS["opt"],
    "gemma3": DECODERS["gemma3"],
    "gemma4": lambda: hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**GEMMA4)),
    "gemma4-heads": lambda: hf.Gemma4ForCausalLM(
        hf.Gemma4TextConfig(**GEMMA4, num_global_key_value_heads=1, attention_k_eq_v=True)
    ),
    **SEQ2SEQ,
}


@pytest.mark.parametrize("method", ["prefix", "projection", "cartridge"])
@pytest.mark.parametrize("name", CACHES)
def test_checkpointed_layers_keep_the_prefix_whatever_they_call_it(name: str, method: str) -> None:
    base = without_dropout(with_large_weights(CACHES[name]))
    make = {**METHODS, "cartridge": CartridgeConfig}[method]
    config = make(task_type="SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(1)
    model = get_peft_model(base, config).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(input_ids=PADDED, attention_mask=MASK, labels=PADDED).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in trained(model).values())]

    wanted = gradients()
    assert any(grad.any() for grad in wanted[1:])
    for reentrant in (False, True):
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for found, grad in zip(gradients(), wanted, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-5)
        assert all("forward" not in vars(module) for module in base.modules())
        base.gradient_checkpointing_disable()


@torch.no_grad()
@pytest.mark.parametrize("method", ["prefix", "cartridge"])
@pytest.mark.parametrize("name", ["falcon", "falcon-40b", "gpt_bigcode", "gemma4", "gemma4-heads"])
def test_heads_may_differ_in_size_and_number(name: str, method: str, tmp_path: Any) -> None:
    """Each layer gets keys of its own shape; the table's layout is that of the widest, head by head."""
    make = {"prefix": PrefixTuningConfig, "cartridge": CartridgeConfig}[method]
    torch.manual_seed(1)
    model = get_peft_model(with_large_weights(CACHES[name]), make(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    seen = hf.DynamicCache()
    plain = model.get_base_model()
    plain(input_ids=PADDED, **{caches.name_of(plain): seen})
    given = model.get_prompt(2)
    for layer, own in zip(given.layers, seen.layers, strict=True):
        assert [layer.keys.shape[i] for i in (1, 3)] == [own.keys.shape[i] for i in (1, 3)]
    got = model.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY)
    assert got.tolist() == by_hand(model, "prefix", PADDED, MASK, 8).tolist()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(with_large_weights(CACHES[name]).eval(), str(tmp_path))
    torch.testing.assert_close(again(input_ids=PADDED).logits, model(input_ids=PADDED).logits)
    if name == "gemma4":
        table = model.get_prompt_embedding_to_save("default").view(3, 6, 2, 16)
        torch.testing.assert_close(given.layers[0].values[0], table[:, 1, :, :8].transpose(0, 1))
        torch.testing.assert_close(given.layers[2].keys[0], table[:, 4].transpose(0, 1))


# --- what the wrapper is not ----------------------------------------------------------------------------------

EVERY: dict[str, Callable[..., Any]] = {
    **METHODS, "cartridge": CartridgeConfig, "cpt": lambda num_virtual_tokens, **kw: CPTConfig(**CONTEXT, **kw),
}  # fmt: skip


@pytest.mark.parametrize("method", EVERY)
def test_nothing_of_a_prompts_machinery_hides_what_the_base_model_has(method: str) -> None:
    model = get_peft_model(base("llama"), EVERY[method](task_type="CAUSAL_LM", num_virtual_tokens=2))
    manager = model._tuner
    names = {n for part in (manager, manager.prompts, manager.calls, manager.generation) for n in dir(part)}
    names = {name for name in names if not name.startswith("_")} - set(dir(type(model))) - set(vars(model))
    names -= {*INTERFACE, *model._modules, *dir(model.get_base_model())}
    assert {"prefix", "feed", "longest", "extended", "calls", "prompts"} - {"prefix"} <= names
    for name in (*names, "prefix", "heads", "inputs", "tuner", "finish", "chunked_loss"):
        assert not hasattr(model, name), name
        vars(model.get_base_model())[name] = name
        assert getattr(model, name) == name
        del vars(model.get_base_model())[name]


@pytest.mark.parametrize("method", EVERY)
def test_whether_a_prompt_can_be_merged_can_be_asked(method: str) -> None:
    model = get_peft_model(base("llama"), EVERY[method](task_type="CAUSAL_LM", num_virtual_tokens=2))
    for name in ("merge_and_unload", "merge_adapter", "unmerge_adapter", "add_weighted_adapter"):
        assert not hasattr(model, name)
        for kind in (AttributeError, ValueError):
            with pytest.raises(kind, match="nothing to merge|pass adapter_names"):
                getattr(model, name)()
    assert hasattr(model, "unload") and hasattr(model, "disable_adapter_layers")
    assert model.base_model_prepare_inputs_for_generation == model.get_base_model().prepare_inputs_for_generation


def test_nothing_of_a_weight_methods_machinery_hides_what_the_base_model_has() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.proj = nn.Linear(4, 2), nn.Linear(4, 4)
            for name in OURS:
                setattr(self, name, f"its {name}")

    model = get_peft_model(Own(), LoraConfig(target_modules=["proj"]))
    assert model.heads is model.get_base_model().heads
    assert all(getattr(model, name) == f"its {name}" for name in OURS)
    assert model.model is model.get_base_model() and model.prefix == "lora_"


OURS = (
    "inputs", "tuner", "finish", "forget", "targets_of", "adapter_state", "switched_off", "prepare_config", "start",
    "layer_cls", "default_roles", "token_inputs", "position_inputs", "heads_read_ids", "chunked_loss",
    "is_prompt_learning", "MEANINGLESS",
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("tasks", [torch.tensor([1]), torch.tensor(1), [1], 1], ids=repr)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_one_task_stands_for_a_batch(name: str, tasks: Any) -> None:
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    config = MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=2, num_tasks=3, num_ranks=2)
    model = get_peft_model(base(name), config).eval()
    nn.init.normal_(model.prompt_encoder["default"].prefix_task_cols)
    nn.init.normal_(model.prompt_encoder["default"].prefix_task_rows)
    inputs = {"input_ids": PADDED, "attention_mask": MASK}
    labels = {"labels": PADDED} if name == "t5" else {}
    each = torch.full((4,), 1)
    wanted = model(**inputs, **labels, task_ids=each).logits
    torch.testing.assert_close(model(**inputs, **labels, task_ids=tasks).logits, wanted)
    assert (model(**inputs, **labels, task_ids=each + 1).logits - wanted).abs().max() > 1e-3
    for beams in (1, 2):
        got = model.generate(**inputs, task_ids=tasks, num_beams=beams, **GREEDY)
        assert got.tolist() == model.generate(**inputs, task_ids=each, num_beams=beams, **GREEDY).tolist()
    with pytest.raises(ValueError, match="task_ids has 3 entries"):
        model(**inputs, task_ids=[0, 1, 2])


def test_a_context_is_one_token_where_none_is_given() -> None:
    with pytest.warns(UserWarning, match="one token of id 0"):
        config = CPTConfig(task_type="CAUSAL_LM", opt_weighted_loss_type="decay")
    assert (config.cpt_token_ids, config.cpt_mask, config.cpt_tokens_type_mask) == ([0], [1], [1])
    model = get_peft_model(base("llama"), config)
    model(input_ids=PADDED, labels=PADDED).loss.backward()
    assert model.prompt_encoder["default"].delta_embedding.weight.grad.any()


def test_moves_of_labels_get_no_gradient_from_anything() -> None:
    model = context_model()
    encoder = model.prompt_encoder["default"]
    encoder.set_updated_tokens()
    nn.init.ones_(encoder.delta_embedding.weight)
    (model(input_ids=PADDED, labels=PADDED).loss + encoder.delta_embedding.weight.square().sum()).backward()
    moved = encoder.delta_embedding.weight.grad.norm(dim=1) > 0
    assert moved.tolist() == [kind % 4 != 0 for kind in CONTEXT["cpt_tokens_type_mask"]]


@torch.no_grad()
def test_a_prompt_without_a_head_of_its_own_uses_that_of_the_base() -> None:
    """A module that one prompt trains whole is the base model's again when another prompt is active."""
    inputs = {"input_ids": PADDED}
    model = for_task("bert-FEATURE_EXTRACTION", "prompt", modules_to_save=["pooler"]).eval()
    model.add_adapter("two", PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3))
    model.get_base_model().pooler.modules_to_save["default"].dense.bias += 1
    with_own = model(**inputs).pooler_output
    model.set_adapter("two")
    model.prompt_encoder["two"].load_state_dict(model.prompt_encoder["default"].state_dict())
    without = model(**inputs).pooler_output
    assert (with_own - without).abs().max() > 1e-2
    model.set_adapter("default")
    torch.testing.assert_close(model(**inputs).pooler_output, with_own)
