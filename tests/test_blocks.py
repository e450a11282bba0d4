"""Methods that act in, beside or after the blocks of a transformer, on the architectures that users have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ALL, DECODERS, ENCODER_DECODERS, build, inputs
from torch import nn
from toys import Mlp

from peft import (
    AdaptionPromptConfig,
    PeftModel,
    get_peft_model,
)
from peft.core.blocks import ATTENTION, CROSS, FEEDFORWARD, find_blocks
from peft.core.walk import layers_of


pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: nn.Module, name: str, batch: int = 4, **kwargs: Any) -> torch.Tensor:
    """The output of a model in evaluation mode, without gradients."""
    given = {key: value for key, value in inputs(name, batch).items() if key != "labels"}
    if name in ENCODER_DECODERS:
        given["decoder_input_ids"] = given["input_ids"].flip(1)
    with torch.no_grad():
        return model.eval()(**given, **kwargs).logits


def stir(model: nn.Module, adapter: str = "default", seed: int = 3, size: float = 0.5) -> None:
    """Move an adapter's tensors away from their start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in layers_of(model):
            for parameter in layer.adapter_parameters(adapter):
                parameter.add_(torch.randn(parameter.shape, generator=draw) * size)


def greedy(model: nn.Module, name: str, use_cache: bool) -> torch.Tensor:
    """Five more tokens for four prompts."""
    ids = inputs(name)["input_ids"]
    return model.eval().generate(
        input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache
    )


def gives(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def differs(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() > 1e-3


def trains(model: nn.Module, name: str, steps: int = 4, rate: float = 0.1) -> None:
    """The loss falls, every parameter of the adapter gets a gradient within the steps, and no other one has any."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses, moved = [], [False] * len(parameters)
    for _ in range(steps):
        loss = model.eval()(**inputs(name)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        moved = [was or bool(p.grad.abs().max() > 0) for was, p in zip(moved, parameters, strict=True)]
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(moved)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


# --- structure ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_blocks_are_found_by_their_structure(name):
    blocks = find_blocks(build(name))
    assert [block.index for block in blocks] == list(range(4 if name in ENCODER_DECODERS else 2))
    for block in blocks:
        crossing = name in ENCODER_DECODERS and "decoder" in block.key
        wanted = [ATTENTION, CROSS, FEEDFORWARD] if crossing else [ATTENTION, FEEDFORWARD]
        assert [part.role for part in block.sublayers] == wanted


def test_a_model_without_attention_has_no_blocks():
    assert find_blocks(Mlp()) == []


# --- LLaMA-Adapter ----------------------------------------------------------------------------------------------

PROMPT = {"adapter_len": 3, "adapter_layers": 2}


def prompted(name: str, stirred: bool = True, **fields: Any) -> PeftModel:
    torch.manual_seed(2)
    model = get_peft_model(build(name), AdaptionPromptConfig(**{**PROMPT, "task_type": "CAUSAL_LM", **fields}))
    if stirred:
        stir(model)
    return model


@pytest.mark.parametrize("name", DECODERS)
class TestAdaptionPrompt:
    """Every decoder that computes by transformers' attention functions."""

    def test_starts_as_the_identity_and_trains(self, name):
        model = prompted(name, stirred=False)
        gives(logits(model, name), logits(build(name), name))
        trains(model, name)

    def test_saves_and_loads(self, name, tmp_path):
        model = prompted(name)
        differs(logits(model, name), logits(build(name), name))
        model.save_pretrained(str(tmp_path))
        gives(logits(PeftModel.from_pretrained(build(name), str(tmp_path)), name), logits(model, name))
        gives(logits(model.unload(), name), logits(build(name), name))

    def test_several_adapters_and_mixed_batches(self, name):
        model = prompted(name)
        model.add_adapter("other", AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"))
        stir(model, "other", seed=5)
        alone = {"default": logits(model, name), "__base__": logits(build(name), name)}
        model.set_adapter("other")
        alone["other"] = logits(model, name)
        differs(alone["other"], alone["default"])
        rows = ["other", "__base__", "default", "other"]
        wanted = torch.stack([alone[row][i] for i, row in enumerate(rows)])
        gives(logits(model, name, adapter_names=rows), wanted)
        model.delete_adapter("other")
        gives(logits(model, name), alone["default"])

    def test_generation_with_a_cache_is_generation_without(self, name):
        model = prompted(name)
        assert torch.equal(greedy(model, name, True), greedy(model, name, False))

    def test_gradient_checkpointing_gives_the_same_gradients(self, name):
        gradients = []
        for checkpointed in (False, True):
            model = prompted(name)
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            model.train()(**inputs(name)).loss.backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        for plain, again in zip(*gradients, strict=True):
            gives(again, plain)


def test_a_prompt_gives_what_its_formula_says():
    """attn' = attn + W_o g softmax(q K_p^T / sqrt(d)) V_p, with the keys of two groups for four heads."""
    model = prompted("llama", adapter_layers=1)
    layer = next(layer for _, layer in layers_of(model))
    attention, seen = layer.base_layer, {}

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen.update(kwargs, output=output[0])

    handle = layer.register_forward_hook(note, with_kwargs=True)
    logits(model, "llama")
    handle.remove()
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]

    def heads(states: torch.Tensor, count: int) -> torch.Tensor:
        return states.view(len(states), -1, count, 4).transpose(1, 2)

    def turned(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, -1)
        return states * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    with torch.no_grad():
        prompt, gate = layer.adaption_prompt["default"], layer.adaption_gate["default"]
        query = turned(heads(attention.q_proj(x), 4))
        keys, values = (heads(p(prompt), 2).repeat_interleave(2, 1) for p in (attention.k_proj, attention.v_proj))
        scores = torch.softmax(query @ keys.transpose(-1, -2) / 2, -1) @ values
        wanted = attention.o_proj(gate * scores.transpose(1, 2).reshape(x.shape))
        plain = attention(**{**{k: v for k, v in seen.items() if k != "output"}, "cache": None})[0]
    gives(seen["output"], plain + wanted)


def test_eager_attention_gives_the_same_as_sdpa():
    model = prompted("llama")
    wanted = logits(model, "llama")
    model.base_model.model.set_attn_implementation("eager")
    gives(logits(model, "llama"), wanted)


def test_prompts_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="adapter_len and adapter_layers must be set"):
        get_peft_model(build("llama"), AdaptionPromptConfig())
    with pytest.raises(ValueError, match="has 2 self-attentions called 'self_attn'"):
        get_peft_model(build("llama"), AdaptionPromptConfig(adapter_len=3, adapter_layers=5))
    with pytest.raises(ValueError, match="those found are called self_attn"):
        get_peft_model(build("llama"), AdaptionPromptConfig(target_modules="attn", adapter_len=3, adapter_layers=1))
    model = prompted("llama")
    with pytest.raises(ValueError, match="no one weight equals it"):
        model.merge_and_unload()
