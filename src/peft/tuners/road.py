"""RoAd: pairs of output channels are rotated and scaled, y' = y * (alpha cos) + rot(y) * (alpha sin) (2409.00119)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ModulesToSave, TargetModules, option
from peft.core.adapter import part, setting
from peft.core.families import Output
from peft.core.families.output import by_output
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.peft_types import PeftType


PER_CHANNEL = {"road_1": 1, "road_2": 2, "road_4": 4}  # trained angles (and scales) for each pair of channels


@dataclass
class RoadConfig(TargetModules, ModulesToSave):
    """Config of RoAd: channels j and j + g/2 of each group of g outputs are rotated by theta and scaled by alpha.

    For serving many adapters at once: applied, it costs a few products of entries, so batches with an adapter for
    each row are cheap; few parameters, and mergeable.
    """

    METHOD: ClassVar[PeftType] = PeftType.ROAD

    variant: str = option(
        "road_1",
        "What a pair of channels trains: 'road_1' one angle and scale, 'road_2' one for each channel, 'road_4' a "
        "further one for each sine.",
        choices=tuple(PER_CHANNEL),
    )
    group_size: int = option(64, "Outputs in a group; even, and a divisor of the layer's outputs.", minimum=2)
    init_weights: bool = option(True, "Start at the identity; otherwise at random angles and scales.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise ConfigError(f"RoadConfig: group_size={self.group_size} must be even: channels are rotated in pairs.")


def road_rotated(y: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, half: int) -> torch.Tensor:
    """y * (alpha cos) + rot(y) * (alpha sin) along the last axis, rot(y) = (-y_2, y_1) for the halves of each group.

    Args:
        y: ``[..., out]``. cosine, sine: alpha cos(theta) and alpha sin(theta), ``[out]`` each. half: of a group.
    """
    first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)  # [..., group, half] each
    return torch.addcmul(y * cosine, torch.stack((-second, first), -2).flatten(-3), sine)


class Road(Output):
    """y' = M y with M made of 2 x 2 blocks; theta and alpha are ``[out / 2]``, ``[out]`` or ``[2 out]``."""

    road_theta, road_alpha = part(), part()
    variant, group_size = setting(), setting()
    spares_input = True

    def create(self, config: RoadConfig, key: str) -> None:
        out, group = self.shape[0], config.group_size
        if out % group:
            divisors = [n for n in range(2, out + 1, 2) if out % n == 0]
            closest = min(divisors, key=lambda n: abs(n - group), default=None)
            advice = f"choose a divisor, such as {closest}" if closest else "leave the layer out of the targets"
            raise ValueError(f"group_size={group} does not divide the {out} outputs of {key!r}; {advice}.")
        count = out // 2 * PER_CHANNEL[config.variant]
        theta, alpha = torch.zeros(count), torch.ones(count)
        if not config.init_weights:
            nn.init.normal_(theta, 0.0, 0.5)
            nn.init.normal_(alpha, 1.0, 0.5)
        self.variant, self.group_size = config.variant, group
        self.road_theta, self.road_alpha = nn.Parameter(theta), nn.Parameter(alpha)

    def unmergeable(self) -> str | None:
        groups = self.in_features // self.shape[1] if len(self.shape) > 2 else 1
        if self.shape[0] // groups % self.group_size == 0:
            return None
        return (
            f"group_size={self.group_size} pairs channels of different groups of the convolution, whose kernels "
            "read different inputs: no grouped kernel equals that. Keep the adapter unmerged."
        )

    def coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha cos(theta) and alpha sin(theta), ``[groups, 1 or 2, group / 2]`` each (by halves)."""
        theta = self.road_theta.view(-1, PER_CHANNEL[self.variant], self.group_size // 2)
        alpha = self.road_alpha.view_as(theta)
        cosine, sine = alpha * theta.cos(), alpha * theta.sin()
        return (cosine[:, :2], sine[:, 2:]) if self.variant == "road_4" else (cosine, sine)

    def map_output(self, y: torch.Tensor) -> torch.Tensor:
        # the same for each channel, [out]
        cosine, sine = (c.to(y.dtype).expand(-1, 2, self.group_size // 2).flatten() for c in self.coefficients())
        return road_rotated(y, cosine, sine, self.group_size // 2)

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        changed = by_output(self, x, y, *self.coefficients())
        return super().output(x, y, base_y) if changed is None else changed


RoadModel = define_tuner(Road, RoadConfig)
