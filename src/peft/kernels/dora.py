"""Linear layer with a low-rank update and new row norms: y = g (W x + s B A x) + b, g = m / |W + s B A|.

The norms come from the factors and one product with W: |W + s B A|^2 = |W|^2 + 2 s B . (W A^T) + s^2 B (A A^T) . B,
row by row. They are constants for the gradient (arXiv 2402.09353, section 4.3). The gradient of m needs the product
before its scale, which the output gives back; narrow layers multiply once more instead of keeping it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function

from peft.kernels.dropout import Dropped, draw_seed
from peft.kernels.few import is_few
from peft.kernels.linear import Factors, in_dtype, no_autocast, product_dtype, shaped_as
from peft.kernels.products import accumulate, plus_product, product
from peft.kernels.remake import kept


NARROW = 3  # a layer with so many times more inputs than outputs computes its product again


def adapted_norm(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """Row norms of ``W + scale * B A``, ``[out]``, without making that matrix.

    Args:
        weight: W ``[out, in]``, of any floating-point dtype. down, up: A ``[r, in]`` and B ``[out, r]``.
    """
    dtype = torch.promote_types(up.dtype, torch.float32)
    wide, a, b = (in_dtype(dtype, t) for t in (weight, down, up))
    squares = torch.linalg.vector_norm(wide, dim=1).square()
    cross = (b * product(wide, a.t())).sum(1)
    own = (b * (b @ (a @ a.t()))).sum(1)
    return (squares + 2 * scale * cross + scale**2 * own).clamp_min(0).sqrt().to(up.dtype)


def summed_norm(weight: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Row norms of ``W + dW``, ``[out]``, both ``[out, in, *kernel]``."""
    return (weight + change).flatten(1).norm(dim=1)


def dora_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, factors: Factors, magnitude: torch.Tensor
) -> torch.Tensor:
    """The output ``[..., out]`` of a frozen linear layer with DoRA, in the dtype of x.

    With dropout, y = W x + b + (g - 1) W drop(x) + g s B A drop(x): W takes no part in the dropout as long as g = 1.

    Args:
        x: ``[..., in]``, in the dtype of ``weight``. magnitude: m ``[out]``.
    """
    if is_few(x, bool(factors.dropout)) and {t.dtype for t in (factors.down, factors.up, magnitude)} == {x.dtype}:
        return composed(x, weight, bias, factors, magnitude)
    given = x, weight, bias, factors.down, factors.up, magnitude, factors.scale
    with no_autocast(x):
        if factors.dropout:
            return DroppedDoraLinear.apply(*given, (factors.dropout, draw_seed()))
        return DoraLinear.apply(*given)


def composed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, f: Factors, magnitude: torch.Tensor
) -> torch.Tensor:
    """The same in plain operations, with all tensors of one dtype."""
    with torch.no_grad():
        norm = adapted_norm(weight, f.down, f.up, f.scale)
    rows = x.reshape(-1, x.shape[-1])
    inner = F.dropout(rows, f.dropout) if f.dropout else rows
    y = F.linear(inner, weight)
    own = torch.addmm(y, F.linear(inner, f.down), f.up.t(), alpha=f.scale) * (magnitude / norm)
    if f.dropout:
        own = own + (F.linear(rows, weight, bias) - y)
    elif bias is not None:
        own = own + bias
    return shaped_as(x, own)


class DoraLinear(Function):
    """See :func:`dora_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        magnitude: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        norm = adapted_norm(weight, down, up, scale)
        y, hidden = _product(x, weight, down, up, scale)
        y.mul_(magnitude / norm)
        if bias is not None:
            y.add_(bias)
        y = shaped_as(x, y)
        recomputes = len(weight) * NARROW <= weight.shape[1]
        ctx.scale, ctx.shape = scale, x.shape
        ctx.kept, tensor = kept(x, down.requires_grad or recomputes)
        output = y if magnitude.requires_grad and not recomputes else None
        ctx.save_for_backward(tensor, weight, bias, down, up, magnitude, norm, hidden, output)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        with no_autocast(gradient):
            return _backward(ctx, gradient)


class DroppedDoraLinear(Function):
    """See :func:`dora_linear`. The backward pass multiplies by W once more, so as to keep nothing as large as y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        magnitude: torch.Tensor,
        scale: float,
        drop: tuple[float, int],
    ) -> torch.Tensor:
        norm, rows, left = adapted_norm(weight, down, up, scale), x.reshape(-1, x.shape[-1]), 1 / (1 - drop[0])
        factor, dropping = magnitude / norm, Dropped(*drop)
        dropped = dropping.copy(rows)
        y = product(rows, weight.t(), bias=bias)
        y.addcmul_(product(dropped, weight.t()), in_dtype(y.dtype, (factor - 1) * left))
        dtype = product_dtype(y)
        hidden = product(in_dtype(dtype, dropped), in_dtype(dtype, down).t())
        accumulate(y, hidden, in_dtype(dtype, up * factor[:, None]).t(), scale * left)
        ctx.scale, ctx.drop, ctx.shape = scale, drop, x.shape
        ctx.kept, tensor = kept(x)
        ctx.save_for_backward(tensor, weight, down, up, magnitude, norm, hidden, dropping.few())
        return shaped_as(x, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        with no_autocast(gradient):
            return _dropped_backward(ctx, gradient)


def _dropped_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved, weight, down, up, magnitude, norm, hidden, places = ctx.saved_tensors
    needs_x, _, _, needs_down, needs_up, needs_magnitude, *_ = ctx.needs_input_grad
    left, factor = 1 / (1 - ctx.drop[0]), magnitude / norm
    dy, dtype = gradient.reshape(-1, gradient.shape[-1]), product_dtype(gradient)
    drop = Dropped(ctx.drop[0], ctx.drop[1], places)
    dropped = drop.copy(ctx.kept.get(saved).reshape(-1, ctx.shape[-1]))
    dz = in_dtype(dtype, dy * in_dtype(dy.dtype, factor * left))
    dh = product(dz, in_dtype(dtype, up), ctx.scale)
    dx = d_down = d_up = d_magnitude = None
    if needs_magnitude:
        before = _product(dropped, weight, down, up, ctx.scale)[0]
        d_magnitude = before.mul_(dy).sum(0, dtype=magnitude.dtype) * left / norm
    if needs_down:
        d_down = in_dtype(down.dtype, product(dh.t(), in_dtype(dtype, dropped)))
    if needs_up:
        d_up = in_dtype(up.dtype, product(hidden.t(), dz, ctx.scale).t())
    if needs_x:
        part = product(dy * in_dtype(dy.dtype, (factor - 1) * left), weight)
        part = drop.zero_(accumulate(part, dh, in_dtype(dtype, down), 1.0))
        dx = plus_product(part, dy, weight).view(ctx.shape)
    return dx, None, None, d_down, d_up, d_magnitude, None, None


def _product(
    x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """W x + s B A x, ``[n, out]``, and A x, ``[n, r]``."""
    rows = x.reshape(-1, x.shape[-1])
    y = product(rows, weight.t())
    dtype = product_dtype(y)
    hidden = product(in_dtype(dtype, rows), in_dtype(dtype, down).t())
    return accumulate(y, hidden, in_dtype(dtype, up).t(), scale), hidden


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved, weight, bias, down, up, magnitude, norm, hidden, output = tensors = ctx.saved_tensors  # once: it unpacks
    needs_x, _, _, needs_down, needs_up, needs_magnitude, _ = ctx.needs_input_grad
    x = None if ctx.kept is None else ctx.kept.get(saved)
    dy, factor = gradient.reshape(-1, gradient.shape[-1]), magnitude / norm
    d_magnitude = _magnitude_gradient(tensors, ctx.scale, x, dy, factor) if needs_magnitude else None
    dz = dy * in_dtype(dy.dtype, factor)
    dx = product(dz, weight) if needs_x else None
    dtype = product_dtype(dz)
    wide = in_dtype(dtype, dz)
    dh = product(wide, in_dtype(dtype, up), ctx.scale)
    d_down = d_up = None
    if dx is not None:
        dx = accumulate(dx, dh, in_dtype(dtype, down), 1.0).view(ctx.shape)
    if needs_down:
        assert x is not None
        d_down = in_dtype(down.dtype, product(dh.t(), in_dtype(dtype, x.reshape(-1, x.shape[-1]))))
    if needs_up:
        d_up = in_dtype(up.dtype, product(hidden.t(), wide, ctx.scale).t())
    return dx, None, None, d_down, d_up, d_magnitude, None


def _magnitude_gradient(
    saved: tuple[Any, ...], scale: float, x: torch.Tensor | None, dy: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """The sum over tokens of dy times the product before its scale, over the norm."""
    _, weight, bias, down, up, magnitude, norm, _, output = saved
    dtype = magnitude.dtype
    if output is None:
        total = (dy * _product(x, weight, down, up, scale)[0]).sum(0, dtype=dtype)
        return total / norm
    total = (dy * output.view_as(dy)).sum(0, dtype=dtype)
    if bias is not None:
        total = total - bias * dy.sum(0, dtype=dtype)
    total = total / factor
    gone = factor == 0
    if gone.any():  # these outputs are their bias and tell nothing of the product
        rows = gone.nonzero().squeeze(1)
        x = x if x is not None else _missing()
        before = _product(x, weight[rows], down, up[rows], scale)[0]
        total[rows] = (dy[:, rows] * before).sum(0, dtype=dtype)
    return total / norm


def _missing() -> torch.Tensor:
    raise RuntimeError(
        "the gradient of a DoRA magnitude that is zero needs the layer's input, which is not kept while lora_A is "
        "frozen. Train lora_A as well, or compute within `with peft.kernels.plain():`."
    )
