"""AWQ (arXiv 2306.00978), as autoawq keeps it; gptqmodel's AWQ layers are found with its others."""

from __future__ import annotations

from typing import ClassVar

from peft.core.base.storage.quantized import ForwardOnly


class AWQ(ForwardOnly):
    """Runs forward and backward through the library's kernels; read and written by nobody else."""

    name = "awq"
    install = "autoawq"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("awq", "WQLinear_GEMM"), ("awq", "WQLinear_GEMV"))
    slots: ClassVar[tuple[str, ...]] = ("qweight",)
