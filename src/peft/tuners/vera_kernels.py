"""What steps of VeRA and PVeRA compute with the frozen random pair, so that autograd keeps little."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from peft.core.layer.layer import BaseTunerLayer
from peft.kernels.made_again import Transformable


class ScaledTable(Transformable):
    """``diag(rows) table diag(columns)``, of which autograd keeps the two vectors and the frozen table, no product."""

    @staticmethod
    def forward(rows: torch.Tensor, table: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Rows ``[n]``, table ``[n, m]``, columns ``[m]``."""
        return (table * rows[:, None]).mul_(columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:  # type: ignore[override]
        rows, table, columns = ctx.saved_tensors
        each = gradient * table
        return each @ columns, None, rows @ each


_READ = WeakTensorKeyDictionary()
"""Inputs that are there, with what is true of them and of A, A x, and the layers that have used it."""


def projected(layer: BaseTunerLayer, x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """A x as ``[n, rows of A]``, once for all layers that read one input (q, k and v; gate and up), as they share A.

    Their backward passes share it too: autograd sums up what they give, and multiplies that by A once.

    Returns:
        A x, and whether another layer has made it.
    """
    key = x._version, a.data_ptr(), a._version, a.shape, a.stride()
    found = _READ.get(x)
    # a layer that reads its input again is in another call, whose backward pass may come after that of the first
    if found is not None and found[0] == key and layer not in found[2]:
        found[2].add(layer)
        return found[1], True
    h = torch.mm(x.reshape(-1, x.shape[-1]), a.T)
    if x.grad_fn is not None or not x.requires_grad:  # the graph of what is made of a leaf would keep the leaf alive
        _READ[x] = key, h, WeakSet((layer,))
    return h, False


def times(h: torch.Tensor, d: torch.Tensor | None) -> torch.Tensor:
    """d * h, d None for ones."""
    return h if d is None else h * d


class Raised(torch.autograd.Function):
    """y + b * (B (d * h)), in place of y.

    Args:
        y: ``[..., out]``. h: ``[n, r]``. d: ``[r]``, or None for ones. b: ``[out]``. table: B ``[out, r]``, frozen.
        keeps: keep B (d * h) for the gradient of b, and do not multiply once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        h: torch.Tensor,
        d: torch.Tensor | None,
        b: torch.Tensor,
        table: torch.Tensor,
        keeps: bool,
    ) -> torch.Tensor:
        ctx.mark_dirty(y)  # the base's output, which nothing else reads, is added to in place
        u, z, flat = None, times(h, d), y.view(-1, y.shape[-1])
        if keeps:
            u = torch.mm(z, table.T)
            flat.addcmul_(u, b)
        else:
            flat.addmm_(z, (table * b[:, None]).T)
        ctx.save_for_backward(h, d, b, table, u)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        h, d, b, table, u = ctx.saved_tensors
        _, needs_h, needs_d, needs_b, *_ = ctx.needs_input_grad
        dy, dh, dd, db = gradient.reshape(-1, len(b)), None, None, None
        if needs_h or needs_d:  # b goes to the smaller one
            dz = torch.mm(dy, table * b[:, None]) if len(dy) > table.shape[1] else torch.mm(dy * b, table)
            dh, dd = times(dz, d), (dz * h).sum(0) if needs_d else None
        # What is kept of u has no graph, and a second derivative needs one.
        if needs_b and (u is None or torch.is_grad_enabled()):
            db = (torch.mm(dy.T, times(h, d)) * table).sum(1)
        elif needs_b:
            db = (dy * u).sum(0)
        return gradient, dh, dd, db, None, None
