"""One step of AdamW for one parameter: what optimizers of pairs do with whatever else trains."""

from __future__ import annotations

import math
from typing import Any

import torch


def adamw(p: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """AdamW's step (arXiv 1711.05101), in place, with the decay after the update.

    Args:
        state: what is kept for the parameter; filled at the first step.
        group: ``lr``, ``betas``, ``eps``, ``weight_decay``, and ``correct_bias``: undo that averages start at zero.
    """
    beta1, beta2 = group["betas"]
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    state["step"] += 1
    mean = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    size = group["lr"]
    if group["correct_bias"]:
        size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
    p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
    if group["weight_decay"]:
        p.mul_(1 - group["lr"] * group["weight_decay"])
