"""EETQ: 8 bits by rows, interleaved for its CUDA kernels."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from peft.core.base.storage.quantized import ForwardOnly


class EETQ(ForwardOnly):
    """Runs forward and backward through the library's kernels; read and written by nobody else."""

    name = "eetq"
    install = "eetq"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (
        ("eetq", "EetqLinear"),
        ("transformers.integrations.eetq", "EetqLinear"),
    )
    slots: ClassVar[tuple[str, ...]] = ("weight",)

    def linear_shape(self, m: nn.Module) -> tuple[int, int]:
        inner, out = m.weight.shape  # the kernels want it transposed
        return out, inner
