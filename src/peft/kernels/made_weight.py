"""W x with a W that is made for the occasion: not kept for the backward pass, but made again there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from peft.kernels.autocast import is_autocast
from peft.kernels.linear import is_transformed
from peft.kernels.remake import kept, remade


def made_product(
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    gradients: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None]],
    x: torch.Tensor,
    make: Callable[[], torch.Tensor],
    parameters: Sequence[torch.Tensor],
) -> torch.Tensor:
    """``multiply(x, make())``, keeping x and the parameters alone for the backward pass.

    Unlike a checkpoint, the backward pass does not multiply by W once more to no end.

    Args:
        gradients: ``gradients(x, W, gradient of the product, (x's is wanted, W's is wanted))``.
        make: W, ``[out, in, *kernel]``; it must give the same one when called again.
        parameters: the tensors from which ``make`` computes it and which may need a gradient.
    """
    if torch.compiler.is_compiling() or is_transformed() or is_autocast(x.device.type):
        return remade(lambda x: multiply(x, make()), x)
    trained = [p for p in parameters if p.requires_grad]
    return _Product.apply(multiply, gradients, make, x, *trained)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, multiply: Callable, gradients: Callable, make: Callable, x: torch.Tensor, *trained: Any
    ) -> torch.Tensor:
        ctx.gradients, ctx.make = gradients, make
        ctx.kept, tensor = kept(x)
        ctx.save_for_backward(tensor, *trained)
        return multiply(x, make())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        saved, *trained = ctx.saved_tensors
        x = ctx.kept.get(saved)
        with torch.set_grad_enabled(bool(trained)):
            weight = ctx.make()
        follows = weight.requires_grad  # the base weight alone does not
        of_x, of_weight = ctx.gradients(x, weight.detach(), gradient, (ctx.needs_input_grad[3], follows))
        of_trained: tuple[torch.Tensor | None, ...] = (None,) * len(trained)
        if follows:
            of_trained = torch.autograd.grad(weight, trained, of_weight, allow_unused=True)
        return None, None, None, of_x, *of_trained
