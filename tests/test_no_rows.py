"""Inputs without rows or tokens, and adapters without ranks, go through in training and in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft import (
    AdaLoraConfig,
    BOFTConfig,
    GraloraConfig,
    LilyConfig,
    LoraConfig,
    PeanutConfig,
    PeftModel,
    PolyConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)


CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adalora": (AdaLoraConfig, {"init_r": 3, "target_r": 2, "total_step": 9, "lora_dropout": 0.1}),
    "boft": (BOFTConfig, {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "boft_dropout": 0.3}),
    "gralora": (GraloraConfig, {"r": 4, "gralora_k": 2, "hybrid_r": 2, "gralora_dropout": 0.1}),
    "lily-sample": (LilyConfig, {"r": 2, "routing": "sample"}),
    "lily-token": (LilyConfig, {"r": 2, "routing": "token"}),
    "lily-batch": (LilyConfig, {"r": 2, "routing": "batch"}),
    "peanut": (PeanutConfig, {"r": 3, "depth": 1}),
    "poly": (PolyConfig, {"r": 2, "n_skills": 2, "n_splits": 2}),
    "psoft": (PsoftConfig, {"r": 2, "psoft_dropout": 0.1}),
    "pvera": (PveraConfig, {"r": 4, "pvera_dropout": 0.1}),
    "randlora": (RandLoraConfig, {"r": 3, "randlora_dropout": 0.1}),
    "tinylora": (TinyLoraConfig, {"r": 2, "u": 3, "tinylora_dropout": 0.1}),
    "unilora": (UniLoraConfig, {"r": 2, "theta_d_length": 7, "unilora_dropout": 0.1}),
    "vblora": (VBLoRAConfig, {"r": 2, "num_vectors": 8, "vector_length": 3, "vblora_dropout": 0.1}),
    "vera": (VeraConfig, {"r": 4, "vera_dropout": 0.1}),
}
LAYERS = {
    "linear": (lambda: nn.Linear(8, 16), [(0, 8), (2, 0, 8), (0, 3, 8)]),
    "conv": (lambda: nn.Conv2d(8, 8, 3, padding=1), [(0, 8, 5, 5)]),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), [(0, 8, 5, 5)]),
    "table": (lambda: nn.Embedding(16, 8), [(0,), (2, 0)]),
}


def adapted(base: nn.Module, config: Any, fields: dict[str, Any]) -> PeftModel:
    """A model whose adapter does something."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(base), config(target_modules=["0"], **fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3)
    return model


@pytest.mark.filterwarnings("ignore:boft_dropout")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", CONFIGS)
def test_an_input_without_rows(method: str, layer: str, training: bool) -> None:
    make, shapes = LAYERS[layer]
    model = adapted(make(), *CONFIGS[method]).train(training)
    for shape in shapes:
        x = torch.zeros(shape, dtype=torch.long) if layer == "table" else torch.zeros(shape)
        y = model(x)
        assert y.shape == model.base_model.model[0].get_base_layer()(x).shape
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        with torch.no_grad():
            assert model(x).shape == y.shape


@pytest.mark.parametrize("layer", LAYERS)
def test_a_mixed_batch_without_rows(layer: str) -> None:
    make, shapes = LAYERS[layer]
    model = adapted(make(), LoraConfig, {})
    for shape in shapes:
        x = torch.zeros(shape, dtype=torch.long) if layer == "table" else torch.zeros(shape)
        names = ["default", "__base__"][: shape[0]]
        assert model(x, adapter_names=names).shape == model(x).shape
    with pytest.raises(ValueError, match="adapter_names"):
        model(torch.zeros((3, *shapes[0][1:]), dtype=x.dtype), adapter_names=[])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_adapter_without_ranks_is_the_base(layer: str, training: bool) -> None:
    make, shapes = LAYERS[layer]
    fields = {"init_r": 3, "target_r": 2, "total_step": 9, "rank_pattern": {"0.lora_E": [False] * 3}}
    model = adapted(make(), AdaLoraConfig, fields).train(training)
    assert model.base_model.model[0].lora_A["default"].numel() == 0
    for shape in ((2, *shape[1:]) for shape in shapes):
        x = torch.ones(shape, dtype=torch.long) if layer == "table" else torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(model(x), model.base_model.model[0].get_base_layer()(x))
        model(x).sum().backward()


def test_a_dropout_that_does_nothing_is_said() -> None:
    with pytest.warns(UserWarning, match="boft_dropout does nothing on convolutions"):
        adapted(nn.Conv2d(8, 8, 3), BOFTConfig, {"boft_block_size": 2, "boft_dropout": 0.3})
