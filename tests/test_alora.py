"""aLoRA: the adapter acts from the last invocation sequence of a row on, however the model is called.

The oracle is a plain LoRA of the same numbers in a batch of the same shape, whose update is cut out by hand.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, StaticCache

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.core.model.walk import layers_of
from peft.tuners.lora.alora import last_occurrence


IDS = torch.tensor([[3, 5, 6, 7, 8, 5, 6, 9], [3, 4, 7, 8, 9, 10, 11, 12], [5, 6, 9, 9, 10, 3, 4, 4]])
STARTS = (5, 99, 0)  # where [5, 6] begins for the last time; the second row has none
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, eos_token_id=31, **sizes)).eval()


def config(**changes: Any) -> LoraConfig:
    fields = {"r": 4, "lora_alpha": 24, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**fields, "init_lora_weights": False, "alora_invocation_tokens": [5, 6], **changes})


def adapted(model: Any = None, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base() if model is None else model, config(**changes)).eval()


def by_hand(model: PeftModel, *call: Any, starts: tuple[int, ...] = STARTS, **kwargs: Any) -> Any:
    """The outputs of a plain LoRA whose layers give the base's output before each row's start."""
    plain = adapted(alora_invocation_tokens=None)
    plain.load_state_dict(model.state_dict())
    plain.train(model.training)

    def cut(layer: Any, args: tuple, y: torch.Tensor) -> torch.Tensor:
        position = torch.arange(y.shape[1])
        return torch.where((position >= torch.tensor(starts)[:, None])[..., None], y, layer.base_layer(args[0]))

    for _, layer in layers_of(plain):
        layer.register_forward_hook(cut)
    plain.config.use_cache = False
    return plain, plain(*call, **kwargs)


def test_the_last_occurrence_is_found() -> None:
    for ids, sequence, wanted in (
        (IDS, [5, 6], [5, -1, 0]),
        (IDS, [9], [7, 4, 3]),
        (IDS, [9, 10], [-1, 4, 3]),
        (IDS[:, :1], [5, 6], [-1, -1, -1]),
    ):
        assert last_occurrence(ids, sequence)[:, 0].tolist() == wanted
    texts = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]] * 3)  # the second [5, 6] of the first row is cut in two
    assert last_occurrence(IDS, [5, 6], texts).tolist() == [[1] * 6 + [-1] * 2, [-1] * 8, [0] * 6 + [-1] * 2]


def test_of_other_tokens_nothing_is_kept() -> None:
    model, kept = adapted(target_modules=["down_proj"]).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(input_ids=IDS).logits.sum()
    (acting,) = {shape for shape in kept if shape[-1] == 24 and shape[0] not in (3, 16)}  # neither gates nor weights
    assert acting == (3 + 8, 24)  # those of the first and of the third row


def test_it_acts_from_the_last_invocation_on_and_trains_there_alone() -> None:
    model = adapted()
    model.train()
    output = model(input_ids=IDS, labels=IDS)
    plain, wanted = by_hand(model, input_ids=IDS, labels=IDS)
    torch.testing.assert_close(output.logits, wanted.logits)
    output.loss.backward()
    wanted.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, msg=name)
    assert torch.equal(model(IDS).logits, output.logits), "positional ids are ids"


def test_the_prefix_and_rows_without_invocation_are_the_base_to_the_bit() -> None:
    with torch.no_grad():
        caches = [DynamicCache(config=base().config) for _ in range(2)]
        plain, found = (m(IDS, past_key_values=c) for m, c in zip((base(), adapted()), caches))
    for ours, theirs in zip(caches[1].layers, caches[0].layers):
        for row, start in enumerate(STARTS):
            for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                assert torch.equal(mine[row, :, :start], other[row, :, :start])
                assert start == 99 or mine is ours.keys or not torch.equal(mine[row, :, start:], other[row, :, start:])
    assert torch.equal(found.logits[1], plain.logits[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_knows_the_same_tokens(reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = adapted()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.add_adapter("plain", config(alora_invocation_tokens=None))
        model.set_requires_grad(["default", "plain"])
        model(
            input_ids=IDS, labels=IDS, use_cache=False, adapter_names=["default", "default", "plain"]
        ).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(g is not None for g in grads[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_calls_before_one_backward_pass_are_recomputed_each_with_its_own_tokens(reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = adapted()
        model.train()
        model.add_adapter("plain", config(alora_invocation_tokens=None))
        model.set_requires_grad(["default", "plain"])
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        block = model.base_model.model.model.layers[0]
        before = block._gradient_checkpointing_func if checkpointed else None
        parts = [
            model(input_ids=ids, labels=ids, use_cache=False, adapter_names=names).loss
            for ids, names in ((IDS, ["default", "default", "plain"]), (IDS.flip(1), ["plain", "default", "default"]))
        ]
        (parts[0] - parts[1]).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        copied = copy.deepcopy(model)
        copied(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        model.unload()
        assert not checkpointed or block._gradient_checkpointing_func is before
    torch.testing.assert_close(*grads)


def test_texts_packed_into_a_row_wait_each_for_its_own_invocation() -> None:
    """As the model keeps texts apart whose positions begin anew, where it is given no mask."""
    model = adapted()
    texts = [IDS[0], IDS[1, :5], IDS[2], IDS[0, :6]]  # the last ends within its second invocation: [.. 8, 5]
    packed, positions = torch.cat(texts)[None], torch.cat([torch.arange(len(text)) for text in texts])[None]
    with torch.no_grad():
        packing = {"position_ids": positions, "use_cache": False}
        found = model(packed, **packing).logits[0]
        torch.testing.assert_close(found, torch.cat([model(text[None]).logits[0] for text in texts]))
        plain = torch.cat([base()(text[None]).logits[0] for text in texts])
        acts = [t >= first for text, first in zip(texts, (5, 99, 0, 1)) for t in range(len(text))]
        assert ((found - plain).abs().amax(-1) > 1e-5).tolist() == acts
        last = model(packed, logits_to_keep=7, **packing).logits[0]
        torch.testing.assert_close(last, found[-7:])
        shifted = model(IDS, position_ids=torch.arange(8)[None] + 3).logits
        torch.testing.assert_close(shifted, model(IDS).logits)


def test_a_batch_in_which_no_row_has_the_invocation_can_be_trained_on() -> None:
    model = adapted()
    model.train()
    model(input_ids=IDS[1:2], labels=IDS[1:2]).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
def test_generation_is_the_same_with_and_without_a_cache(way: str) -> None:
    model, kwargs = adapted(), GREEDY | WAYS[way]
    found = []
    for call in (
        lambda: model.generate(input_ids=IDS, **kwargs),
        lambda: model.generate(IDS, **{k: v for k, v in kwargs.items() if k[:5] != "cache"}, use_cache=False),
        lambda: model.base_model.model.generate(IDS, **kwargs),
    ):
        torch.manual_seed(2)
        found.append(call())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.manual_seed(2)
    assert not torch.equal(found[0], base().generate(IDS, **kwargs)), "the adapter does nothing"


def test_generation_goes_on_as_single_steps_do() -> None:
    model, ids = adapted(), IDS
    with torch.no_grad():
        for _ in range(5):
            _, output = by_hand(model, ids)
            ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(IDS, **GREEDY), ids)


RECORDED = {
    "greedy": [[16, 2, 16, 2, 21, 21], [30, 9, 26, 6, 31, 0], [2, 25, 25, 27, 25, 25]],
    "sampling": [[13, 16, 20, 4, 10, 29], [2, 5, 16, 2, 12, 21], [19, 8, 30, 24, 24, 7]],
}
"""What 0.21.2 generates; beams it refuses, and without a cache its greedy tokens are others."""


@pytest.mark.parametrize("way", RECORDED)
def test_generation_is_that_of_the_reference(way: str) -> None:
    model, generator = adapted(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    torch.manual_seed(4)
    kwargs = GREEDY | WAYS[way] | {"max_new_tokens": 6}
    assert model.generate(IDS, attention_mask=torch.ones_like(IDS), **kwargs)[:, 8:].tolist() == RECORDED[way]


def test_padding_on_either_side_changes_nothing() -> None:
    model, pad = adapted(), torch.zeros(3, 2, dtype=torch.long)
    with torch.no_grad():
        alone = model(IDS).logits
        for ids, rows in ((torch.cat([pad, IDS], 1), slice(2, None)), (torch.cat([IDS, pad], 1), slice(0, 8))):
            mask = torch.zeros_like(ids)
            mask[:, rows] = 1
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            found = model(ids, attention_mask=mask, position_ids=positions).logits[:, rows]
            torch.testing.assert_close(found, alone)
    left = torch.cat([pad, IDS], 1)
    found = model.generate(left, attention_mask=(left != 0).long(), **GREEDY)
    assert torch.equal(found[:, 2:], model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY))


def test_a_cache_of_the_base_model_serves_the_adapter() -> None:
    model, plain = adapted(), base()
    ids = IDS[:1]
    with torch.no_grad():
        whole = model(ids).logits
        cache = plain(ids[:, :5], past_key_values=DynamicCache(config=plain.config)).past_key_values
        reused = copy.deepcopy(cache)
        torch.testing.assert_close(model(ids[:, 5:], past_key_values=cache).logits, whole[:, 5:])
        found = model.generate(ids, past_key_values=reused, **GREEDY)
    assert torch.equal(found, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_loop_over_parts_of_the_text_is_one_call(fixed: bool) -> None:
    """Also where a cache is copied between the parts, and where the invocation itself is cut in two."""
    model = adapted()
    settings = {"config": model.config, "max_cache_len": 12}
    with torch.no_grad():
        whole = model(IDS).logits
        cache = StaticCache(**settings) if fixed else None
        cache = model(IDS[:, :7], past_key_values=cache, use_cache=True).past_key_values
        found = model(IDS[:, 7:], past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(found, whole[:, 7:])
        cache = model(IDS[:1, :6], use_cache=True).past_key_values
        rest = model(IDS[:1, 6:], past_key_values=cache).logits
        assert not torch.allclose(rest, base()(IDS[:1]).logits[:, 6:]), "the second half of the invocation starts it"


def test_rows_of_a_batch_have_each_its_own_adapter_and_invocation() -> None:
    model = adapted()
    for name, tokens in (("plain", None), ("other", [8])):
        model.add_adapter(name, config(alora_invocation_tokens=tokens))
    names = ["default", "plain", "__base__", "other"]
    ids = IDS[:1].expand(4, -1)
    with torch.no_grad():
        found = model(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
            alone = base()(ids).logits if name == "__base__" else model(ids).logits
            torch.testing.assert_close(found[row], alone[row])
    rows = model.generate(ids, adapter_names=names, num_beams=2, **GREEDY)
    for row, name in enumerate(names):
        one = model.generate(ids[:1], adapter_names=[name], num_beams=2, **GREEDY)
        assert torch.equal(rows[row, : one.shape[1]], one[0])


def test_layers_that_see_only_the_last_tokens_or_tokens_as_rows() -> None:
    model = adapted(target_modules=["lm_head", "embed_tokens"])
    with torch.no_grad():
        whole = model(IDS).logits
        torch.testing.assert_close(model(IDS, logits_to_keep=2).logits, whole[:, -2:])
    layer = model.base_model.model.lm_head
    with torch.no_grad():
        model(IDS)
        x = torch.randn(3, 8, 16)
        torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))
        with pytest.raises(ValueError, match="lm_head gets 5 rows in a call with 24 tokens"):
            layer(x.flatten(0, 1)[:5])


def test_without_ids_it_is_the_base_and_says_so() -> None:
    model = adapted()
    vectors = model.get_input_embeddings()(IDS)
    with torch.no_grad(), pytest.warns(UserWarning, match="without token ids"):
        found = model(inputs_embeds=vectors).logits
    assert torch.equal(found, base()(inputs_embeds=vectors).logits)


def test_a_model_with_injected_layers_knows_its_tokens() -> None:
    torch.manual_seed(1)
    model = inject_adapter_in_model(config(), base()).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, adapted()(IDS).logits)


def test_transposed_layers() -> None:
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
    with torch.no_grad():
        before = plain(IDS).logits
        after = adapted(plain, target_modules=["c_attn"])(IDS).logits
    changed = (after - before).abs().amax(-1) > 0
    assert [row.tolist() for row in changed] == [[t >= start for t in range(8)] for start in STARTS]


def test_what_has_no_meaning_is_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="acts on some tokens only"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="at least one token id"):
        config(alora_invocation_tokens=[])
    with pytest.raises(ValueError, match="causal language model"):
        config(task_type="SEQ_CLS")
    cache = model(IDS[:2], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled by 2 rows, and the call has 3"):
        model(IDS, past_key_values=cache)


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 4, 1), nn.MultiheadAttention(8, 2), nn.Linear(4, 4)], ids=["conv", "attention", "loftq"]
)
def test_layers_without_tokens_and_starts_that_change_the_base_are_refused(layer: nn.Module) -> None:
    linear = isinstance(layer, nn.Linear)
    fields = {"target_modules": ["0"], "task_type": None, "init_lora_weights": "loftq" if linear else True}
    with pytest.raises(ValueError, match="changes the base weight" if linear else "acts on some tokens of a row only"):
        get_peft_model(nn.Sequential(layer), config(**fields))


def test_a_weighted_sum_waits_for_the_same_invocation() -> None:
    model = adapted()
    model.add_adapter("second", config(lora_alpha=4))
    model.add_adapter("other", config(alora_invocation_tokens=[8]))
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", "cat")
    plain, deltas = base(), {}
    with torch.no_grad():
        for path, layer in layers_of(model.base_model.model):
            deltas[path] = [
                layer.lora_B[n].weight @ layer.lora_A[n].weight * layer.scaling[n] for n in ("default", "second")
            ]
            summed = layer.lora_B["sum"].weight @ layer.lora_A["sum"].weight * layer.scaling["sum"]
            torch.testing.assert_close(summed, 0.5 * deltas[path][0] + 2 * deltas[path][1])
        before = plain(IDS).logits
        model.set_adapter("sum")
        changed = (model(IDS).logits - before).abs().amax(-1) > 0
    assert [row.tolist() for row in changed] == [[t >= start for t in range(8)] for start in STARTS]
    with pytest.raises(ValueError, match="begin to act at different tokens"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "none", "cat")


def test_a_head_tied_to_its_embedding_waits_too() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes)).eval()
    with torch.no_grad():
        before = tied(IDS).logits
        model = adapted(tied, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
        assert set(model.base_model.model.lm_head.tied_to) == {"default"}
        changed = (model(IDS).logits - before).abs().amax(-1) > 0
    assert [row.tolist() for row in changed] == [[t >= start for t in range(8)] for start in STARTS]


def test_a_head_cannot_follow_what_is_more_than_a_pair() -> None:
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, hidden_size=64, num_hidden_layers=0))
    fields = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True, "use_dora": True}
    with pytest.raises(ValueError, match="by one pair A and B, and Dora is more than that"):
        adapted(tied, **fields)


def test_offsets_that_are_given_are_told_to_do_nothing() -> None:
    model = adapted()
    with pytest.warns(UserWarning, match="alora_offsets does nothing"):
        given = model(input_ids=IDS, alora_offsets=[3, None, 8]).logits
    assert torch.equal(given, model(input_ids=IDS).logits)
