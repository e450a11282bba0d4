"""A batch whose rows have different low-rank updates: y_i = W x_i + b + s_g B_g A_g drop(x_i), g the update of row i.

Where updates train, and on GPUs, the factors of all are stacked, lower ranks filled up with zeros, and each layer does
one batched product with the stack. Short rows are put together by their updates; for long rows, which cost more to
move, the factors of each are gathered instead. On CPUs without gradients the rows of each update are multiplied by its
own factors: no stack is made, and none is kept, which could not see what is written to ``parameter.data``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.weak import WeakIdKeyDictionary

from peft.kernels import gpu
from peft.kernels.dropout import Dropped, draw_seed
from peft.kernels.linear import Factors, base_output, in_dtype, is_eager, no_autocast, product_dtype
from peft.kernels.products import accumulate
from peft.kernels.remake import kept


SHORT = 8  # tokens of a row


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
    base: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    factors: Sequence[Factors | None],
    weight: torch.Tensor | None = None,
    fresh: bool = False,
) -> torch.Tensor:
    """The output of ``base``, each row with its own update.

    Args:
        base, weight, fresh: as in :func:`peft.kernels.linear.low_rank_linear`.
        x: ``[rows, ..., in]``. index: the update of each row, ``[rows]``, integers below ``len(factors)``.
        factors: the updates; None for rows that have none. All have the same rate of dropout.
    """
    rate = next(f.dropout for f in factors if f is not None)
    y = base_output(base, x, weight, fresh)
    with no_autocast(x):
        dtype, drop = product_dtype(y), (rate, draw_seed()) if rate else None
        trains = torch.is_grad_enabled() and (x.requires_grad or any(f is not None and f.trains for f in factors))
        if trains or not x.is_cpu:
            stack = _stack(factors, dtype)
            if trains:
                return GroupedLowRank.apply(x, y, stack.down, stack.up, index, drop)
        x = x if drop is None else Dropped(*drop).copy(x)
        if x.is_cpu:
            _add_each(y, in_dtype(dtype, x), factors, index)
        else:
            _add(y, x, stack, index)
    return y


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


@dataclass(slots=True)
class _Places:
    """Where rows stand when they are put together by their updates, as many places for each as the largest needs.

    Attributes:
        most: the places of an update. slots: the place of each row ``[rows]``; None where the rows stand so already.
        rows: the row at each place, any where none is. empty: those places.
    """

    most: int
    slots: torch.Tensor | None
    rows: torch.Tensor
    empty: torch.Tensor

    @classmethod
    def of(cls, index: torch.Tensor, groups: int) -> _Places:
        counts = index.bincount(minlength=groups)
        most, order = int(counts.max()), index.argsort(stable=True)
        own, count = index[order], torch.arange(len(index), device=index.device)
        filled = own * most + count - (counts.cumsum(0) - counts)[own]
        rows, slots = index.new_full((groups * most,), -1), torch.empty_like(index)
        rows[filled], slots[order] = order, filled
        stand = len(index) == len(rows) and torch.equal(slots, count)
        return cls(most, None if stand else slots, rows.clamp(min=0), (rows < 0).nonzero().flatten())

    def put(self, given: torch.Tensor, groups: int) -> torch.Tensor:
        """``[rows, S, f]`` as ``[G, most * S, f]``, zeros where no row stands."""
        if self.slots is not None:
            given = given.index_select(0, self.rows)
            if len(self.empty):
                given.index_fill_(0, self.empty, 0)
        return given.reshape(groups, -1, given.shape[-1])

    def take(self, placed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse, with the shape of ``like``."""
        placed = placed.view(-1, *like.shape[1:])
        return placed if self.slots is None else placed.index_select(0, self.slots)


def _places(rows: torch.Tensor, stack: Stack, index: torch.Tensor) -> _Places | None:
    """How to put rows ``[rows, S, f]`` together; None where that would move more numbers than gathering factors."""
    groups, rank = stack.down.shape[:2]
    known = _PLACES.setdefault(index, {})
    places = known.get(groups) or known.setdefault(groups, _Places.of(index, groups))
    return places if groups * places.most * rows.shape[1] <= len(rows) * rank else None


_PLACES = WeakIdKeyDictionary()  # by index: all layers of a call share their places


class _Runs(NamedTuple):
    """Neighbouring rows with one update: of the batch as it is, or of ``rows`` of it, put together by their updates.

    Attributes:
        updates: the update of each run. sizes: its number of rows. rows: None for the batch as it is.
    """

    updates: list[int]
    sizes: list[int]
    rows: torch.Tensor | None

    @classmethod
    def of(cls, index: torch.Tensor, there: Sequence[bool], together: bool) -> _Runs:
        """Of all rows, or together those whose update is there."""
        of_row, rows = index.tolist(), None
        if together:
            places = sorted((i for i, g in enumerate(of_row) if there[g]), key=of_row.__getitem__)
            rows, of_row = index.new_tensor(places), [of_row[i] for i in places]
        runs = [(g, len(list(run))) for g, run in itertools.groupby(of_row)]
        return cls([g for g, _ in runs], [size for _, size in runs], rows)


def _add_each(y: torch.Tensor, x: torch.Tensor, factors: Sequence[Factors | None], index: torch.Tensor) -> None:
    """y += the updates of x, in place, by the factors as they are."""
    dtype, each = x.dtype, x.numel() // max(len(index) * x.shape[-1], 1)
    there = tuple(f is not None for f in factors)
    key = there, each < SHORT  # then moving rows takes less time than more calls
    known = _PLACES.setdefault(index, {})
    updates, sizes, chosen = known.get(key) or known.setdefault(key, _Runs.of(index, *key))
    flat, rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if chosen is not None:
        flat = x.reshape(len(index), -1).index_select(0, chosen).view(-1, x.shape[-1])
        rows = y.new_zeros(len(flat), y.shape[-1])
    counts = [size * each for size in sizes]
    for g, own, target in zip(updates, flat.split(counts), rows.split(counts)):
        f = factors[g]
        if f is not None:
            hidden = F.linear(own, in_dtype(dtype, f.down))
            accumulate(target, hidden, in_dtype(dtype, f.up).t(), f.scale)
    if chosen is not None:
        y.view(len(index), -1).index_add_(0, chosen, rows.view(len(chosen), -1))


def _add(y: torch.Tensor, x: torch.Tensor, stack: Stack, index: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """y += scale * the updates of x, in place; returns x A^T, ``[rows, S, r]``, or ``[G, n, r]`` by update."""
    dtype = stack.down.dtype
    if gpu.can_run(x, stack.down):
        return gpu.add_low_rank_(y, in_dtype(dtype, x), stack.down, stack.up, scale, index)
    x = in_dtype(dtype, x).reshape(len(index), -1, x.shape[-1])
    rows, places = y.view(len(index), -1, y.shape[-1]), _places(x, stack, index)
    down, up = (stack.down, stack.up) if places else (stack.down[index], stack.up[index])
    hidden = torch.bmm(places.put(x, len(down)) if places else x, down.mT)
    if places is not None and places.slots is not None:
        rows.add_(places.take(torch.bmm(hidden, up), rows), alpha=scale)
        return hidden
    rows = rows.view(len(hidden), -1, y.shape[-1])
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
    v = v.reshape(len(index), -1, v.shape[-1])
    places = None if gpu.can_run(v, stack.down) else _places(v, stack, index)
    if places:
        return torch.bmm(h.mT, places.put(v, len(stack.down))).mul_(scale)
    parts = torch.bmm(h.mT, v)
    return parts.new_zeros(len(stack.down), h.shape[-1], v.shape[-1]).index_add_(0, index, parts, alpha=scale)
