"""Conversion to LoRA: ranks, errors, and what is trained beside the layers. That nothing is lost is a law."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import Mlp, tiny_llama

from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    save_as_lora,
)


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
