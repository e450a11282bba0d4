"""Scales of channels, and maps of pairs of channels, whose gradients are had from what they give.

y' = c y of a layer's output y needs y for the gradient of c: sum(dy' y). What reads y' (an attention, a gate) often
keeps it, and nobody else keeps y, so y' is kept here too, the same memory: sum(dy' y') / c. The same for pairs of
channels, by the inverse of their 2 x 2 matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import Function

from peft.kernels.linear import is_eager
from peft.kernels.remake import recipe_of, unchanged


SMALL = 2.0**-6
"""Scales that are smaller than this cannot be divided by: 16-bit numbers would have been rounded too much."""

Pieces = tuple[torch.Tensor, torch.Tensor]


def mixed_by_output(
    y: torch.Tensor,
    x: torch.Tensor,
    layer: Callable[[torch.Tensor], torch.Tensor],
    c: torch.Tensor,
    s: torch.Tensor | None = None,
    half: int = 0,
) -> torch.Tensor | None:
    """c y along the last axis, of which autograd keeps the result alone; None where y has to be kept.

    With ``s`` it is c y + s rot(y), rot(y) = (-y_2, y_1) for the halves of each group.

    Args:
        y: the output of a frozen layer, ``[..., out]``, which may be changed in place. x: its input.
        layer: gives y again, should the result be changed in place. c, s: ``[out]``. half: of a group.
    """
    trains = torch.is_grad_enabled() and (c.requires_grad or (s is not None and s.requires_grad))
    device = _STANDS_FOR[-1] if y.is_meta else y.device.type
    if not trains or device != "cpu" or c.dtype != y.dtype or not is_eager(y):
        return None  # other devices would have to wait for the check of c
    if not y.is_meta and not _divides(c, s, half):
        return None
    again = recipe_of(x)
    return None if again is None else Mixed.apply(y, c, s, half, lambda: layer(again()))


_STANDS_FOR = ["cpu"]


@contextmanager
def meta_stands_for(device: str) -> Iterator[None]:
    """A context in which tensors on the meta device, whose values nobody knows, are kept as on this type of device."""
    _STANDS_FOR.append(device)
    try:
        yield
    finally:
        _STANDS_FOR.pop()


def _divides(c: torch.Tensor, s: torch.Tensor | None, half: int) -> bool:
    with torch.no_grad():
        if s is None:
            return bool(c.abs().min() > SMALL)
        (c1, c2), (s1, s2) = _halves(c, half), _halves(s, half)
        largest = torch.maximum(torch.maximum(c1.abs(), c2.abs()), torch.maximum(s1.abs(), s2.abs()))
        return bool(((c1 * c2 + s1 * s2).abs() > SMALL * largest.clamp_min(1).square()).all())


def _halves(y: torch.Tensor, half: int) -> Pieces:
    pairs = y.unflatten(-1, (-1, 2, half))  # [..., group, 2, half]
    return pairs[..., 0, :], pairs[..., 1, :]


def _add_rotated(to: torch.Tensor, y: torch.Tensor, s: torch.Tensor, half: int, sign: int) -> torch.Tensor:
    """to + s rot(y), or with the sign -1 its transpose: to - rot(s y); in place."""
    (y1, y2), (s1, s2), (to1, to2) = _halves(y, half), _halves(s, half), _halves(to, half)
    to1.addcmul_(y2, s1 if sign > 0 else s2, value=-sign)
    to2.addcmul_(y1, s2 if sign > 0 else s1, value=sign)
    return to


def _mixed(y: torch.Tensor, c: torch.Tensor, s: torch.Tensor | None, half: int) -> torch.Tensor:
    mixed = y * c
    return mixed if s is None else _add_rotated(mixed, y, s, half, 1)


class Mixed(Function):
    """See :func:`mixed_by_output`."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, c: torch.Tensor, s: torch.Tensor | None, half: int, again: Callable
    ) -> torch.Tensor:
        if s is None:
            ctx.mark_dirty(y)
            result = y.mul_(c)
        else:
            result = _mixed(y, c, s, half)
        ctx.half, ctx.again = half, again
        # apart from the result, which may be changed by whom it is given: then the rest is needed nevertheless
        ctx.scales = [(t, t._version) for t in (c, s) if t is not None]
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        c, *rest = (unchanged(t, version) for t, version in ctx.scales)
        s, half = rest[0] if rest else None, ctx.half
        try:
            (kept,) = ctx.saved_tensors
        except RuntimeError:  # changed in place, as by an activation
            if torch.is_grad_enabled():
                raise
            kept = _mixed(ctx.again(), c, s, half)
        dy = gradient * c
        if s is None:
            return dy, _summed(gradient * kept) / c, None, None, None
        dy = _add_rotated(dy, gradient, s, half, -1)
        return dy, *_of_pairs(gradient, kept, c, s, half), None, None


def _summed(y: torch.Tensor) -> torch.Tensor:
    """Over all tokens."""
    return y.sum_to_size(y.shape[-1:])


def _of_pairs(
    gradient: torch.Tensor, kept: torch.Tensor, c: torch.Tensor, s: torch.Tensor, half: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of c and s: y_1 = (c_2 y'_1 + s_1 y'_2) / det and y_2 = (c_1 y'_2 - s_2 y'_1) / det."""
    (g1, g2), (k1, k2), (c1, c2), (s1, s2) = (_halves(t, half) for t in (gradient, kept, c, s))
    p11, p22 = _halves(_summed(gradient * kept), half)
    p12, p21 = ((g * k).sum_to_size(g1.shape[-2:]) for g, k in ((g1, k2), (g2, k1)))
    det = c1 * c2 + s1 * s2
    of_c = torch.stack(((c2 * p11 + s1 * p12) / det, (c1 * p22 - s2 * p21) / det), -2)
    of_s = torch.stack(((s2 * p11 - c1 * p12) / det, (c2 * p21 + s1 * p22) / det), -2)
    return of_c.flatten(), of_s.flatten()
