"""What scripts and files of 0.21.2 see: values here were recorded with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Attention, Mlp, tiny_llama

from peft import (
    AdaLoraConfig,
    FrodConfig,
    HRAConfig,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    WaveFTConfig,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
)


FILE = "adapter_model.safetensors"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def disturb(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move everything that trains away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "config, name",
    [
        (LoraConfig(target_modules=["lin0"]), "lora.Linear"),
        (AdaLoraConfig(target_modules=["lin0"], total_step=9), "adalora.SVDLinear"),
        (HRAConfig(target_modules=["lin0"]), "hra.HRALinear"),
        (MissConfig(r=2, target_modules=["lin0"]), "miss.MissLinear"),
        (WaveFTConfig(n_frequency=3, target_modules=["lin0"]), "waveft.WaveFTLinear"),
    ],
)
def test_a_layer_has_one_name_in_print_and_in_reports(config: Any, name: str) -> None:
    model = get_peft_model(Mlp(), config)
    assert get_layer_status(model)[0].module_type == name
    assert f"(lin0): {name}(" in repr(model)
    assert type(model.base_model.model.lin0).__name__ == name.partition(".")[2]


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward", "__class__"])
@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_names_that_no_adapter_can_have(name: str, error: type[Exception]) -> None:
    config = LoraConfig(target_modules=["lin0"])
    model = get_peft_model(Mlp(), config)
    with pytest.raises(error, match="cannot be the name of an adapter"):
        get_peft_model(Mlp(), config, adapter_name=name)
    with pytest.raises(error, match="cannot be the name of an adapter"):
        model.add_adapter(name, config)
    assert list(model.peft_config) == ["default"]


class _Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.q = nn.Linear(4, 3 + index % 2, bias=False)
        numbers = torch.arange(self.q.weight.numel()).reshape(self.q.weight.shape)
        self.q.weight.data = torch.sin(1.0 + numbers * (index + 1))


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(i) for i in range(3))


class TestFrod:
    """The basis, its places and the scales are those of 0.21.2, on which files without them depend."""

    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        config = FrodConfig(target_modules=["q"], sparse_rate=0.2, projection_prng_key=3, progressbar=False)
        return get_peft_model_state_dict(get_peft_model(_Blocks(), config))

    def test_the_scales_are_those_recorded(self, tensors: dict[str, torch.Tensor]) -> None:
        recorded = [
            [0.2631, 0.0648, 0.8802, 0.9652],
            [0.9368, 0.7141, 0.2923, 0.2617],
            [0.2307, 0.6970, 0.3738, 0.0032],
        ]
        found = [tensors[f"base_model.model.layers.{i}.q.frod_lambda_l"].tolist() for i in range(3)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(recorded), rtol=0, atol=2e-3)

    def test_v_v_t_is_the_sum_of_all_w_t_w(self, tensors: dict[str, torch.Tensor]) -> None:
        weights = [block.q.weight.detach() for block in _Blocks().layers]
        v = tensors["base_model.frod_V.q"]
        torch.testing.assert_close(v @ v.T, sum(w.T @ w for w in weights), **CLOSE)

    @pytest.mark.parametrize("n, rate, count", [(8, 0.01, 1), (8, 0.055, 3), (8, 0.0, 0), (8, 0.9, 56), (5, 0.5, 12)])
    def test_places_are_beside_the_diagonal(self, n: int, rate: float, count: int) -> None:
        config = FrodConfig(target_modules=["0"], sparse_rate=rate, progressbar=False)
        model = get_peft_model(nn.Sequential(nn.Linear(n, n), nn.Linear(n, 2)), config)
        rows, columns = get_peft_model_state_dict(model)["base_model.frod_s_indices.0"]
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows) == count
        assert (rows != columns).all()

    def test_one_generator_draws_the_places_in_the_order_of_names(self) -> None:
        model = get_peft_model(tiny_llama(), FrodConfig(target_modules=["v_proj", "k_proj"], progressbar=False))
        tensors, generator = get_peft_model_state_dict(model), torch.Generator().manual_seed(0)
        for name in ("self_attn_k_proj", "self_attn_v_proj"):
            rows, columns = tensors[f"base_model.frod_s_indices.{name}"]
            n = int(tensors[f"base_model.frod_s_size.{name}"][0])
            drawn = torch.randperm(n * (n - 1), generator=generator)[: len(rows)]
            assert (rows * (n - 1) + columns - (columns > rows).long()).tolist() == drawn.tolist()

    def test_a_basis_of_fewer_rows_than_columns_and_one_of_zeros(self) -> None:
        for weight in (torch.randn(2, 6), torch.zeros(6, 6)):
            base = nn.Sequential(nn.Linear(6, len(weight)))
            base[0].weight.data.copy_(weight)
            x = torch.randn(3, 6)
            wanted = base(x)
            model = get_peft_model(base, FrodConfig(target_modules=["0"], progressbar=False))
            torch.testing.assert_close(model(x), wanted, **CLOSE)


class TestCopiesOfModulesWithModules:
    """LN tuning on more than a norm: 0.21.2 leaves the adapter's name in the names of tensors further inside."""

    X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

    def trained(self, name: str) -> PeftModel:
        torch.manual_seed(0)
        return disturb(get_peft_model(Attention(), LNTuningConfig(target_modules=["attn"]), adapter_name=name))

    def test_names_in_files(self, tmp_path: Path) -> None:
        self.trained("mine").save_pretrained(str(tmp_path))
        assert sorted(load_file(tmp_path / "mine" / FILE)) == [
            f"base_model.model.attn.ln_tuning_layers.{name}"
            for name in ("default.out_proj.bias", "default.out_proj.weight", "in_proj_bias", "in_proj_weight")
        ]

    @pytest.mark.parametrize("written, read", [("mine", "mine"), ("mine", "default"), ("default", "other")])
    @pytest.mark.parametrize("low", [False, True])
    def test_a_file_is_read_under_any_name(self, tmp_path: Path, written: str, read: str, low: bool) -> None:
        model = self.trained(written)
        model.save_pretrained(str(tmp_path))
        folder = tmp_path if written == "default" else tmp_path / written
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.manual_seed(0)
            again = PeftModel.from_pretrained(Attention(), str(folder), read, low_cpu_mem_usage=low)
        torch.testing.assert_close(again(self.X), model(self.X), **CLOSE)

    @pytest.mark.parametrize("label", ["", "theirs."])
    def test_older_files_have_the_name_of_the_adapter_or_none(self, tmp_path: Path, label: str) -> None:
        model = self.trained("default")
        model.save_pretrained(str(tmp_path))
        tensors = load_file(tmp_path / FILE)
        save_file({k.replace("default.", label): v for k, v in tensors.items()}, tmp_path / FILE)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(Attention(), str(tmp_path))
        torch.testing.assert_close(again(self.X), model(self.X), **CLOSE)
