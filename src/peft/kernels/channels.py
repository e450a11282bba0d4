"""Scales of channels, and maps of pairs of channels, whose gradients are had from what they give.

y' = c y of a layer's output y needs y for the gradient of c: sum(dy' y). What reads y' (an attention, a gate) often
keeps it, and nobody else keeps y, so y' is kept here too, the same memory: sum(dy' y') / c. The same for pairs of
channels, by the inverse of their 2 x 2 matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from peft.kernels.few import device_of
from peft.kernels.linear import Direct, is_eager
from peft.kernels.remake import recipe_of, unchanged


SMALL = 2.0**-6
"""Scales that are smaller than this cannot be divided by: 16-bit numbers would have been rounded too much."""

LARGE = 2**19
"""Numbers of an output from which on it is worth a node in Python that keeps nothing of it: half of a million."""

Pieces = tuple[torch.Tensor, torch.Tensor]


def mixed_by_output(
    y: torch.Tensor,
    x: torch.Tensor,
    layer: Callable[[torch.Tensor], torch.Tensor],
    c: torch.Tensor,
    s: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """c y along the last axis, of which autograd keeps one tensor: the result, or y. None where that gains nothing.

    With ``s`` it is c y + s rot(y), rot(y) = (-y_2, y_1) for the halves of each group.

    Args:
        y: the output of a frozen layer, ``[..., out]``, which may be changed in place. x: its input.
        layer: gives y again, should the result be changed in place.
        c, s: ``[out]``; in pairs ``[groups, 2, half of a group]``, or 1 in the place of 2 for both alike.
    """
    trains = torch.is_grad_enabled() and (c.requires_grad or (s is not None and s.requires_grad))
    if not trains or c.dtype != y.dtype or not is_eager(y):
        return None
    again = None
    # other devices would have to wait for the check of c
    if y.numel() >= LARGE and device_of(y) == "cpu" and (y.is_meta or _divides(c, s)):
        again = recipe_of(x)
    if again is None:
        return None if s is None else Mixed.of(y, c, s, None)
    return Mixed.of(y, c, s, lambda: layer(again()))


def _divides(c: torch.Tensor, s: torch.Tensor | None) -> bool:
    norm = torch.linalg.vector_norm  # the largest and the smallest magnitude in one operation each
    with torch.no_grad():
        if s is None:
            return float(norm(c, -math.inf)) > SMALL
        largest = max(1.0, float(norm(c, math.inf)), float(norm(s, math.inf)))
        return float(norm(_determinant(c, s), -math.inf)) > SMALL * largest**2


def _determinant(c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    (c1, c2), (s1, s2) = _each(c), _each(s)
    return torch.addcmul(c1 * c2, s1, s2)


def _each(c: torch.Tensor) -> Pieces:
    """What the first and the second half of each group are multiplied by, ``[groups, half]``."""
    return c[:, 0], c[:, -1]


def _pairs(y: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return y.unflatten(-1, (len(c), 2, c.shape[-1]))  # [..., group, 2, half]


def _mixed(y: torch.Tensor, c: torch.Tensor, s: torch.Tensor, back: bool = False) -> torch.Tensor:
    """c y + s rot(y) of pairs, or its transpose, c y - rot(s y)."""
    mixed, (first, second), (s1, s2) = y * c, y.unbind(-2), _each(s)
    to_first, to_second = mixed[..., 0, :], mixed[..., 1, :]  # in place, which unbind forbids to autograd
    to_first.addcmul_(second, s2 if back else s1, value=1 if back else -1)
    to_second.addcmul_(first, s1 if back else s2, value=-1 if back else 1)
    return mixed


class Mixed(Direct):
    """See :func:`mixed_by_output`. ``again`` makes y where the result is kept; with None y is."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, c: torch.Tensor, s: torch.Tensor | None, again: Callable | None
    ) -> torch.Tensor:
        if s is None:
            ctx.mark_dirty(y)
            result = y.mul_(c)
        else:
            result = torch.ops.aten._unsafe_view(_mixed(_pairs(y, c), c, s), y.shape)
        ctx.again = again
        # apart from the result, which may be changed by whom it is given: then the rest is needed nevertheless
        ctx.scales = [(t, t._version) for t in (c, s) if t is not None]
        ctx.save_for_backward(y if again is None else result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        c, *rest = (unchanged(t, version) for t, version in ctx.scales)
        of_result = ctx.again is not None
        try:
            (kept,) = ctx.saved_tensors
        except RuntimeError:  # changed in place, as by an activation
            if torch.is_grad_enabled() or not of_result:
                raise
            kept, of_result = ctx.again(), False
        if not rest:
            dc = (gradient * kept).sum_to_size(c.shape)
            return gradient * c, dc / c if of_result else dc, None, None
        g, kept, (s,) = _pairs(gradient, c), _pairs(kept, c), rest
        return _mixed(g, c, s, back=True).view_as(gradient), *_of_pairs(g, kept, c, s, of_result), None


def _of_pairs(
    g: torch.Tensor, kept: torch.Tensor, c: torch.Tensor, s: torch.Tensor, of_result: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of c and s from y, or from y': det y_1 = c_2 y'_1 + s_1 y'_2 and det y_2 = c_1 y'_2 - s_2 y'_1."""
    (g1, g2), (k1, k2) = g.unbind(-2), kept.unbind(-2)
    p11, p22 = (g * kept).sum_to_size(g.shape[-3:]).unbind(-2)
    p12, p21 = ((a * b).sum_to_size(g1.shape[-2:]) for a, b in ((g1, k2), (g2, k1)))
    if of_result:
        (c1, c2), (s1, s2), det = _each(c), _each(s), _determinant(c, s)
        p11, p12 = (c2 * p11 + s1 * p12) / det, (c1 * p12 - s2 * p11) / det
        p22, p21 = (c1 * p22 - s2 * p21) / det, (c2 * p21 + s1 * p22) / det
    of_c, of_s = torch.stack((p11, p22), -2), torch.stack((-p12, p21), -2)
    return of_c.sum_to_size(c.shape), of_s.sum_to_size(s.shape)
