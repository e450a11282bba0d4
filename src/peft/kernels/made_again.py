"""Small computations whose results autograd does not keep, but makes again: the matrices that a method multiplies by.

``B diag(d)`` is as large as B, and cheap beside the product that it is for. Autograd keeps it nevertheless, for that
product's backward pass. Here it keeps d, and what B is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from peft.kernels.autocast import is_autocast
from peft.kernels.few import is_few, is_small
from peft.kernels.linear import NO_CONTEXT, Direct, is_eager
from peft.kernels.remake import DEPTH, is_recomputed, recomputed
from peft.kernels.strict import is_plain


Make = Callable[..., torch.Tensor]


def made_again(make: Make, *tensors: torch.Tensor, entries: int) -> torch.Tensor:
    """``make(*tensors)``, of which autograd keeps the tensors alone: what is between is computed again.

    The result too is made again by operations that use it within :func:`peft.kernels.remake.recomputed`.

    Args:
        make: it must give the same when called again, and a tensor of its own: no view of what it is given.
        entries: of the result. Few are kept, whatever they are made of.
    """
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not trains or not all(is_eager(t) for t in tensors) or is_small(entries):
        return make(*tensors)
    if is_plain() or is_recomputed():
        return make(*tensors)
    return make(*tensors) if is_autocast(tensors[0].device.type) else MadeAgain.of(make, *tensors)


def reading(x: torch.Tensor) -> AbstractContextManager[None]:
    """A context for an operation that reads x: autograd keeps no x for it that x's own graph can give back."""
    may = x.requires_grad and torch.is_grad_enabled() and not is_few(x) and is_eager(x) and not is_plain()
    return recomputed() if may else NO_CONTEXT


class Transformable(Direct):
    """A function that transforms of ``torch.func`` know, too: its context is set up apart from its forward."""

    generate_vmap_rule = True  # torch.func.vmap refuses a function without a rule

    @classmethod
    def of(cls, *args: Any) -> Any:
        # apply binds the arguments of such a function by its signature, which takes longer than all else
        return super().of(*args) if is_eager(args[0]) else cls.apply(*args)


class MadeAgain(Direct):
    """``make(*tensors)``; see :func:`made_again`."""

    @staticmethod
    def forward(ctx: Any, make: Make, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.make, ctx.made = make, None
        ctx.save_for_backward(*tensors)
        return make(*tensors)

    @staticmethod
    def recipe(ctx: Any, depth: int) -> Callable[[], torch.Tensor]:
        # an operation on top of it may change what it gets in place, so only the last one is shown the very result
        return lambda: MadeAgain.again(ctx, depth == DEPTH)

    @staticmethod
    def again(ctx: Any, shown: bool) -> torch.Tensor:
        """The result once more. Where it is only ``shown``, its graph stays for the backward pass that follows."""
        if not shown:
            return ctx.make(*ctx.saved_tensors)
        if ctx.made is None:
            ctx.made = _with_graph(ctx)
        return ctx.made[1].detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        twice = torch.is_grad_enabled()  # a gradient of the gradient will be asked for
        inputs, result = _with_graph(ctx) if twice or ctx.made is None else ctx.made
        ctx.made = None
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        found = torch.autograd.grad(
            result, [inputs[i] for i in wanted], gradient, create_graph=twice, allow_unused=True
        )
        grads = dict(zip(wanted, found))
        return None, *(grads.get(i) for i in range(len(inputs)))


def _with_graph(ctx: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Inputs and result. For a second derivative the inputs are the tensors themselves."""
    twice = torch.is_grad_enabled()
    # hooks around a step are for what is kept until the backward pass, and this is used up at once
    unhooked = saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.enable_grad(), nullcontext() if twice else unhooked:
        saved = ctx.saved_tensors
        inputs = [t if twice else t.detach().requires_grad_(t.requires_grad) for t in saved]
        return inputs, ctx.make(*inputs)
