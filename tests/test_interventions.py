"""LoReFT, NoReFT, DiReFT: which positions are edited, and how; and blocks whose adapters are skipped.

`data/reft.*` were recorded from adapters 1.3.0 (transformers 4.57.6): the base model, its interventions with R as it
came out of the parametrisation, and the last hidden states of padded batches, at tokens that are no padding.
"""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import ENCODER_DECODERS, build, inputs
from in_blocks import differs, gives, refused, stir
from safetensors.torch import load_file
from torch import nn

from peft import (
    AdaptionPromptConfig,
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    ReftConfig,
    ShadowConfig,
    estimate_memory,
    get_peft_model,
)
from peft.core.model.walk import layers_of
from peft.tuners.reft_utils import orthonormal


pytestmark = pytest.mark.filterwarnings("ignore")
DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "reft.json").read_text(encoding="utf-8"))
SOUND = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
    "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 3, "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "classifier_proj_size": 8, "vocab_size": 20,
}  # fmt: skip
WHISPER = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
    "max_source_positions": 10, "max_target_positions": 20, "pad_token_id": 0, "decoder_start_token_id": 3,
}  # fmt: skip


def base(name: str) -> nn.Module:
    """A tiny model by its name, those of sound included."""
    torch.manual_seed(0)
    if name == "wav2vec2":
        return tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**SOUND)).eval()
    if name == "whisper":
        return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)).eval()
    return build(name)


def batch(name: str) -> dict[str, torch.Tensor]:
    """Three rows, of which the model sees two padded; "mask" is 1 at the tokens of the first stack of blocks."""
    draw = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": inputs("vit", 3)["pixel_values"]}
    if name == "whisper":
        text = torch.randint(4, 40, (3, 5), generator=draw)
        return {"input_features": torch.randn(3, 8, 20, generator=draw), "decoder_input_ids": text}
    if name == "wav2vec2":
        mask = torch.ones(3, 60, dtype=torch.long)
        mask[0, 40:], mask[1, 28:] = 0, 0
        return {"input_values": torch.randn(3, 60, generator=draw) * mask, "attention_mask": mask}
    mask = torch.ones(3, 7, dtype=torch.long)
    for row, gap in ((0, 2), (1, 5)):
        mask[row, slice(gap) if name in ("llama", "gpt2") else slice(7 - gap, 7)] = 0
    given = {"input_ids": torch.randint(3, 40, (3, 7), generator=draw), "attention_mask": mask}
    if name in ENCODER_DECODERS:
        given["decoder_input_ids"] = given["input_ids"].flip(1)[:, :5]
    return given


def adapted(name: str, variant: str = "loreft", seed: int = 0, **fields: Any) -> PeftModel:
    """A model with interventions, stirred: two positions at each end unless said otherwise."""
    fields = {"prefix_positions": 2, "suffix_positions": 2, "r": 3, **fields}
    kind = "CAUSAL_LM" if name in ("llama", "gpt2") else "SEQ_2_SEQ_LM" if name in ENCODER_DECODERS else None
    plain = base(name)
    torch.manual_seed(seed)  # the first call makes the base, and draws for it
    model = get_peft_model(plain, ReftConfig(variant=variant, task_type=kind, **fields)).eval()
    stir(model, seed=seed)
    return model


def logits(model: nn.Module, given: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**given, **more).logits


def spied(model: nn.Module, run: Any) -> list[tuple[Any, torch.Tensor, torch.Tensor]]:
    """(layer, block's own output, edited output) of each block that a call passes, in the order of the calls."""
    calls: list[Any] = []
    handles = []
    first = lambda output: output if isinstance(output, torch.Tensor) else output[0]  # noqa: E731
    for _, layer in layers_of(model):
        inner = lambda module, args, output, layer=layer: calls.append([layer, first(output)])  # noqa: E731
        outer = lambda module, args, output: calls[-1].append(first(output))  # noqa: E731
        handles += [layer.base_layer.register_forward_hook(inner), layer.register_forward_hook(outer)]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return calls


# --- what is computed ---------------------------------------------------------------------------------------------


def by_hand(unit: nn.Module, h: torch.Tensor, variant: str, f: Any) -> torch.Tensor:
    """h' of one hidden state ``[width]``, from the paper's formula."""
    weight, bias, r = unit.learned_source.weight, unit.learned_source.bias, unit.projection.weight
    if variant == "loreft":
        q, upper = torch.linalg.qr(r.T)
        r = (q * upper.diagonal().sign()).T
        gives(r @ r.T, torch.eye(len(r)))
    target, edited = f(weight @ h + bias), h
    for i in range(len(r)):  # each direction on its own
        edited = edited + (target[i] - (r[i] @ h if variant != "direft" else 0)) * r[i]
    return edited


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", ["loreft", "noreft", "direft"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "whisper", "wav2vec2"])
def test_the_first_and_last_positions_are_what_the_formula_says(name, variant, tied):
    """A decoder padded on the left, encoders on the right, two stacks, pictures, sound; no other position moves."""
    f = torch.tanh if tied else lambda x: x
    model = adapted(name, variant, tied_weights=tied, non_linearity="tanh" if tied else None)
    given = batch(name)
    mask = given.get("attention_mask")
    if name == "wav2vec2":
        mask = model.base_model.model._get_feature_vector_attention_mask(6, mask)
        assert mask.sum(1).tolist() == [3, 2, 6]
    calls = spied(model, lambda: model(**given))
    assert len(calls) == (4 if name in ("t5", "whisper") else 2)
    for layer, h, edited in calls:
        writes = "decoder" in layer.key
        wanted = h.clone()
        for row in range(3):
            tokens = range(h.shape[1])
            if mask is not None and not writes:
                tokens = [place for place in tokens if mask[row, place]]
            last = [] if writes else list(tokens)[-2:]
            for place in tokens:
                if place in last or place in list(tokens)[:2]:
                    unit = layer.reft_suffix if place in last and not tied else layer.reft_prefix
                    wanted[row, place] = by_hand(unit["default"], h[row, place], variant, f)
        gives(edited, wanted)
        differs(edited, h)


@pytest.mark.parametrize("case", CASES)
def test_it_gives_what_adapters_gives(case):
    fields = dict(CASES[case])
    name, data = fields.pop("model"), load_file(DATA / "reft.safetensors")
    small = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "bert":
        config: Any = tf.BertConfig(**small, hidden_size=8, intermediate_size=12, max_position_embeddings=16)
        plain: Any = tf.BertModel(config, add_pooling_layer=False)
    else:
        config = tf.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2)
        plain = tf.GPT2Model(config)
    plain.load_state_dict({k.partition("|")[2]: v for k, v in data.items() if k.startswith(f"{name}|")}, strict=False)
    model = get_peft_model(plain, ReftConfig(dropout=0.0, **fields)).eval()
    for _, layer in layers_of(model):
        for j, held in enumerate((layer.reft_prefix, layer.reft_suffix)):
            for part, parameter in held.named_parameters():
                recorded = data[f"{case}|{layer.block.index}.{j}.{part.removeprefix('default.')}"]
                parameter.data.copy_(recorded)
    ids, mask, wanted = (data[f"{case}|{what}"] for what in ("ids", "mask", "out"))
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, **positions_of(name, mask)).last_hidden_state
    gives(found * mask[..., None], wanted)


def positions_of(name: str, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if name == "gpt2" else {}


def test_rows_are_orthonormal_and_stay_what_they_are():
    p = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    r = orthonormal(p)
    gives(r @ r.T, torch.eye(4, dtype=torch.float64))
    gives(orthonormal(r), r)
    gives(torch.linalg.lstsq(p.T, r.T).solution.T @ p, r)  # they span the same
    assert torch.autograd.gradcheck(orthonormal, (p,))
    with torch.autocast("cpu", torch.bfloat16):
        gives(orthonormal(r.detach().bfloat16().requires_grad_()).dtype == torch.float32 and r, r)


def test_dropout_acts_on_the_edited_state_and_the_dtype_is_that_of_the_edit():
    unit = next(layer for _, layer in layers_of(adapted("llama", dropout=0.5))).reft_prefix["default"].train()
    h = torch.randn(40, 5, 16)
    with torch.no_grad():
        dropped, kept = h + unit(h), h + unit.eval()(h)
    gone = dropped == 0
    assert 0.4 < gone.float().mean() < 0.6
    gives(dropped[~gone], 2 * kept[~gone])
    halved = next(layer for _, layer in layers_of(adapted("llama", dtype="bfloat16"))).reft_prefix["default"]
    assert halved.projection.weight.dtype == torch.float32
    with torch.no_grad():
        rough = halved(h)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), kept - h, rtol=0.05, atol=0.1)


def test_a_model_in_16_bits_keeps_its_dtype():
    model = get_peft_model(base("llama").to(torch.bfloat16), ReftConfig(task_type="CAUSAL_LM"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    loss = model(input_ids=batch("llama")["input_ids"], labels=batch("llama")["input_ids"]).loss
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


# --- which positions ----------------------------------------------------------------------------------------------


SIDES = [("llama", "left"), ("llama", "right"), ("bert", "right"), ("t5", "right"), ("wav2vec2", "right")]


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_a_row_of_a_padded_batch_is_what_it_is_alone(name, side):
    model, given = adapted(name), batch(name)
    if (name, side) == ("llama", "right"):
        given["attention_mask"] = given["attention_mask"].flip(1)
    mask = given["attention_mask"]
    if name == "llama":
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = logits(model, given)
    for row in range(3):
        kept = mask[row].bool()
        alone = {
            key: value[row : row + 1] if key == "decoder_input_ids" else value[row : row + 1, kept]
            for key, value in given.items()
            if key not in ("attention_mask", "position_ids")
        }
        gives(whole[row][kept] if name == "llama" else whole[row], logits(model, alone)[0])


@pytest.mark.parametrize("short", [1, 2, 3])
def test_texts_shorter_than_the_positions_are_edited_once_everywhere(short):
    model = adapted("llama", prefix_positions=2, suffix_positions=2)
    for layer, h, edited in spied(model, lambda: model(input_ids=torch.arange(3, 3 + short)[None])):
        for place in range(short):
            unit = (layer.reft_suffix if place >= short - 2 else layer.reft_prefix)["default"]
            gives(edited[0, place], by_hand(unit, h[0, place], "loreft", lambda x: x))


PROMPTS = {"input_ids": batch("llama")["input_ids"], "attention_mask": batch("llama")["attention_mask"]}


def new_tokens(model: nn.Module, given: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    return model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, **more)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_edits_the_prompt_and_no_new_token(name):
    """With a cache, with one of fixed size, and without; a row alone; and as training on prompt and answer sees it."""
    model = adapted(name, seed=2, suffix_positions=3)
    found = new_tokens(model, PROMPTS)
    assert torch.equal(found, new_tokens(model, PROMPTS, use_cache=False))
    if name == "llama":
        assert torch.equal(found, new_tokens(model, PROMPTS, cache_implementation="static"))
    with model.disable_adapter():
        assert not torch.equal(found, new_tokens(model, PROMPTS))
    for row in range(3):
        kept = PROMPTS["attention_mask"][row].bool()
        alone = new_tokens(model, {"input_ids": PROMPTS["input_ids"][row : row + 1, kept]})
        assert torch.equal(alone[0, kept.sum() :], found[row, 7:])
    mask = torch.cat([PROMPTS["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
    labels = torch.cat([torch.full((3, 7), -100), found[:, 7:]], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = logits(model, {"input_ids": found, "attention_mask": mask, "position_ids": places}, labels=labels)
    whole[..., 2] = -torch.inf  # the end of the text, which min_new_tokens keeps off
    assert torch.equal(whole[:, 6:-1].argmax(-1), found[:, 7:])
    calls = spied(model, lambda: new_tokens(model, PROMPTS))
    steps = [(h, edited) for _, h, edited in calls if h.shape[1] == 1]
    assert len(steps) == 6 and all(h is edited for h, edited in steps)  # nothing is computed at all


def test_beams_and_a_conversation_that_goes_on():
    model = adapted("llama")
    beams = [new_tokens(model, PROMPTS, num_beams=2, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)
    ids = PROMPTS["input_ids"][2:]
    plain = adapted("llama", suffix_positions=0, prefix_positions=5)
    short = [new_tokens(plain, {"input_ids": ids[:, :2]}, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*short)
    gives(logits(plain, {"input_ids": short[0]})[:, 1:-1].argmax(-1).float(), short[0][:, 2:].float())
    cache = tf.DynamicCache(config=plain.config)
    with torch.no_grad():  # the first positions are the same ones if a text comes in pieces
        parts = [plain(piece, past_key_values=cache).logits for piece in ids.split([3, 4], 1)]
        gives(torch.cat(parts, 1), plain(ids).logits)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_a_decoder_beside_an_encoder_writes_has_a_beginning_and_no_end(name):
    model, given = adapted(name), {k: v for k, v in batch(name).items() if k != "decoder_input_ids"}
    found = new_tokens(model, given)
    assert torch.equal(found, new_tokens(model, given, use_cache=False))
    whole = logits(model, given, decoder_input_ids=found)
    assert torch.equal(whole[:, :-1].argmax(-1), found[:, 1:])
    assert all("decoder" not in layer.key or "default" not in layer.reft_suffix for _, layer in layers_of(model))
    only_ends = adapted(name, prefix_positions=0)
    assert all("encoder" in layer.key for _, layer in layers_of(only_ends))


def test_labels_tell_where_a_prompt_ends_only_where_they_do_not_count_at_first():
    model, ids = adapted("llama"), PROMPTS["input_ids"][2:]
    plain = logits(model, {"input_ids": ids})
    gives(logits(model, {"input_ids": ids}, labels=ids), plain)
    labels = ids.clone()
    labels[:, :4] = -100
    answered = logits(model, {"input_ids": ids}, labels=labels)
    differs(answered, plain)
    gives(answered[:, :4], logits(model, {"input_ids": ids[:, :4]}))
    model = get_peft_model(
        tf.BertForTokenClassification(tf.BertConfig(vocab_size=40, hidden_size=16, intermediate_size=8,
                                                    num_hidden_layers=1, num_attention_heads=2)).eval(),
        ReftConfig(suffix_positions=2, r=2),
    )  # fmt: skip
    labels = (ids % 2).index_fill(1, torch.tensor([0, 1, 2]), -100)  # an encoder reads: labels tell nothing
    gives(logits(model, {"input_ids": ids}, labels=labels), logits(model, {"input_ids": ids}))


# --- the life of adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "whisper", "wav2vec2"])
def test_it_trains_is_saved_and_loaded_switched_off_and_taken_out(name, tmp_path):
    given = batch(name)
    plain = logits(base(name), given)
    model = adapted(name, dropout=0.0, layers=[0, 2] if name in ("t5", "whisper") else [0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(2):
        loss = model(**given).logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.any() for p in parameters)
        optimizer.step()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    trained = logits(model, given)
    differs(trained, plain)
    with model.disable_adapter():
        gives(logits(model, given), plain)
    model.save_pretrained(str(tmp_path))
    bare = model.unload()
    assert not bare._forward_pre_hooks and "_peft_record" not in vars(bare)
    gives(logits(bare, given), plain)
    loaded = PeftModel.from_pretrained(bare, str(tmp_path))
    gives(logits(loaded, given), trained)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".reft_")[1] for key in saved if ".reft_" in key} <= {
        f"{end}.{part}"
        for end in ("prefix", "suffix")
        for part in ("learned_source.weight", "learned_source.bias", "projection.weight")
    }


def test_adapters_act_together_row_by_row_and_go():
    """Each reads the block's own output, with its own positions; another one present changes nothing."""
    model, given = adapted("llama"), batch("llama")
    model.add_adapter("other", ReftConfig(variant="noreft", prefix_positions=1, suffix_positions=3, layers=[1]))
    stir(model, "other", seed=5, size=0.3)
    plain, alone = logits(base("llama"), given), {"default": logits(model, given)}
    model.set_adapter("other")
    alone["other"] = logits(model, given)
    rows = ["other", "__base__", "default"]
    wanted = torch.stack([plain[i] if name == "__base__" else alone[name][i] for i, name in enumerate(rows)])
    gives(logits(model, given, adapter_names=rows), wanted)
    model.base_model.set_adapter(["default", "other"])
    for layer, h, edited in spied(model, lambda: model(**given)):
        wanted = h.clone()
        for name in [name for name in ("default", "other") if name in layer.adapters]:
            model.base_model.set_adapter(name)
            index, valid = layer.extent.ends(h, *layer.adapters[name].positions)
            for row in range(3):
                chosen = index[row][valid[row]]
                with torch.no_grad():
                    change = layer.adapters[name].change(h[row : row + 1, index[row]])[0][valid[row]]
                wanted[row, chosen] += change
        model.base_model.set_adapter(["default", "other"])
        gives(edited, wanted)
    model.set_adapter("default")
    model.delete_adapter("other")
    gives(logits(model, given), alone["default"])


def test_it_acts_together_with_other_methods():
    """The edit reads what the block gives with a LoRA and a bottleneck in it, whichever came first."""
    given, found = batch("llama"), []
    configs = {"reft": ReftConfig(r=2), "lora": LoraConfig(r=2), "bottleneck": BottleneckConfig(reduction_factor=4)}
    for order in (list(configs), list(configs)[::-1]):
        model = get_peft_model(base("llama"), configs[order[0]], adapter_name=order[0], mixed=True)
        for name in order[1:]:
            model.add_adapter(name, configs[name])
        for seed, name in enumerate(configs):
            for parameter in (p for _, layer in layers_of(model) for p in layer.adapter_parameters(name)):
                parameter.data.zero_()
            stir(model, name, seed=seed, size=0.3)
        model.set_adapter(order)
        found.append(logits(model, given))
        model.set_adapter(["lora", "bottleneck"])
        differs(logits(model, given), found[-1])
    gives(*found)


def test_tied_ends_have_one_set_of_weights():
    tied, free = adapted("llama", tied_weights=True, layers=[1]), adapted("llama", layers=[1])
    names = [
        [n.partition("layers.")[2] for n, p in model.named_parameters() if p.requires_grad] for model in (tied, free)
    ]
    assert [len(held) for held in names] == [3, 6]
    assert all(name.startswith("1.reft_prefix.default.") for name in names[0])


def test_gradients_are_the_same_with_checkpoints_and_in_copies(tmp_path):
    gradients = []
    for how in ("plain", "checkpointed", "reentrant", "copied", "pickled"):
        model = adapted("llama", dropout=0.0)
        if how in ("checkpointed", "reentrant"):
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        if how == "copied":
            model = copy.deepcopy(model)
        if how == "pickled":
            torch.save(model, tmp_path / "model.pt")
            model = torch.load(tmp_path / "model.pt", weights_only=False)
        given = batch("llama")
        model.train()(
            **given, labels=given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
        ).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for others in gradients[1:]:
        for found, wanted in zip(others, gradients[0], strict=True):
            gives(found, wanted)


def test_the_trainer_trains_it(tmp_path):
    model = adapted("llama", dropout=0.1, layers=[0])
    ids = batch("llama")["input_ids"]
    rows = [{"input_ids": row, "labels": torch.cat([torch.full((4,), -100), row[4:]])} for row in ids]
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    options = tf.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=3, learning_rate=0.05, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = tf.Trainer(model, options, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, was) for p, was in zip([p for p in model.parameters() if p.requires_grad], before))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "loref"}, "Did you mean 'loreft'"),
        ({"prefix_positions": 0}, "both 0, so nothing is edited"),
        ({"layers": "first"}, "'all' or numbers of blocks, not 'first'"),
        ({"layers": [0, 5]}, r"after the blocks \[0, 5\] of LlamaForCausalLM: it has 2"),
        ({"r": 17}, "r=17 is more than the 16 features of 'model.layers.0'"),
        ({"non_linearity": "rellu"}, "Did you mean 'relu'"),
        ({"dtype": "int8"}, "dtype='int8' is not valid"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    plain = base("llama")
    with refused(plain, message):
        get_peft_model(plain, ReftConfig(**fields))
    assert not plain.model._forward_pre_hooks


def test_transformers_loads_it_and_other_methods_are_told_apart(tmp_path):
    """The name of a method that the reference does not have is asked for its ``value`` like one that it has."""
    model, given = adapted("llama"), batch("llama")
    wanted = logits(model, given)
    with pytest.raises(ValueError, match="this model has REFT adapters, so no LORA adapter can be added"):
        model.add_adapter("other", LoraConfig())
    model.save_pretrained(str(tmp_path))
    plain = base("llama")
    plain.load_adapter(str(tmp_path))
    gives(logits(plain, given), wanted)
    assert estimate_memory(base("llama"), ReftConfig(), batch_size=2, sequence_length=8).total > 0


def test_a_mask_that_tells_no_padding_is_refused_and_edits_are_not_merged():
    model, ids = adapted("llama"), PROMPTS["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask \[3, 9\] does not tell which of 7 tokens are padding"):
        layer = next(layer for _, layer in layers_of(model))
        layer.extent.mask = torch.ones(3, 9)
        layer.extent.ends(torch.zeros(3, 7, 16), 1, 1)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None] & PROMPTS["attention_mask"].bool()[:, None, None]
    places = {"position_ids": (PROMPTS["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    prepared = logits(model, {"input_ids": ids, "attention_mask": causal | torch.eye(7, dtype=torch.bool), **places})
    assert prepared.isfinite().all()
    with pytest.raises(ValueError, match="no one weight equals it"):
        model.merge_and_unload()


# --- skipped blocks -----------------------------------------------------------------------------------------------

SKIPPED = {
    "reft": lambda left: ReftConfig(layers=[n for n in (0, 1) if n not in left], suffix_positions=1, r=2),
    "bottleneck": lambda left: BottleneckConfig(preset="houlsby", reduction_factor=4, leave_out=left),
    "prompt": lambda left: AdaptionPromptConfig(adapter_len=2, adapter_layers=2 - len(left)),
    "lora": lambda left: LoraConfig(r=2, layers_to_transform=[n for n in (0, 1) if n not in left]),
}  # fmt: skip


@pytest.mark.parametrize("method", SKIPPED)
def test_a_skipped_block_is_one_without_an_adapter(method, tmp_path):
    """As if it had been left out when the adapter was made, for whole batches, mixed ones and generation."""
    given = batch("llama")
    model = get_peft_model(base("llama"), SKIPPED[method]([])).eval()
    less = get_peft_model(base("llama"), SKIPPED[method]([0])).eval()
    stir(model, seed=4)
    twins = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in less.named_parameters():
            p.copy_(
                twins[name.replace(".layers.0.base_layer.", ".layers.0.")]
                if name in twins
                else twins[own(name, twins)]
            )
    whole, part, plain = logits(model, given), logits(less, given), logits(base("llama"), given)
    differs(part, whole)
    with model.skip_layers([0]):
        gives(logits(model, given), part)
        gives(
            logits(model, given, adapter_names=["default", "__base__", "default"]),
            part.index_copy(0, torch.tensor([1]), plain[1:2]),
        )
        assert torch.equal(new_tokens(model, PROMPTS), new_tokens(less, PROMPTS))
        with model.skip_layers([0, 1]):
            gives(logits(model, given), plain)
        gives(logits(model, given), part)
    gives(logits(model, given), whole)
    with contextlib.suppress(RuntimeError), model.skip_layers([1]):
        raise RuntimeError
    gives(logits(model, given), whole)
    with model.skip_layers([0]):
        model.train()(**given).logits.sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and not any(".layers.0." in name for name in trained)
    assert all(p.requires_grad for _, layer in layers_of(model) for p in layer.adapter_parameters("default"))


def own(name: str, twins: dict[str, Any]) -> str:
    """The name of a base parameter where another block is wrapped."""
    plain = {key.replace(".base_layer", ""): key for key in twins}
    return plain[name.replace(".base_layer", "")]


def test_skipping_goes_with_shadows_and_refuses_what_is_not_there():
    given = batch("llama")
    model = get_peft_model(base("llama"), ShadowConfig(r=2, task_type="CAUSAL_LM")).eval()
    stir(model, seed=0, size=0.2)
    whole = logits(model, given)
    with model.skip_layers([0]):
        part = logits(model, given)
    differs(part, whole)
    with model.skip_layers([0, 1]):
        gives(logits(model, given), logits(base("llama"), given))
        differs(part, logits(model, given))
    gives(logits(model, given), whole)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no block 2, 7: it has 2"), model.skip_layers([2, 7, 0]):
        pass
    prompts = get_peft_model(base("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompts are no part of single blocks"), prompts.skip_layers([0]):
        pass
