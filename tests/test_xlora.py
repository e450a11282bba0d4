"""X-LoRA: what a call computes, what is trained, kept and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import tiny_llama
from transformers import AutoModelForCausalLM

from peft import LoraConfig, PeftModel, VeraConfig, XLoraConfig, get_peft_model
from peft.tuners.xlora.layer import xlora_weights


IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4]])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TARGETS = {"one": ["q_proj", "v_proj"], "two": ["q_proj", "down_proj"]}


RECORDED = {
    "plain": {},
    "layerwise": {
        "layerwise_scalings": True,
        "xlora_depth": 2,
        "softmax_temperature": 0.5,
        "global_scaling_weight": 2.0,
        "scaling_pass_value": 0.5,
    },
    "sparse": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 1, "xlora_depth": 3},
    "loose": {"enable_softmax": False},
}
HERE = Path(__file__).parent


@torch.no_grad()
@pytest.mark.parametrize("case", RECORDED)
def test_recorded_outputs(case: str) -> None:
    """As another implementation computes them."""
    cases, stored = HERE / "golden" / "cases", load_file(HERE / "data" / "xlora.safetensors")
    model = AutoModelForCausalLM.from_pretrained(HERE / "golden" / "models" / "llama", dtype=torch.float32)
    adapters = {"qv": str(cases / "lora_llama_qv"), "all": str(cases / "lora_all_linear")}
    config = XLoraConfig(adapters=adapters, xlora_size=4, task_type="CAUSAL_LM", **RECORDED[case])
    model = get_peft_model(model, config).eval()
    for name, p in model.base_model.internal_xlora_classifier.named_parameters():
        p.copy_(stored[f"{case}.start.{name}"])
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    logits = model(input_ids=stored["input_ids"]).logits
    torch.testing.assert_close(model.get_latest_scalings()[:, -1], stored[f"{case}.scalings"], **CLOSE)
    torch.testing.assert_close(logits[:, -1], stored[f"{case}.logits"], **CLOSE)


def base() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama().eval()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two LoRA adapters of other ranks and targets."""
    folder = tmp_path_factory.mktemp("experts")
    for r, (name, targets) in enumerate(TARGETS.items(), 2):
        torch.manual_seed(r)
        config = LoraConfig(r=r, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base(), config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in TARGETS}


def routed(experts: dict[str, str], **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    fields = {"xlora_size": 8, "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(base(), XLoraConfig(adapters=experts, **fields)).eval()
    with torch.no_grad():
        for p in model.base_model.internal_xlora_classifier.parameters():
            p.normal_()
    return model


def outputs_of(layer: nn.Module, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a layer in the last pass of a call."""
    seen: list[Any] = []
    handle = layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    model(input_ids=IDS)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("fields", [{}, {"layerwise_scalings": True, "xlora_depth": 2}, {"top_k_lora": 1}])
@torch.no_grad()
def test_each_token_has_its_sum_of_experts(experts: dict[str, str], fields: dict[str, Any]) -> None:
    model = routed(experts, global_scaling_weight=2.0, **fields)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for number, layer in enumerate(layers):
        x, y = outputs_of(layer, model)
        weights = model.get_latest_scalings()[:, :, number]
        assert weights.shape == (*IDS.shape, 2)
        torch.testing.assert_close(weights.sum(-1), torch.ones(IDS.shape))
        if "top_k_lora" in fields:
            weights = weights * (weights == weights.max(-1, keepdim=True).values)
        wanted = layer.base_layer(x)
        for i, name in enumerate(experts):
            if name in layer:
                update = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
                wanted = wanted + 2.0 * weights[:, :, i : i + 1] * update
        torch.testing.assert_close(y, wanted, **CLOSE)
    assert len(layers) == 6


@torch.no_grad()
def test_the_weights_come_from_the_hidden_states_of_the_base_model(experts: dict[str, str]) -> None:
    model = routed(experts, softmax_temperature=0.5)
    model(input_ids=IDS)
    hidden = base()(IDS, output_hidden_states=True).hidden_states[-1]
    wanted = (model.base_model.internal_xlora_classifier.layers(hidden) / 0.5).softmax(-1)
    torch.testing.assert_close(model.get_latest_scalings()[:, :, 0], wanted, **CLOSE)
    first = model(input_ids=IDS).logits
    model.set_scaling_pass_value(None)
    assert model.peft_config["default"].scaling_pass_value == 0.5
    assert (model(input_ids=IDS).logits - first).abs().max() > 1e-4


@torch.no_grad()
def test_top_k_weights_of_their_own(experts: dict[str, str]) -> None:
    model = routed(experts, enable_softmax=False, enable_softmax_topk=True, top_k_lora=1)
    with model.disable_adapter():
        plain = model(input_ids=IDS).logits
    torch.testing.assert_close(plain, base()(IDS).logits, **CLOSE)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    model(input_ids=IDS)
    weights = xlora_weights(layer.context.scalings[:, :, layer.number], top_k=1, softmax=True, factor=1.0)
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    dense = model(input_ids=IDS).logits
    model.set_topk_lora(None)
    assert (model(input_ids=IDS).logits - dense).abs().max() > 1e-4
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == 0.0
    torch.testing.assert_close(model(input_ids=IDS).logits, plain, **CLOSE)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours(experts: dict[str, str]) -> None:
    model = routed(experts)
    whole = model(input_ids=IDS).logits
    for row in range(3):
        torch.testing.assert_close(model(input_ids=IDS[row : row + 1]).logits[0], whole[row], **CLOSE)
    mixed = model(input_ids=IDS, adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed[[0, 2]], whole[[0, 2]], **CLOSE)
    torch.testing.assert_close(mixed[1], base()(IDS).logits[1], **CLOSE)
    torch.testing.assert_close(model(input_ids=IDS).logits, whole, **CLOSE)


@torch.no_grad()
def test_generation_reads_the_whole_sequence(experts: dict[str, str]) -> None:
    model, ids = routed(experts), IDS
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    given = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    assert given.tolist() == ids.tolist()
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(input_ids=IDS, use_cache=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_trains(experts: dict[str, str], checkpointing: bool) -> None:
    for trained in (False, True):
        model = routed(experts, use_trainable_adapters=trained, xlora_dropout_p=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        having = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert {"internal_xlora_classifier" in name or "lora_" in name for name in having} == {True}
        assert any("lora_A.two" in name for name in having) == trained
        assert having == {name for name, p in model.named_parameters() if p.requires_grad}
        if checkpointing:
            again = routed(experts, use_trainable_adapters=trained, xlora_dropout_p=0.0).train()
            again(input_ids=IDS, labels=IDS).loss.backward()
            for p, q in zip(model.parameters(), again.parameters()):
                assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_the_log(experts: dict[str, str]) -> None:
    model = routed(experts)
    assert model.get_latest_scalings() is None
    model(input_ids=IDS)
    assert model.get_scalings_log() == []
    model.enable_scalings_logging()
    for tokens in (6, 4, 6):
        model(input_ids=IDS[:, :tokens])
    assert [t.shape[1] for t in model.get_scalings_log()] == [6, 4, 6]
    buckets = model.get_bucketed_scalings_log()
    assert {tokens: places for tokens, (places, _) in buckets.items()} == {6: [0, 2], 4: [1]}
    assert buckets[4][1][0] is model.get_scalings_log()[1]
    model.disable_scalings_logging()
    model(input_ids=IDS)
    assert len(model.get_scalings_log()) == 3
    model.clear_scalings_log()
    assert model.get_scalings_log() == []


@pytest.mark.parametrize("names", [("0", "1"), ("adapter_1", "default"), ("layers", "weight")])
@pytest.mark.parametrize("depth", [1, 3])
def test_files_whatever_the_experts_are_called(
    experts: dict[str, str], names: tuple[str, str], depth: int, tmp_path: Path
) -> None:
    model = routed(dict(zip(names, experts.values())), xlora_depth=depth)
    wanted = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    places = range(0, 3 * depth, 3)
    assert set(stored) == {
        f"base_model.internal_xlora_classifier.layers.{i}.{part}" for i in places for part in ("weight", "bias")
    }
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert {n.split(".")[1] for n, p in trainable.named_parameters() if p.requires_grad} == {
        "internal_xlora_classifier"
    }


def test_experts_that_were_trained_are_in_the_file(experts: dict[str, str], tmp_path: Path) -> None:
    model = routed(experts, use_trainable_adapters=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B.one" in name:
                p.add_(1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_refusals_leave_the_model_as_it_was(experts: dict[str, str], tmp_path: Path) -> None:
    get_peft_model(base(), VeraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "vera")
    get_peft_model(base(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).save_pretrained(
        tmp_path / "whole"
    )
    cases = [
        ({}, {}, "adapters is empty"),
        ({**experts, "three": str(tmp_path / "vera")}, {}, "'three' is a VERA adapter"),
        ({**experts, "three": str(tmp_path / "whole")}, {}, "'three' trains whole modules"),
        (experts, {"hidden_size": 7}, "hidden_size=7"),
    ]
    for adapters, fields, message in cases:
        model = base()
        before = [name for name, _ in model.named_modules()], model(IDS).logits
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, XLoraConfig(adapters=adapters, task_type="CAUSAL_LM", **fields))
        assert [name for name, _ in model.named_modules()] == before[0]
        assert torch.equal(model(IDS).logits, before[1])
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="softmax_temperature=0"):
        XLoraConfig(softmax_temperature=0.0)


def test_what_has_no_meaning_is_refused(experts: dict[str, str]) -> None:
    model = routed(experts)
    with pytest.raises(ValueError, match="weighs its experts anew for each token"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="weighs its experts anew for each token"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="can have one only"):
        model.add_adapter("other", XLoraConfig(adapters=experts))
    with pytest.raises(ValueError, match="cannot be deleted"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="'one'"):
        model.set_adapter("one")
    plain = model.unload()
    assert torch.equal(plain(IDS).logits, base()(IDS).logits)
    assert not any("lora" in name for name, _ in plain.named_parameters())
