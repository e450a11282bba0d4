"""The network of a bottleneck adapter, and the adapter that has one at each sub-layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.core.adapter import setting
from peft.core.blocks.blocks import CROSS, width_of
from peft.core.blocks.insertion import Insert, Joint
from peft.core.filling import draw_like_linear
from peft.core.gates import Gate
from peft.core.model.context import Context
from peft.tuners.activations import activation
from peft.tuners.bottleneck_config import NetworkFields
from peft.usage import counts


Pair = tuple[torch.Tensor, torch.Tensor | None]
"""A matrix ``[out, in]`` and a bias ``[out]``."""


def bottleneck(
    h: torch.Tensor, down: Pair, up: Pair, f: Callable[[torch.Tensor], torch.Tensor], scale: torch.Tensor | float
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
        self.config, inner = config, max(1, int(width // config.factor_at(index)))
        self.act = activation(config.non_linearity, f"{type(config).__name__}: non_linearity")
        self.down, self.up = self.projection(width, inner), self.projection(inner, width)
        if isinstance(config.scaling, str):
            self.scale = nn.Parameter(torch.ones(width if config.scaling == "channel" else 1))
        self.gate = Gate(width) if config.use_gating else None
        self.norm_before, self.norm_after = (
            nn.LayerNorm(width) if wanted else None for wanted in (config.ln_before, config.ln_after)
        )
        self.start()

    def projection(self, inner: int, outer: int) -> nn.Module:
        """What holds W_down or W_up, from ``inner`` to ``outer`` features."""
        return nn.Linear(inner, outer)

    def start(self) -> None:
        """Give the matrices their initial values."""
        kind = getattr(self.config, "init_weights", None)
        for layer in filter(lambda layer: isinstance(layer, nn.Linear), (self.down, self.up)):
            nn.init.zeros_(layer.bias)
            if kind == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            else:
                nn.init.normal_(layer.weight, std=0.02)
        if kind == "mam_adapter":
            draw_like_linear(self.down.weight)
            nn.init.zeros_(self.up.weight)

    def pair(self, projection: Any, *shared: Any) -> Pair:
        """The matrix and the bias that a projection stands for; ``shared``: what the networks have in common."""
        return projection.weight, projection.bias

    def forward(
        self, h: torch.Tensor, residual: torch.Tensor, *shared: Any, context: Context | None = None
    ) -> torch.Tensor:
        """u(h), which is to be added to ``residual``; ``context``: the call under way."""
        config = self.config
        read, scale = h if self.norm_before is None else self.norm_before(h), config.scaling
        down, up = (self.pair(projection, *shared) for projection in (self.down, self.up))
        u = bottleneck(read, down, up, self.act, self.scale if isinstance(scale, str) else scale)
        if self.gate is not None:
            u = self.gate.apply_to(u, h, context)
        u = F.dropout(u, config.dropout, self.training)
        if self.training and config.stochastic_depth:
            # One draw for each sample.
            kept = torch.rand(len(u), *[1] * (u.dim() - 1), device=u.device) >= config.stochastic_depth
            u = u * kept / (1 - config.stochastic_depth)
        if self.norm_after is None:
            return u
        return self.norm_after(u + residual) - residual if config.adapter_residual_before_ln else self.norm_after(u)


class Networks(Insert):
    """One network for each kind of sub-layer that the config names: the parts ``<stem>_attention`` and so on."""

    stem: ClassVar[str]
    network: ClassVar[type[Bottleneck]]
    joints = setting()

    def create(self, config: NetworkFields, key: str) -> None:
        residual = {"True": "output", "False": "normed"}.get(str(config.residual_before_ln), "sum")
        self.joints = Joint(config.is_parallel, config.original_ln_before, residual, config.original_ln_after)
        for sublayer in self.block.sublayers:
            if sublayer.role in config.roles():
                if sublayer.role == CROSS:
                    counts("cross_adapter")
                made = self.network(config, width_of(self.base), self.block.index)
                setattr(self, f"{self.stem}_{sublayer.role}", made)

    def at(self, role: str) -> Bottleneck | None:
        """The network at the sub-layers of this role."""
        return getattr(self, f"{self.stem}_{role}")

    def joint(self, role: str) -> Joint | None:
        return None if self.at(role) is None else self.joints

    def change(self, role: str, h: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        network = self.at(role)
        assert network is not None  # or else it has no joint
        return network(h, residual, *self.in_common(), context=self.context)

    def in_common(self) -> tuple[Any, ...]:
        """What the networks of all layers have in common."""
        return ()
