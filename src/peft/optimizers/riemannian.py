"""Riemannian preconditioning of LoRA: each factor's step is measured in the metric of the other (arXiv 2402.02347)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peft._lazy import also_known
from peft.optimizers.pairs import damped_inverses, pairs_of, require_whole


@torch.no_grad()
def precondition(pairs: list[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
    """In place: ``g_A <- (B^T B + reg I)^+ g_A``, ``g_B <- g_B (A A^T + reg I)^+``; A ``[r, in]``, B ``[out, r]``."""
    pairs = [(a, b) for a, b in pairs if a.grad is not None or b.grad is not None]
    for factor in (factor for pair in pairs for factor in pair):
        require_whole(factor, "Riemannian preconditioning")
    of_a, of_b = damped_inverses([a for a, _ in pairs], reg), damped_inverses([b.T for _, b in pairs], reg)
    for (a, b), inverse_a, inverse_b in zip(pairs, of_a, of_b):
        if a.grad is not None:
            a.grad.copy_(inverse_b @ a.grad.to(inverse_b.dtype))
        if b.grad is not None:
            b.grad.copy_(b.grad.to(inverse_a.dtype) @ inverse_a)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """``optimizer_cls`` over what trains, with the gradients of LoRA's pairs preconditioned before each step.

    The preconditioners are ``r x r``, so they cost little beside the step (arXiv 2402.02347). Pairs of convolutions
    and embeddings, and all else that trains, are left to ``optimizer_cls``.

    Args:
        model: a model with LoRA.
        optimizer_cls: any optimizer of torch's interface, 8-bit ones of bitsandbytes included.
        lr: its learning rate.
        reg: added to the diagonal of the matrices, for factors of low rank (B starts at zero); 0 or above.
        kwargs: arguments of ``optimizer_cls``.

    Raises:
        ValueError: if no pair trains, or ``reg`` is below 0.

    Examples:
        >>> optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-4, weight_decay=0.01)
        >>> Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    """
    if reg < 0:
        raise ValueError(f"reg should be 0 or above, got {reg}.")
    pairs = [
        (pair.a, pair.b)
        for pair in pairs_of(model)
        if pair.a.requires_grad and pair.b.requires_grad and pair.a.dim() == pair.b.dim() == 2 and not pair.lookup
    ]
    if not pairs:
        raise ValueError(
            f"this {type(model).__name__} has no linear layer in which both factors of an active LoRA adapter train."
        )
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)  # type: ignore[call-arg]

    def before_step(_: Optimizer, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else options.get("closure")  # args[0] is the optimizer
        if closure is None:
            precondition(pairs, reg)
            return None

        @functools.wraps(closure)
        def preconditioned() -> Any:  # the step calls it to have the gradients
            loss = closure()
            precondition(pairs, reg)
            return loss

        return args[:1], {**options, "closure": preconditioned}

    optimizer.register_step_pre_hook(before_step)
    return optimizer


also_known(__name__)
