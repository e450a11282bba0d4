"""The network of a bottleneck adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft.tuners.activations import activation


def bottleneck(
    h: torch.Tensor,
    down: tuple[torch.Tensor, torch.Tensor],
    up: tuple[torch.Tensor, torch.Tensor],
    f: Callable[[torch.Tensor], torch.Tensor],
    scale: torch.Tensor | float,
) -> torch.Tensor:
    """u(h) = s (W_up f(W_down h + b) + c).

    Args:
        h: ``[..., width]``. down: W_down ``[c, width]`` and its bias b. up: W_up ``[width, c]`` and its bias c.
        f: the activation. scale: s, a number, ``[1]`` or ``[width]``.
    """
    return F.linear(f(F.linear(h, *down)), *up) * scale


class Bottleneck(nn.Module):
    """u(h) for hidden states ``[batch, ..., width]``, with W_down ``[c, width]``, W_up ``[width, c]`` and biases."""

    def __init__(self, config: Any, width: int, index: int) -> None:
        super().__init__()
        factor = config.reduction_factor.get(str(index), config.reduction_factor["default"])
        self.config, inner = config, max(1, int(width // factor))
        self.act = activation(config.non_linearity, "BottleneckConfig: non_linearity")
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        if isinstance(config.scaling, str):
            self.scale = nn.Parameter(torch.ones(width if config.scaling == "channel" else 1))
        self.gate = nn.Linear(width, 1) if config.use_gating else None
        self.norm_before, self.norm_after = (
            nn.LayerNorm(width) if wanted else None for wanted in (config.ln_before, config.ln_after)
        )
        for layer in filter(None, (self.down, self.up, self.gate)):
            nn.init.zeros_(layer.bias)
            if config.init_weights == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            else:
                nn.init.normal_(layer.weight, std=0.02)
        if config.init_weights == "mam_adapter":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)

    def forward(self, h: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """u(h), which is to be added to ``residual``."""
        config = self.config
        read, scale = h if self.norm_before is None else self.norm_before(h), config.scaling
        down, up = ((linear.weight, linear.bias) for linear in (self.down, self.up))
        u = bottleneck(read, down, up, self.act, self.scale if isinstance(scale, str) else scale)
        if self.gate is not None:
            u = u * torch.sigmoid(self.gate(h)).flatten(1).mean(1).view(-1, *[1] * (h.dim() - 1))
        u = F.dropout(u, config.dropout, self.training)
        if self.training and config.stochastic_depth:
            kept = torch.rand(len(u), *[1] * (u.dim() - 1), device=u.device) >= config.stochastic_depth
            u = u * kept / (1 - config.stochastic_depth)
        if self.norm_after is None:
            return u
        return self.norm_after(u + residual) - residual if config.adapter_residual_before_ln else self.norm_after(u)
