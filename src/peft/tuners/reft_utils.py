"""The mathematics of an intervention on hidden states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft.core.layer.weight import wide
from peft.kernels.autocast import is_autocast
from peft.tuners.activations import activation


def edit(
    h: torch.Tensor,
    source: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    f: Callable[[torch.Tensor], torch.Tensor],
    subtract: bool,
) -> torch.Tensor:
    """R^T (f(W h + b) - R h), or without "- R h".

    Args:
        h: ``[..., width]``. source: W ``[r, width]`` and b ``[r]``. rows: R ``[r, width]``. f: the activation.
    """
    target = f(F.linear(h, *source))
    return (target - F.linear(h, rows) if subtract else target) @ rows


def orthonormal(p: torch.Tensor) -> torch.Tensor:
    """R = L^-1 P with L L^T = P P^T: orthonormal rows that span those of P, and P itself where it has such rows.

    Args:
        p: ``[r, width]`` of full rank, ``r <= width``.
    """
    kind = p.device.type
    with torch.autocast(kind, enabled=False) if is_autocast(kind) else nullcontext():
        p = wide(p)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(p @ p.T), p, upper=False)


class Intervention(nn.Module):
    """W and b (``learned_source``) and R (``projection``, of LoReFT by :func:`orthonormal`) of some positions."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.config, f = config, config.non_linearity
        self.act = nn.Identity() if f is None else activation(f, "ReftConfig: non_linearity")
        self.learned_source = nn.Linear(width, config.r)
        self.projection = nn.Linear(width, config.r, bias=False)
        if config.variant == "loreft":
            nn.init.orthogonal_(self.projection.weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """What is added to hidden states ``[..., width]``."""
        config, rows = self.config, self.projection.weight
        rows = orthonormal(rows) if config.variant == "loreft" else rows
        dtype = h.dtype if config.dtype is None else getattr(torch, config.dtype)
        tensors = (x.to(dtype) for x in (h, self.learned_source.weight, self.learned_source.bias, rows))
        x, weight, bias, rows = tensors
        change = edit(x, (weight, bias), rows, self.act, config.variant != "direft")
        if self.training and config.dropout:
            return F.dropout(x + change, config.dropout) - x
        return change
