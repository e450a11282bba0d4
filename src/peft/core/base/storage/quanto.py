"""optimum-quanto: W = scale * (q - shift), by rows of 8 bits or groups of 2 or 4."""

from __future__ import annotations

import torch
from torch import nn

from peft.core.base.storage.quantized import Quantized, is_from


class Quanto(Quantized):
    """``QLinear``, frozen or not, and its relatives: modules with ``weight_qtype``."""

    name = "optimum-quanto"

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return attribute == "weight" and is_from(m, "optimum.quanto", "QModuleMixin") and m.weight_qtype is not None

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        weight = m.qweight
        return (weight.dequantize() if hasattr(weight, "dequantize") else weight).detach()

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        frozen = m.frozen
        m.weight = nn.Parameter(value.contiguous(), requires_grad=False)
        if frozen:
            m.weight = nn.Parameter(m.qweight, requires_grad=False)  # which quantises it

    def compute_dtype(self, m: nn.Module, attribute: str) -> torch.dtype | None:
        return m.weight.dtype
