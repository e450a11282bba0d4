"""Conversion to LoRA: ranks, errors, and what is trained beside the layers. That nothing is lost is a law."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import ConvNet, Mlp, tiny_llama

from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    save_as_lora,
)
from peft.combining import WAYS, CombinationType
from peft.core.combine.ways import Combination
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.weight import weight_change
from peft.core.model.walk import layers_of
from peft.utils import merge_utils


def adapted(config=None):
    """An Mlp with an adapter that has an effect."""
    torch.manual_seed(0)
    config = config or LoHaConfig(r=2, target_modules=["lin0", "lin1"], init_weights=False)
    return get_peft_model(Mlp(), config)


def test_a_fixed_rank_gives_the_best_pair_of_that_rank() -> None:
    model = adapted()
    config, tensors = convert_to_lora(model, 2)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (2, 2, {})
    assert config.target_modules == {"lin0", "lin1"}
    for name in ("lin0", "lin1"):
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        u, s, vh = torch.linalg.svd(model.get_submodule(f"base_model.model.{name}").get_delta_weight("default"))
        torch.testing.assert_close(b @ a, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5, rtol=1e-4)


def test_a_share_of_the_energy_gives_each_layer_its_rank() -> None:
    model = adapted()
    config, tensors = convert_to_lora(model, 0.9)
    for name in ("lin0", "lin1"):
        rank = len(tensors[f"base_model.model.{name}.lora_A.weight"])
        energy = torch.linalg.svdvals(model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")) ** 2
        assert energy[:rank].sum() >= 0.9 * energy.sum() > energy[: rank - 1].sum()
        assert config.rank_pattern.get(name, config.r) == rank == config.alpha_pattern.get(name, config.lora_alpha)


def test_an_attention_of_torch_has_the_rank_and_the_scale_of_its_conversion(tmp_path: Path) -> None:
    """A config calls the packed weight as its module: a pattern by another name leaves it with another scale."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model = get_peft_model(base, LoHaConfig(r=4, target_modules=["0", "1", "2"], init_weights=False))
    wanted = {key: weight_change(layer, layer.adapters["default"]) for key, layer in by_key(model).items()}
    errors = save_as_lora(tmp_path, model, 0.7)
    model = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert model.peft_config["default"].rank_pattern.keys() <= {"0", "0\\.out_proj", "1", "2"}
    for key, layer in by_key(model).items():
        rest = weight_change(layer, layer.adapters["default"]) - wanted[key]
        assert float(rest.norm() / wanted[key].norm()) == pytest.approx(errors[key], abs=1e-4)


def test_a_name_that_ends_like_another_has_its_own_rank(tmp_path: Path) -> None:
    """The pattern of "lin" means "inner.lin", too."""
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"lin": torch.nn.Linear(8, 2), "inner": torch.nn.ModuleDict()})
    base["inner"].update({"lin": torch.nn.Linear(8, 8), "more": torch.nn.Linear(8, 8)})
    model = get_peft_model(base, LoHaConfig(r=4, target_modules=["lin", "more"], init_weights=False))
    wanted = {key: weight_change(layer, layer.adapters["default"]) for key, layer in by_key(model).items()}
    save_as_lora(tmp_path, model, 1.0)
    model = PeftModel.from_pretrained(model.unload(), tmp_path)
    for key, layer in by_key(model).items():
        torch.testing.assert_close(weight_change(layer, layer.adapters["default"]), wanted[key], atol=1e-5, rtol=1e-4)


def by_key(model: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    return {layer.key: layer for _, layer in layers_of(model)}


@pytest.mark.parametrize(
    "rank, says", [(0, "at least 1"), (-1, "at least 1"), (2.5, "share"), (9, "at most 6"), (True, "int")]
)
def test_ranks_without_meaning(rank: float, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        save_as_lora(tmp_path / "new", adapted(), rank)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_converted() -> None:
    with pytest.raises(ValueError, match="'other'"):
        convert_to_lora(adapted(), 2, "other")
    model = adapted(LNTuningConfig(target_modules=["norm"]))
    assert not model.supports_lora_conversion()
    with pytest.raises(ValueError, match="replaces the module"):
        convert_to_lora(model, 2)
    assert adapted(IA3Config(target_modules=["lin0"], feedforward_modules=[])).supports_lora_conversion()


def test_trained_modules_come_along(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_llama(), LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_weights=False)
    )
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    save_as_lora(tmp_path, model, 1.0, progressbar=False)
    torch.manual_seed(0)
    base = tiny_llama()
    base.load_state_dict(model.unload().state_dict())
    ids = torch.arange(8)[None]
    lora = PeftModel.from_pretrained(base, tmp_path)
    assert lora.peft_config["default"].inference_mode and isinstance(lora.peft_config["default"], LoraConfig)
    assert lora.base_model.model.lm_head.modules_to_save["default"].weight.shape == (30, 16)
    assert torch.isfinite(lora(input_ids=ids).logits).all()


def test_a_compiled_model_is_converted_as_what_it_wraps() -> None:
    model = adapted()
    wanted = convert_to_lora(model, 2)[1]
    got = convert_to_lora(torch.compile(model), 2)[1]
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], t) for name, t in wanted.items())


def test_a_merged_adapter_is_converted_from_the_unmerged_weight() -> None:
    model = adapted()
    wanted = convert_to_lora(model, 1.0)[1]
    model.merge_adapter()
    for name, tensor in convert_to_lora(model, 1.0)[1].items():
        assert tensor.shape == wanted[name].shape
    a, b = (f"base_model.model.lin0.lora_{part}.weight" for part in "AB")
    found = convert_to_lora(model, 1.0)[1]
    torch.testing.assert_close(found[b] @ found[a], wanted[b] @ wanted[a], atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()


def test_adapters_of_different_methods_become_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), LoHaConfig(r=2, target_modules=["lin0"], init_weights=False), "one", mixed=True)
    scales = IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=[], init_ia3_weights=False)
    model.add_adapter("two", scales)
    save_as_lora(tmp_path, model, 1.0, ["one", "two"], weights=[2, 0.5])
    torch.manual_seed(0)
    lora = PeftModel.from_pretrained(Mlp(), tmp_path).merge_and_unload()
    torch.manual_seed(0)
    wanted, x = Mlp(), torch.randn(3, 6)
    deltas = {name: model.base_model.model.get_submodule(name) for name in ("lin0", "lin1")}
    with torch.no_grad():
        inner = deltas["lin0"].base_layer
        parts = {p: layer for layer in (deltas["lin0"], inner) for p in ("one", "two") if p in layer}
        wanted.lin0.weight += 2 * parts["one"].get_delta_weight("one") + 0.5 * parts["two"].get_delta_weight("two")
        wanted.lin1.weight += 0.5 * deltas["lin1"].get_delta_weight("two")
        for name in ("lin0", "lin1"):
            layer = parts["two"] if name == "lin0" else deltas["lin1"]
            scale = layer.adapters["two"].scale_out()
            wanted.get_submodule(name).bias += 0.5 * (scale - 1) * layer.get_base_layer().bias
    torch.testing.assert_close(lora(x), wanted(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way].pruning])
def test_updates_of_any_methods_are_combined_by_each_way(way: CombinationType) -> None:
    """Held against the functions of tensors, on the dense updates of a LoHa and of a rotation."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), LoHaConfig(r=2, target_modules=["lin0"], init_weights=False), "one", mixed=True)
    model.add_adapter("two", OFTConfig(oft_block_size=2, target_modules=["lin0"], init_weights=False))
    define = getattr(merge_utils, way.removesuffix("_svd"))
    outer = model.base_model.model.lin0
    updates = [weight_change(layer, layer.adapters[n]) for n, layer in (("one", outer.base_layer), ("two", outer))]
    torch.manual_seed(3)
    with Combination(way, 0.6).seeded().draws(outer):  # each layer has draws of its own
        wanted = define([u.detach() for u in updates], torch.tensor([0.7, -1.2]), density=0.6)
    options = {"weights": [0.7, -1.2], "combination_type": way, "density": 0.6}
    for across in (False, True):  # ranks are shared out after the same random draw
        torch.manual_seed(3)
        _, found = convert_to_lora(model, 1.0, ["one", "two"], across_layers=across, **options)
        a, b = (found[f"base_model.model.lin0.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(b @ a, wanted, atol=1e-5, rtol=1e-4)


def test_ways_without_meaning() -> None:
    with pytest.raises(ValueError, match="Did you mean 'ties'"):
        convert_to_lora(adapted(), 2, combination_type="tie")
    with pytest.raises(ValueError, match="needs density"):
        convert_to_lora(adapted(), 2, combination_type="della_svd")


@pytest.mark.parametrize(
    ("names", "weights", "says"),
    [
        (["default", "default"], None, "each adapter once"),
        (["default"], [1, 2], "as many finite weights"),
        (["default"], [float("nan")], "as many finite weights"),
        (["default", "other"], None, r"'other'\] each train modules"),
    ],
)
def test_sums_without_meaning(names: list[str], weights: list[float] | None, says: str) -> None:
    model = adapted(LoHaConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"]))
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"]))
    with pytest.raises(ValueError, match=says):
        convert_to_lora(model, 2, names, weights=weights)


@pytest.mark.filterwarnings("ignore:adapter 'default' is a LoRA already")
@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"modules_to_save": ["lin1"]},
        {"trainable_token_indices": {"emb": [1, 2]}},
        {"bias": "all"},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_a_model_that_keeps_no_configs_is_converted_alike(beside: dict) -> None:
    torch.manual_seed(0)
    model = get_peft_model(ConvNet(), LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False, **beside))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    config, tensors = convert_to_lora(model, 2)
    plain = model.get_base_model()
    del plain.peft_config
    own_config, own = convert_to_lora(plain, 2)
    assert set(own) == set(tensors)
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, tensors[name])
    assert own_config.target_modules == {"lin0"} and own_config.bias == config.bias and own_config.r == config.r
