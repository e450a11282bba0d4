"""LoRA-Muon: the step of the product is the steepest one of its spectral norm (arXiv 2606.12921)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peft.optimizers.product import ProductOptimizer, polar, split


class LoraMuon(ProductOptimizer):
    """dX = -lr / 2 msign(M_X R_Y) R_Y with R_Y = (Y^T Y)^(-1/2), and dY likewise; M are averages of the gradients."""

    what = "LoRA-Muon"

    def half_step(
        self, other: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        mean = state.setdefault("momentum", torch.zeros_like(gradient)).lerp_(gradient, 1 - group["momentum"])
        root = polar(other)[1]
        return -group["lr"] / 2 * polar(mean @ root)[0] @ root


def create_loramuon_optimizer(
    model: nn.Module,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    others_lr: float = 1e-3,
) -> Optimizer:
    """Muon for LoRA: each half of a step moves dW = s B A by at most lr / 2 in its spectral norm (arXiv 2606.12921).

    How dW is split into A and B, ``lora_alpha`` and the rank make no difference to the size of a step, so a learning
    rate serves for other ranks and widths. It keeps one average for each number, half of what AdamW keeps.

    Args:
        model: a model with LoRA, in training.
        lr: the spectral norm of a step of dW.
        momentum: of the average of gradients, at least 0 and below 1.
        weight_decay: dW shrinks by ``lr * weight_decay`` in a step.
        others_lr: learning rate of AdamW for what else trains: tables of embeddings, vectors, heads.

    Raises:
        ValueError: if no pair trains, or a setting is out of its range.

    Examples:
        >>> optimizer = create_loramuon_optimizer(model, lr=0.02)
        >>> Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum should be at least 0 and below 1, got {momentum}.")
    pairs, others = split(model, LoraMuon.what)
    return LoraMuon(pairs, others, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, others_lr)
