"""Small models of quantised linear layers, one entry for each storage that runs on a CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peft.core.base.storage import storage_of


IN, HIDDEN = 64, 128
"""Sizes: blocks of 4-bit codes have 64 entries, and CPU kernels want rows in multiples of 32."""


def plain(seed: int = 0, bias: bool = True) -> nn.Sequential:
    """Two linear layers with tanh between them; weights of unit gain, so that no rounding is hidden."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(IN, HIDDEN, bias=bias), nn.Tanh(), nn.Linear(HIDDEN, IN, bias=bias)).eval()


def _bnb4(bias: bool = True, **options: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = plain(bias=bias)
    for i in (0, 2):
        old = model[i]
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=bias, **options)
        new.load_state_dict(old.state_dict())
        model[i] = new
    return model.to("cpu").eval()


def _bnb8() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = plain()
    for i in (0, 2):
        old = model[i]
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        model[i] = new
    return model.to("cpu").eval()


def _hqq() -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    model, config = plain(), quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    for i in (0, 2):
        model[i] = quantize.HQQLinear(model[i], config, compute_dtype=torch.float32, device="cpu")
    return model.eval()


def _torchao(config: Callable[[Any], Any]) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = plain()
    quantization.quantize_(model, config(quantization))
    return model


def _quanto(weights: str) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    if weights == "qint4" and os.environ.get("LAWS") != "all":
        pytest.skip("quanto compiles an extension for four bits, which takes a minute; run with LAWS=all")
    model = plain()
    quanto.quantize(model, weights=getattr(quanto, weights))
    quanto.freeze(model)
    return model.eval()


BASES: dict[str, Callable[[], nn.Module]] = {
    "bnb-nf4": lambda: _bnb4(quant_type="nf4", compress_statistics=False),
    "bnb-nf4-double": lambda: _bnb4(quant_type="nf4", compress_statistics=True),
    "bnb-fp4": lambda: _bnb4(bias=False, quant_type="fp4", compress_statistics=False),
    "bnb-nf4-bfloat16": lambda: _bnb4(quant_type="nf4", compute_dtype=torch.bfloat16),
    "bnb-int8": _bnb8,
    "hqq-4": _hqq,
    "torchao-int8": lambda: _torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao-int4": lambda: _torchao(
        lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))
    ),
    "quanto-int8": lambda: _quanto("qint8"),
    "quanto-int4": lambda: _quanto("qint4"),
}
"""Name -> a model in evaluation mode."""

MAIN = ("bnb-nf4-double", "bnb-int8")
"""Those that every law is tested on; the others meet the laws of merging."""


@functools.cache
def noise(base: str) -> float:
    """How far a layer's own forward is from W x on this machine, relative.

    Some products are made in 16 bits, some round their input, and which does depends on the processor: bitsandbytes
    multiplies codes of 4 bits in bfloat16 on those with AVX512-BF16.
    """
    layer = BASES[base]()[0]
    x = torch.randn(12, IN, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        bias = 0 if layer.bias is None else layer.bias.float()
        wanted = x @ storage_of(layer, "weight").read(layer, "weight").float().T + bias
        error = (layer(x).float() - wanted).norm() / wanted.norm()
    return max(error.item(), {"bnb-nf4-bfloat16": 2e-2, "bnb-int8": 2e-2}.get(base, 1e-5))


def pack(model: nn.Module) -> None:
    """Repack 4-bit codes as bitsandbytes does on CPUs with AVX512-BF16 at the first forward in evaluation mode."""
    bnb = pytest.importorskip("bitsandbytes")
    for m in model.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            m.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(m.weight.data, m.weight.quant_state)
