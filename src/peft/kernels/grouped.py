"""A batch whose rows have different low-rank updates: y_i = W x_i + b + s_g B_g A_g drop(x_i), g the update of row i.

Without gradients the rows of each update are multiplied by its own factors, where they stand if they are a slice of
the batch, or long. In training, and on GPUs, the factors of all are stacked, lower ranks filled up with zeros, and
each layer does one batched product with the stack: short rows are put together by their updates; for long rows, which
cost more to move, the factors of each are gathered instead.
No stack outlives its call, as nothing tells what is written to ``parameter.data``; but those of layers whose adapters
belong to a pool are kept until it puts others in their place.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from peft.kernels import gpu
from peft.kernels.dropout import Dropped, draw_seed
from peft.kernels.linear import Factors, base_output, in_dtype, is_eager, no_autocast, product_dtype
from peft.kernels.products import accumulate
from peft.kernels.remake import kept


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
    owner: nn.Module | None,
    base: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    factors: Sequence[Factors | None],
    weight: torch.Tensor | None = None,
    fresh: bool = False,
) -> torch.Tensor:
    """The output of ``base``, each row with its own update.

    Args:
        owner: the layer for which the stack is kept, if it is.
        base, weight, fresh: as in :func:`peft.kernels.linear.low_rank_linear`.
        x: ``[rows, ..., in]``. index: the update of each row, ``[rows]``, integers below ``len(factors)``.
        factors: the updates; None for rows that have none. All have the same rate of dropout.
    """
    rate = next(f.dropout for f in factors if f is not None)
    drop = (rate, draw_seed()) if rate else None
    if owner is None and x.is_cpu and not torch.is_grad_enabled():
        return _each(base, x, index, factors, weight, fresh, drop)
    y = base_output(base, x, weight, fresh)
    with no_autocast(x):
        stack = stacked(owner, factors, product_dtype(y))
        if torch.is_grad_enabled() and (x.requires_grad or stack.down.requires_grad or stack.up.requires_grad):
            return GroupedLowRank.apply(x, y, stack.down, stack.up, index, drop)
        _add(y, x if drop is None else Dropped(*drop).copy(x), stack, index, 1 / (1 - rate))
    return y


def _each(
    base: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    factors: Sequence[Factors | None],
    weight: torch.Tensor | None,
    fresh: bool,
    drop: tuple[float, int] | None,
) -> torch.Tensor:
    """The output by the factors as they are, rows put together by their updates only where that is less work."""
    order, back, pieces = _pieces(x, index)
    # A base that may be passed by computes each row alone; others, with hooks, see the batch as it is.
    inner = x if order is None else x.index_select(0, order)
    y = base_output(base, x if weight is None else inner, weight, fresh)
    if order is not None and weight is None:
        y = y.index_select(0, order)
    with no_autocast(x):
        dtype, rows = product_dtype(y), y.view(-1, y.shape[-1])
        if drop is not None:
            inner = Dropped(*drop).copy(x)
            inner = inner if order is None else inner.index_select(0, order)
        inner = in_dtype(dtype, inner).reshape(-1, x.shape[-1])
        for group, where in pieces:
            if (f := factors[group]) is None:
                continue
            down, up, scale = f.down, f.up, f.scale / (1 - f.dropout)
            if down.dtype is up.dtype is y.dtype is dtype:  # as below, in fewer calls
                rows[where].addmm_(F.linear(inner[where], down), up.t(), alpha=scale)
            else:
                hidden = F.linear(inner[where], in_dtype(dtype, down))
                accumulate(rows[where], hidden, in_dtype(dtype, up).t(), scale)
    return y if back is None else y.index_select(0, back)


LONG = 2**13  # entries of a row, from which on products for each row take less time than moving rows does
_Pieces = tuple[torch.Tensor | None, torch.Tensor | None, list[tuple[int, slice]]]


def _pieces(x: torch.Tensor, index: torch.Tensor) -> _Pieces:
    """An order of the rows of x, its inverse, and updates with slices of the ``[rows * tokens, in]`` in that order.

    Rows stay where they are (None) if those of each update are one slice, or are so long that several cost less.
    """
    tokens, long = x.shape[1:-1].numel(), x.numel() >= LONG * len(index)
    known, key = _found_of(index), (tokens, long)
    if key not in known:
        places: dict[int, list[int]] = {}
        for row, group in enumerate(index.tolist()):
            places.setdefault(group, []).append(row)
        found = [(group, where) for group, rows in places.items() for where in _slices(rows, tokens)]
        order = back = None
        if len(found) > len(places) and not long:
            order = torch.tensor([row for rows in places.values() for row in rows])
            back, ends = order.argsort(), [tokens * n for n in itertools.accumulate(map(len, places.values()))]
            found = [(group, slice(*own)) for group, own in zip(places, itertools.pairwise([0, *ends]))]
        known[key] = order, back, found
    return known[key]


def _slices(rows: list[int], tokens: int) -> Iterator[slice]:
    """Ascending rows of a batch, of so many tokens each, as slices of all tokens; those of one token with steps."""
    while rows:
        step = rows[1] - rows[0] if tokens == 1 and len(rows) > 1 else 1
        count = next((n for n, row in enumerate(rows) if row != rows[0] + n * step), len(rows))
        yield slice(rows[0] * tokens, (rows[0] + (count - 1) * step + 1) * tokens, step)
        rows = rows[count:]


def _found_of(index: torch.Tensor) -> dict[Any, Any]:
    """What was worked out of an index, which all layers of a call share: it lives as long as that."""
    return index.__dict__.setdefault("worked_out", {})


def stacked(owner: nn.Module | None, factors: Sequence[Factors | None], dtype: torch.dtype) -> Stack:
    """The stack of these updates: the one that is kept for ``owner``, if it still holds."""
    if owner is None:
        return _stack(factors, dtype)
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
    like, rank = found[0], max(f.down.shape[0] for f in found)
    nothing: Any = None
    if len(found) < len(factors):
        nothing = like.down.new_zeros(rank, like.down.shape[1]), like.up.new_zeros(like.up.shape[0], rank)
    pairs = [nothing if f is None else (f.down, f.up) for f in factors]
    if any(len(down) < rank for down, _ in pairs):
        short = [rank - len(down) for down, _ in pairs]
        pairs = [(F.pad(a, (0, 0, 0, n)), F.pad(b, (0, n))) if n else (a, b) for (a, b), n in zip(pairs, short)]
    down = torch.stack([in_dtype(dtype, a) for a, _ in pairs])
    up = torch.stack([in_dtype(dtype, b) for _, b in pairs])
    scales = [1.0 if f is None else f.scale for f in factors]
    if any(scale != 1 for scale in scales):
        up = up * torch.tensor(scales, dtype=dtype, device=up.device)[:, None, None]
    return Stack(down, up.mT if up.is_cpu else up.mT.contiguous())  # as the kernel for GPUs reads it


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
    known = _found_of(index)
    places = known.get(groups) or known.setdefault(groups, _Places.of(index, groups))
    return places if groups * places.most * rows.shape[1] <= len(rows) * rank else None


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
