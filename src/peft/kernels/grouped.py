"""A batch whose rows have different low-rank updates: y_i = W x_i + b + s_g B_g A_g drop(x_i), g the update of row i.

The factors of all updates are stacked, lower ranks filled up with zeros, and each layer does one product with the
stack. Short rows multiply by the whole stack, and what belongs to other updates is set to zero; long rows multiply by
factors gathered row by row. Stacks of adapters that do not train are kept until one of their tensors changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.weak import WeakIdKeyDictionary

from peft.kernels import gpu
from peft.kernels.dropout import Dropped, draw_seed
from peft.kernels.linear import Factors, base_output, in_dtype, is_eager, no_autocast, product_dtype
from peft.kernels.remake import kept


SHORT = 32  # tokens of a row times updates, up to which the whole stack is multiplied


@dataclass(slots=True)
class Stack:
    """Factors of several updates: ``down [G, r, in]``, ``up [G, r, out]`` with the scales in it."""

    down: torch.Tensor
    up: torch.Tensor


def can_group(x: torch.Tensor, factors: Sequence[Factors | None]) -> bool:
    """Whether one product does for these updates: eager, one rate of dropout, one device."""
    found = [f for f in factors if f is not None]
    rates = {f.dropout for f in found}
    return bool(found) and len(rates) == 1 and is_eager(x) and x.dim() > 1


def grouped_linear(
    owner: nn.Module,
    base: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    factors: Sequence[Factors | None],
    weight: torch.Tensor | None = None,
    fresh: bool = False,
) -> torch.Tensor:
    """The output of ``base``, each row with its own update.

    Args:
        owner: the layer for which the stack is kept.
        base, weight, fresh: as in :func:`peft.kernels.linear.low_rank_linear`.
        x: ``[rows, ..., in]``. index: the update of each row, ``[rows]``, integers below ``len(factors)``.
        factors: the updates; None for rows that have none. All have the same rate of dropout.
    """
    rate = next(f.dropout for f in factors if f is not None)
    y = base_output(base, x, weight, fresh)
    with no_autocast(x):
        stack = stacked(owner, factors, product_dtype(y))
        drop = (rate, draw_seed()) if rate else None
        if torch.is_grad_enabled() and (x.requires_grad or stack.down.requires_grad or stack.up.requires_grad):
            return GroupedLowRank.apply(x, y, stack.down, stack.up, index, drop)
        _add(y, x if drop is None else Dropped(*drop).copy(x), stack, index)
    return y


def stacked(owner: nn.Module, factors: Sequence[Factors | None], dtype: torch.dtype) -> Stack:
    """The stack of these updates: the one that is kept for ``owner``, if it still holds."""
    entry = _KEPT.get(owner)
    if entry is not None and entry.holds(factors, dtype):
        return entry.stack
    trains = torch.is_grad_enabled() and any(f is not None and f.trains for f in factors)
    made = any(type(t) is not nn.Parameter for f in factors if f is not None for t in (f.down, f.up))
    if trains or made:
        forget(owner)
        return _stack(factors, dtype)
    with torch.no_grad():
        stack = _stack(factors, dtype)
    _KEPT[owner] = _Entry(list(factors), dtype, [_state(f) for f in factors], stack)
    return stack


def forget(owner: nn.Module) -> None:
    """Drop the stack that is kept for a layer."""
    _KEPT.pop(owner, None)


@dataclass(slots=True)
class _Entry:
    """A stack and what it was made of."""

    factors: list[Factors | None]
    dtype: torch.dtype
    states: list[tuple | None]
    stack: Stack

    def holds(self, factors: Sequence[Factors | None], dtype: torch.dtype) -> bool:
        if dtype != self.dtype or len(factors) != len(self.factors):
            return False
        grad = torch.is_grad_enabled()
        for old, new, state in zip(self.factors, factors, self.states):
            if old is None or new is None:
                if old is not new:
                    return False
            elif old.down is not new.down or old.up is not new.up or _state(new) != state or (grad and new.trains):
                return False
        return True


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()


def _state(f: Factors | None) -> tuple | None:
    """What changes when the tensors of an update do."""
    if f is None:
        return None
    down, up = f.down, f.up
    return down._version, down.data_ptr(), up._version, up.data_ptr(), f.scale


def _stack(factors: Sequence[Factors | None], dtype: torch.dtype) -> Stack:
    found = [f for f in factors if f is not None]
    rank = max(f.down.shape[0] for f in found)
    downs, ups = [], []
    for f in factors:
        if f is None:
            downs.append(found[0].down.new_zeros(rank, found[0].down.shape[1], dtype=dtype))
            ups.append(found[0].up.new_zeros(rank, found[0].up.shape[0], dtype=dtype))
            continue
        missing = rank - f.down.shape[0]
        down, up = in_dtype(dtype, f.down), in_dtype(dtype, f.up).t() * f.scale
        downs.append(F.pad(down, (0, 0, 0, missing)) if missing else down)
        ups.append(F.pad(up, (0, 0, 0, missing)) if missing else up)
    return Stack(torch.stack(downs), torch.stack(ups))


def _is_short(x: torch.Tensor, stack: Stack) -> bool:
    return x.numel() // (x.shape[0] * x.shape[-1]) * len(stack.down) <= SHORT


def _others(x: torch.Tensor, stack: Stack, index: torch.Tensor) -> torch.Tensor:
    """Which entries of ``x A^T`` for all updates belong to other updates than the row's: ``[tokens, G * r]``."""
    groups, rank = stack.down.shape[:2]
    tokens = x.numel() // (x.shape[0] * x.shape[-1])
    masks = _MASKS.setdefault(index, {})
    if (tokens, rank) not in masks:
        own = index.repeat_interleave(tokens) if tokens > 1 else index
        masks[tokens, rank] = own.unsqueeze(1) != torch.arange(groups, device=index.device).repeat_interleave(rank)
    return masks[tokens, rank]


_MASKS = WeakIdKeyDictionary()  # by index: all layers of a call share their masks


def _add(y: torch.Tensor, x: torch.Tensor, stack: Stack, index: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """y += scale * the updates of x, in place; returns x A^T, ``[tokens, G * r]`` (short rows) or ``[rows, S, r]``."""
    dtype = stack.down.dtype
    if gpu.can_run(x, stack.down):
        return gpu.add_low_rank_(y, in_dtype(dtype, x), stack.down, stack.up, scale, index)
    if _is_short(x, stack):
        hidden = in_dtype(dtype, x).reshape(-1, x.shape[-1]) @ stack.down.flatten(0, 1).t()
        hidden.masked_fill_(_others(x, stack, index), 0)
        flat = y.view(-1, y.shape[-1])
        up = stack.up.flatten(0, 1)
        flat.addmm_(hidden, up, alpha=scale) if y.dtype == dtype else flat.add_(hidden @ up, alpha=scale)
        return hidden
    rows = y.view(len(index), -1, y.shape[-1])
    hidden = torch.bmm(in_dtype(dtype, x).reshape(len(index), -1, x.shape[-1]), stack.down[index].mT)
    up = stack.up[index]
    rows.baddbmm_(hidden, up, alpha=scale) if y.dtype == dtype else rows.add_(torch.bmm(hidden, up), alpha=scale)
    return hidden


class GroupedLowRank(Function):
    """A given y, which is changed in place, plus the update of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        index: torch.Tensor,
        drop: tuple[float, int] | None,
    ) -> torch.Tensor:
        ctx.mark_dirty(y)
        ctx.scale, ctx.drop = 1.0 if drop is None else 1 / (1 - drop[0]), drop
        inner = x if drop is None else Dropped(*drop).copy(x)
        hidden = _add(y, inner, Stack(down, up), index, ctx.scale)
        ctx.shape = x.shape
        ctx.kept, tensor = kept(x, down.requires_grad)
        ctx.save_for_backward(tensor, down, up, index, hidden if up.requires_grad else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        saved, down, up, index, hidden = ctx.saved_tensors
        needs_x, _, needs_down, needs_up, *_ = ctx.needs_input_grad
        with no_autocast(gradient):
            dtype = down.dtype
            dy = in_dtype(dtype, gradient.contiguous())
            dx = torch.zeros(ctx.shape, dtype=gradient.dtype, device=gradient.device)
            turned = Stack(up, down)  # dx = s dy B A: the same with the factors in each other's place
            dh = _add(dx, dy, turned, index, ctx.scale)
            drop = None if ctx.drop is None else Dropped(*ctx.drop)
            if needs_x and drop is not None:
                drop.zero_(dx)
            d_down = d_up = None
            if needs_down:
                x = ctx.kept.get(saved)
                x = in_dtype(dtype, x if drop is None else drop.copy(x))
                d_down = _outer(dh, x, turned, index, ctx.scale)
            if needs_up:
                d_up = _outer(hidden, dy, turned, index, ctx.scale)
        return dx if needs_x else None, gradient, d_down, d_up, None, None


def _outer(h: torch.Tensor, v: torch.Tensor, stack: Stack, index: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * h^T v for each update: ``[G, r, features of v]``."""
    groups, rank = stack.down.shape[:2]
    if h.dim() == 2:
        return (h.t() @ v.reshape(len(h), -1)).mul_(scale).unflatten(0, (groups, rank))
    parts = torch.bmm(h.mT, v.reshape(len(index), -1, v.shape[-1]))
    return parts.new_zeros(groups, rank, v.shape[-1]).index_add_(0, index, parts, alpha=scale)
