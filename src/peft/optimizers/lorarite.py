"""LoRA-RITE: Adam with a matrix for the r directions of a factor, the same for each split of dW (arXiv 2410.20625)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peft.optimizers.product import ProductOptimizer, polar, split


def escaped(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The largest difference between the eigenvalues of two symmetric matrices: what a projection has lost."""
    return (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).abs().max()


class LoraRite(ProductOptimizer):
    """With Y = U R, the gradient of X is seen in the basis U: g = G R^-1 (algorithm 1, with the averages of Adam).

    P = U_t^T U_{t-1} carries what was kept over to the new basis: V = P V P^T + g^T g, and rho collects what P loses
    of V. The step is X -= lr M R^-1 with M the average of g (V + rho)^(-1/2). Y is treated likewise.
    """

    what = "LoRA-RITE"

    def half_step(
        self, other: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        (beta1, beta2), (basis, inverse) = group["betas"], polar(other)
        if not state:
            square = gradient.new_zeros(gradient.shape[1], gradient.shape[1])
            state.update(
                step=0, basis=basis, square=square, escaped=square.new_zeros(()), mean=torch.zeros_like(gradient)
            )
        state["step"] += 1
        g, p = gradient @ inverse, basis.mT @ state["basis"]
        carried = p @ state["square"] @ p.mT
        lost = beta2 * (state["escaped"] + escaped(state["square"], carried))
        square = beta2 * carried + (1 - beta2) * g.mT @ g
        values, vectors = torch.linalg.eigh((square + square.mT) / 2 + lost * torch.eye(len(square)).to(square))
        unbiased = values.clamp(min=0) / (1 - beta2 ** state["step"])
        root = vectors / (unbiased.sqrt() + group["eps"]) @ vectors.mT
        mean = beta1 * state["mean"] @ p.mT + (1 - beta1) * g @ root
        state.update(basis=basis, square=square, escaped=lost, mean=mean)
        return -group["lr"] / (1 - beta1 ** state["step"]) * mean @ inverse


def create_lorarite_optimizer(
    model: nn.Module,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    others_lr: float = 1e-3,
) -> Optimizer:
    """Adam for LoRA that does not depend on how dW is split into A and B (arXiv 2410.20625).

    A step moves dW by about ``lr`` in each of the r directions. Beside an average for each number it keeps a few
    r x r matrices and a basis for each factor.

    Args:
        model: a model with LoRA, in training.
        lr: about the size of a step of dW = s B A, in its spectral norm.
        betas, eps: those of Adam.
        weight_decay: dW shrinks by ``lr * weight_decay`` in a step.
        others_lr: learning rate of AdamW for what else trains: tables of embeddings, vectors, heads.

    Raises:
        ValueError: if no pair trains, or a setting is out of its range.

    Examples:
        >>> optimizer = create_lorarite_optimizer(model, lr=1e-2)
        >>> Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas should be at least 0 and below 1, got {tuple(betas)}.")
    pairs, others = split(model, LoraRite.what)
    return LoraRite(pairs, others, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, others_lr)
