"""GPTQ (arXiv 2210.17323), as gptqmodel and auto-gptq keep it."""

from __future__ import annotations

from typing import ClassVar

from peft.core.storage.quantized import ForwardOnly


class GPTQ(ForwardOnly):
    """Runs forward and backward through the library's kernels; read and written by nobody else."""

    name = "gptq"
    install = "gptqmodel"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("gptqmodel", "BaseQuantLinear"), ("auto_gptq", "QuantLinear"))
    slots: ClassVar[tuple[str, ...]] = ("qweight",)
