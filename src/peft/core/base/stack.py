"""The kind of a single parameter: what ``target_parameters`` names."""

from __future__ import annotations

import torch
from torch import nn

from peft.core.base.kinds import Kind
from peft.core.filling import unfilled_linear


class Stack(Kind):
    """One 2-D or 3-D ``nn.Parameter`` of any module (``target_parameters``), such as the experts of a mixture.

    A stack ``[E, out, in]`` (``[E, in, out]`` where the module has ``is_transposed``) is the matrix ``[E * out, in]``.
    Only the low-rank pair knows of the experts: in the file, A is expert-major ``[E * r, in]`` and B rank-major
    ``[out, r * E]``.
    """

    name = "ParamWrapper"
    types = ()
    bias = None
    opaque = True

    def __init__(self, parameter: str):
        self.weight = parameter

    def refusal(self, m: nn.Module) -> str | None:
        dims = getattr(m, self.weight).dim()
        return None if dims in (2, 3) else f"its parameter {self.weight!r} has {dims} dimensions, not 2 or 3"

    def target_name(self, key: str) -> str:
        return f"{key}.{self.weight}" if key else self.weight

    def _stored(self, m: nn.Module) -> tuple[int, int, int, bool]:
        parameter = getattr(m, self.weight)
        experts, rows, columns = parameter.shape if parameter.dim() == 3 else (1, *parameter.shape)
        transposed = parameter.dim() == 3 and bool(getattr(m, "is_transposed", False))
        return experts, rows, columns, transposed

    def experts(self, m: nn.Module) -> int:
        """How many matrices the parameter holds."""
        return self._experts(m)[0]

    def _experts(self, m: nn.Module) -> tuple[int, int, int]:
        experts, rows, columns, transposed = self._stored(m)
        return (experts, columns, rows) if transposed else (experts, rows, columns)

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        experts, out, inner = self._experts(m)
        return experts * out, inner

    def orient(self, w: torch.Tensor, m: nn.Module) -> torch.Tensor:
        if w.dim() == 2:
            return w
        return (w.mT if self._stored(m)[3] else w).flatten(0, 1)

    def restore(self, w: torch.Tensor, m: nn.Module) -> torch.Tensor:
        if getattr(m, self.weight).dim() == 2:
            return w
        w = w.unflatten(0, (self._stored(m)[0], -1))
        return w.mT if self._stored(m)[3] else w

    def factor(self, m: nn.Module, r: int, bias: bool = False) -> tuple[nn.Module, nn.Module]:
        experts, out, inner = self._experts(m)
        return unfilled_linear(inner, experts * r), unfilled_linear(experts * r, out, bias)

    def compose(self, m: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        experts = self._experts(m)[0]
        if experts == 1:
            return b @ a
        product = torch.einsum("ore,eri->eoi", b.unflatten(1, (-1, experts)), a.unflatten(0, (experts, -1)))
        return product.flatten(0, 1)

    def pairs(self, m: nn.Module, a: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        experts = self._experts(m)[0]
        return list(zip(a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).unbind(-1)))

    def take_rows(self, m: nn.Module, args: tuple, kwargs: dict, rows: torch.Tensor) -> tuple[tuple, dict]:
        raise ValueError(
            f"adapter_names cannot be used with adapters on the parameter {self.weight!r} (target_parameters): what "
            "its module computes is not known row by row. Activate one adapter at a time with set_adapter."
        )
