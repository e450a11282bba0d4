"""Low-rank updates of layers that read one input (q, k and v; gate and up): what they share is done once.

The layers read the input through one node of the graph. In the forward pass it multiplies the input by all their A at
once; in the backward pass each layer adds its part of the input's gradient in place to a buffer of that node, and the
node does the products with all A at once. Autograd calls it when every layer that takes part in the loss has run.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from peft.kernels.autocast import is_autocast
from peft.kernels.linear import Direct, Joint, Share, in_dtype, into_gradient, is_eager, product_dtype
from peft.kernels.products import product
from peft.kernels.remake import is_recomputed, kept


def can_join(x: torch.Tensor) -> bool:
    """Whether layers may read this input together: in a plain step, of which autograd keeps what it is told to."""
    return torch.is_grad_enabled() and not is_autocast(x.device.type) and not is_recomputed() and x.is_floating_point()


def join(x: torch.Tensor, downs: Sequence[torch.Tensor]) -> Share | None:
    """The input ``[..., in]`` for several layers, and its products with these A ``[r, in]``; None if none trains."""
    if not is_eager(x) or not (x.requires_grad or any(down.requires_grad for down in downs)):
        return None
    joint = Joint(weakref.ref(x))
    source, *hidden = ReadTogether.of(joint, x, product_dtype(x), *downs)
    return Share(joint, source if x.requires_grad else x, {id(d): (d, h) for d, h in zip(downs, hidden)})


class ReadTogether(Direct):
    """x as it is, and x A^T for each A."""

    @staticmethod
    def forward(
        ctx: Any, joint: Joint, x: torch.Tensor, dtype: torch.dtype, *downs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.joint, ctx.shape, ctx.dtype = joint, x.shape, dtype
        hidden: Sequence[torch.Tensor] = ()
        if downs:
            whole = product(in_dtype(dtype, x.reshape(-1, x.shape[-1])), _stacked(downs, dtype).t())
            hidden = whole.split([len(down) for down in downs], 1)
        ctx.kept, tensor = kept(x, any(down.requires_grad for down in downs))
        ctx.save_for_backward(tensor, *downs)
        return x, *hidden

    @staticmethod
    def backward(ctx: Any, gradient: Any, *of_hidden: Any) -> tuple[torch.Tensor | None, ...]:
        saved, *downs = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        dx = ctx.joint.take()
        if gradient is not None:
            flat = gradient.reshape(-1, ctx.shape[-1])
            dx = flat if dx is None else dx + flat
        grads: list[torch.Tensor | None] = [None] * len(downs)
        there = [i for i, dh in enumerate(of_hidden) if dh is not None]
        if there:
            dh = torch.cat([of_hidden[i] for i in there], 1)
            if needs_x:
                own = gradient is None and not torch.is_grad_enabled()
                dx = dx if dx is None or own else dx.clone()
                dx = into_gradient(dx, dh, _stacked([downs[i] for i in there], ctx.dtype), None, dh.dtype)
            if train := [i for i in there if needs[i]]:
                x = in_dtype(ctx.dtype, ctx.kept.get(saved).reshape(-1, ctx.shape[-1]))
                if len(train) < len(there):
                    dh = torch.cat([of_hidden[i] for i in train], 1)
                for i, part in zip(train, product(dh.t(), x).split([len(downs[i]) for i in train])):
                    grads[i] = in_dtype(downs[i].dtype, part)
        return None, dx.view(ctx.shape) if needs_x and dx is not None else None, None, *grads


def _stacked(downs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return in_dtype(dtype, downs[0] if len(downs) == 1 else torch.cat([in_dtype(dtype, down) for down in downs]))
