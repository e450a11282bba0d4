"""Products with a frozen weight to whose entries a few trained numbers are added.

W + dW is made for either pass and not kept, or not made at all where the tokens are few. The gradient of an entry of
dW is a product of two columns, one of the output's gradient and one of the input: a few of those take less than the
product of the two matrices, most of which would be thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from peft.kernels.few import is_small
from peft.kernels.linear import Direct, fresh_linear, is_eager
from peft.kernels.remake import kept


FEW = 12
"""One entry on its own takes as long as about so many as part of a product of matrices."""


def sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(W + dW) x + b``, ``[..., out]``, in the dtype of all of them.

    Args:
        x: ``[..., in]``. values: entries of dW, ``[n]``; what has one position adds up.
        positions: where they stand in the flattened ``[out, in]``, ``[n]``.
        weight, bias: W ``[out, in]`` and b ``[out]`` (or None), frozen.
    """
    trains = torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)
    if trains and is_eager(x) and not is_small(weight.numel()):
        return SparseLinear.of(x, values, positions, weight, bias)
    return _forward(x, values, positions, weight, bias)


def paired_products(left: torch.Tensor, right: torch.Tensor, to: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """``sum_t left[to_k, t] right[of_k, t]``, ``[n]``, for matrices of contiguous rows; no row is copied.

    Args:
        left, right: ``[a, t]`` and ``[b, t]``, floating point. to, of: numbers of their rows, ``[n]``.
    """
    if left.device.type not in ("cpu", "cuda"):
        return (left[to] * right[of]).sum(1)
    # what the weights in weighted sums of rows get as gradients: `to` says which sum each belongs to
    starts = to.new_zeros(len(left))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, of, starts, to, 0)


def by_feature(x: torch.Tensor) -> torch.Tensor:
    """``[features, tokens]`` of ``[..., features]``."""
    return x.reshape(-1, x.shape[-1]).T.contiguous()


def _forward(
    x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    columns = weight.shape[1]
    if is_small(weight.numel()):  # the fewest calls
        return F.linear(x, with_entries(weight, positions, values), bias)
    if FEW * len(values) * (x.numel() // columns) > weight.numel():
        return fresh_linear(x, with_entries(weight, positions, values), bias)
    update = x.index_select(-1, positions % columns).mul_(values)  # for few tokens, less than a copy of W
    return fresh_linear(x, weight, bias).index_add_(-1, positions // columns, update)


def with_entries(weight: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The weight with values added at these positions of it flattened; what has one position adds up."""
    return weight.flatten().index_add(0, positions, values).view(weight.shape)


class SparseLinear(Direct):
    """See :func:`sparse_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.kept, tensor = kept(x, values.requires_grad)
        ctx.save_for_backward(tensor, values, positions, weight)
        return _forward(x, values, positions, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        saved, values, positions, weight = ctx.saved_tensors
        columns, dx, d_values = weight.shape[1], None, None
        if ctx.needs_input_grad[0]:
            dx = gradient @ with_entries(weight, positions, values)
        if ctx.needs_input_grad[1] and FEW * len(values) < weight.numel():
            left, right = by_feature(gradient), ctx.kept.get(saved, by_feature)
            d_values = paired_products(left, right, positions // columns, positions % columns)
        elif ctx.needs_input_grad[1]:
            x = ctx.kept.get(saved)
            whole = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, columns)
            d_values = whole.flatten().index_select(0, positions)
        return dx, d_values, None, None, None
