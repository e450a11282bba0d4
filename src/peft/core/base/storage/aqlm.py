"""AQLM (arXiv 2401.06118): W is a sum of entries of learned codebooks."""

from __future__ import annotations

from typing import ClassVar

from peft.core.base.storage.quantized import ForwardOnly


class AQLM(ForwardOnly):
    """Runs forward and backward through the library's kernels; read and written by nobody else."""

    name = "aqlm"
    install = "'aqlm[gpu,cpu]'"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("aqlm", "QuantizedLinear"),)
    slots: ClassVar[tuple[str, ...]] = ("codes",)
