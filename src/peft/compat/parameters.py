"""A change of a parameter as a parametrisation, by a name that others import (axolotl)."""

from __future__ import annotations

import torch
from torch import nn


class _LoraParameterProxy(nn.Module):
    """``torch.nn.utils.parametrize.register_parametrization(module, name, _LoraParameterProxy(delta))``: W + delta."""

    def __init__(self, delta_weight: torch.Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return W + self.delta_weight.to(W.dtype)
