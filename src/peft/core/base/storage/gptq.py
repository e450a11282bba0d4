"""GPTQ (arXiv 2210.17323), as gptqmodel and auto-gptq keep it."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from peft.core.base.storage.quantized import ForwardOnly


class GPTQ(ForwardOnly):
    """Runs forward and backward through the library's kernels; read and written by nobody else."""

    name = "gptq"
    install = "gptqmodel"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("gptqmodel", "BaseQuantLinear"), ("auto_gptq", "QuantLinear"))
    slots: ClassVar[tuple[str, ...]] = ("qweight",)

    def linear_shape(self, m: nn.Module) -> tuple[int, int]:
        if hasattr(m, "outfeatures"):  # auto-gptq
            return m.outfeatures, m.infeatures
        return super().linear_shape(m)
