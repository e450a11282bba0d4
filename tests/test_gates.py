"""Gates of LoRA, bottleneck adapters and prefixes: the formula, padding, batches, checkpoints, generation, files."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import build, inputs
from in_blocks import differs, gives
from torch import nn

from peft import BottleneckConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.convert import check_serving, rebase_adapter
from peft.core.gates import mean_gate
from peft.core.model.walk import layers_of


pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGS = {
    "lora": lambda **more: LoraConfig(r=4, lora_alpha=32, use_gating=True, **more),
    "bottleneck": lambda **more: BottleneckConfig(reduction_factor=4, use_gating=True, **more),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=3, use_gating=True, shared_gating=False, **more),
}


def stir(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    """Move an adapter's tensors away from their start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f".{name}." in key:
                p.add_(torch.randn(p.shape, generator=draw) * 0.5)


def adapted(kind: str, architecture: str = "llama", **more: Any) -> PeftModel:
    torch.manual_seed(0)
    task = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}.get(architecture)
    model = get_peft_model(build(architecture), CONFIGS[kind](task_type=task, **more)).eval()
    stir(model)
    return model


def logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask, **more).logits


def gates_of(model: PeftModel) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if "gate" in name and isinstance(module, nn.Linear)
            and "mlp" not in name]  # fmt: skip


def ids(rows: int = 3, length: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_gate_is_a_mean_over_tokens_that_count():
    h, weight, bias = torch.randn(2, 5, 4), torch.randn(3, 4), torch.randn(3)
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    found = mean_gate(h, weight, bias, padding)
    for row, start in enumerate((0, 2)):
        each = [1 / (1 + torch.exp(-(weight @ token + bias))) for token in h[row, start:]]
        gives(found[row], sum(each) / len(each))
    gives(mean_gate(h[1:, 2:], weight, bias), found[1:])


def test_lora_has_the_gate_in_the_place_of_its_scale():
    model, seen = adapted("lora"), []
    _, layer = next(layers_of(model))
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    logits(model, ids())
    (x, y), name = seen[0], "default"
    a, b, gate = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_gate[name]
    g = torch.sigmoid(x @ gate.weight.T + gate.bias).mean(1, keepdim=True)
    with torch.no_grad():
        gives(y, layer.base_layer(x) + g * (x @ a.T @ b.T))
        layer.set_scale(name, 2.0)
        gives(layer(x), layer.base_layer(x) + 2 * g * (x @ a.T @ b.T))


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_a_gate_shut_is_a_prefix_of_zeros_and_one_open_is_the_prefix(architecture):
    given = {k: v for k, v in inputs(architecture).items() if k != "labels"}
    if architecture == "t5":
        given["decoder_input_ids"] = given["input_ids"].flip(1)
    gated = adapted("prefix", architecture)
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type=gated.peft_config["default"].task_type)
    plain = get_peft_model(build(architecture), config).eval()
    table = gated.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        for bias, factor in ((50.0, 1.0), (-50.0, 0.0)):
            for gate in gates_of(gated):
                gate.weight.zero_()
                gate.bias.fill_(bias)
            plain.prompt_encoder["default"].embedding.weight.copy_(table * factor)
            gives(gated(**given).logits, plain(**given).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_does_not_count(kind):
    for architecture in ("llama", "bert"):
        model, short = adapted(kind, architecture), ids(1, 4)
        alone = logits(model, short)
        left = architecture == "llama"
        gap, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
        row, shown = (torch.cat([gap, x] if left else [x, gap], 1) for x in (short, mask))
        whole, seen = torch.cat([row, ids(1, 6, 5)]), torch.cat([shown, torch.ones_like(shown)])
        given = {"position_ids": (seen.cumsum(1) - 1).clamp(min=0)} if left else {}
        found = logits(model, whole, seen, **given)[:1]
        gives(found[:, -4:] if left else found, alone)


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_of_a_batch_have_their_own_gates(kind):
    model = adapted(kind)
    more = {"num_virtual_tokens": 2, "shared_gating": True} if kind == "prefix" else {}
    other = CONFIGS[kind](task_type="CAUSAL_LM")
    for field, value in more.items():
        setattr(other, field, value)
    model.add_adapter("other", other)
    stir(model, "other", 4)
    text, mask = ids(), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = 0
    alone = {"default": logits(model, text, mask)}
    model.set_adapter("other")
    alone["other"] = logits(model, text, mask)
    with model.disable_adapter():
        alone["__base__"] = logits(model, text, mask)
    names = ["other", "__base__", "default"]
    found = logits(model, text, mask, adapter_names=names)
    for row, name in enumerate(names):
        gives(found[row][mask[row] == 1], alone[name][row][mask[row] == 1])
    differs(alone["other"], alone["default"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpoints_give_the_same_gradients(kind):
    found = []
    for how in (None, True, False):
        model = adapted(kind)
        if how is not None:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": how})
        model.set_adapter("default")
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
        found.append([gate.weight.grad for gate in gates_of(model)])
    assert len(found[0]) >= 2 and all(gradient.abs().max() > 0 for gradient in found[0])
    for gradients in found[1:]:
        for one, other in zip(found[0], gradients, strict=True):
            gives(one, other)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gates_are_saved_and_loaded(kind, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    gives(logits(again, ids()), logits(model, ids()))
    twin = copy.deepcopy(model)
    for gate in gates_of(twin):
        gate.bias.data.add_(1)
    differs(logits(twin, ids()), logits(model, ids()))
    gives(logits(again, ids()), logits(model, ids()))
    bare = again.unload()
    gives(logits(bare, ids()), logits(build("llama"), ids()))
    assert not any(module._forward_pre_hooks for module in bare.modules())


@pytest.mark.parametrize("projected", [False, True])
def test_a_gated_prefix_generates_step_by_step(projected, tmp_path):
    """Each step is a call of its own, with the gates of that call; a cache that holds the prefix gets them too."""
    more = {"prefix_projection": True, "encoder_hidden_size": 5} if projected else {}
    model = adapted("prefix", **more)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    gives(logits(again, ids()), logits(model, ids()))
    text = ids()
    for beams in (1, 2):
        out = again.generate(input_ids=text, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=beams)
        assert out.shape == (3, 9)
    out = again.generate(input_ids=text, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False)
    for step in range(6, 9):
        assert torch.equal(logits(again, out[:, :step])[:, -1].argmax(-1), out[:, step])
    cached = again(input_ids=text, use_cache=True).past_key_values
    table = cached.layers[0].values[:, :, :3].clone()
    with torch.no_grad():
        again(input_ids=text[:, :1], past_key_values=cached)
    assert not torch.equal(table, cached.layers[0].values[:, :, :3])


def test_one_gate_for_keys_and_values_or_one_for_each():
    for shared, rows in ((True, 1), (False, 2)):
        config = PrefixTuningConfig(num_virtual_tokens=2, use_gating=True, shared_gating=shared)
        model = get_peft_model(build("llama"), config)
        assert [tuple(gate.weight.shape) for gate in gates_of(model)] == [(rows, 16)] * 2


def test_a_file_has_the_fields_only_where_they_are_set(tmp_path):
    for config, set_ in ((LoraConfig(), False), (CONFIGS["lora"](), True)):
        config.save_pretrained(tmp_path)
        assert ("use_gating" in (tmp_path / "adapter_config.json").read_text()) == set_
        assert LoraConfig.from_pretrained(tmp_path).use_gating == set_


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "DoRA divides by the norm"),
        ({"target_modules": ["embed_tokens"]}, "an embedding's input is indices"),
        ({"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}, "target_parameters.*use_gating"),
    ],
)
def test_what_no_gate_means_anything_for_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(build("llama"), LoraConfig(use_gating=True, **fields))


def test_what_depends_on_a_sample_is_neither_merged_nor_summed():
    model = adapted("lora")
    model.add_adapter("other", CONFIGS["lora"](task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="its gate depends on the sample"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="have gates"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum", combination_type="linear")
    assert not model.supports_lora_conversion()


def test_tools_that_know_pairs_alone_are_told(tmp_path):
    adapted("lora").save_pretrained(tmp_path)
    assert not any(serving.loads for serving in check_serving(tmp_path).values())
    with pytest.raises(ValueError, match="has gates"):
        rebase_adapter(tmp_path, tmp_path, tmp_path / "out")
