"""Libraries whose kernels alone can read their codes: AQLM, AWQ, EETQ, GPTQ."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from peft.core.base.storage.quantized import Quantized


class ForwardOnly(Quantized):
    """A weight that only the library's own kernels can read: the layer runs forward and backward, and that is all."""

    can_read = False
    can_write = False

    def _refuse(self, verb: str) -> ValueError:
        return ValueError(
            f"weights kept by {self.name} cannot be {verb}. Methods whose forward does not need the dense weight "
            "train on them unmerged; for the rest load the base model unquantised, or "
            "quantised by bitsandbytes (BitsAndBytesConfig)."
        )

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        raise self._refuse("read dense")

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        raise self._refuse("written, so nothing can be merged into them")


class AQLM(ForwardOnly):
    """AQLM (arXiv 2401.06118): W is a sum of entries of learned codebooks."""

    name = "aqlm"
    install = "'aqlm[gpu,cpu]'"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("aqlm", "QuantizedLinear"),)
    slots: ClassVar[tuple[str, ...]] = ("codes",)


class AWQ(ForwardOnly):
    """AWQ (arXiv 2306.00978), as autoawq keeps it; gptqmodel's AWQ layers are found with its others."""

    name = "awq"
    install = "autoawq"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("awq", "WQLinear_GEMM"), ("awq", "WQLinear_GEMV"))
    slots: ClassVar[tuple[str, ...]] = ("qweight",)


class EETQ(ForwardOnly):
    """EETQ: 8 bits by rows, interleaved for its CUDA kernels, which want the weight transposed."""

    name = "eetq"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (
        ("eetq", "EetqLinear"),
        ("transformers.integrations.eetq", "EetqLinear"),
    )

    def linear_shape(self, m: nn.Module) -> tuple[int, int]:
        inner, out = m.weight.shape
        return out, inner


class GPTQ(ForwardOnly):
    """GPTQ (arXiv 2210.17323), as gptqmodel and auto-gptq keep it."""

    name = "gptq"
    install = "gptqmodel"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("gptqmodel", "BaseQuantLinear"), ("auto_gptq", "QuantLinear"))
    slots: ClassVar[tuple[str, ...]] = ("qweight",)

    def linear_shape(self, m: nn.Module) -> tuple[int, int]:
        if hasattr(m, "outfeatures"):  # auto-gptq
            return m.outfeatures, m.infeatures
        return super().linear_shape(m)
