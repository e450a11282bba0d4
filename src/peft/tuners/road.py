"""RoAd: pairs of output channels are rotated and scaled, y' = y * (alpha cos) + rot(y) * (alpha sin) (2409.00119)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ModulesToSave, TargetModules, option
from peft.core.families.families import OutputLayer
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


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


class RoadLayer(OutputLayer):
    """y' = M y with M made of 2 x 2 blocks; theta and alpha are ``[out / 2]``, ``[out]`` or ``[2 out]``."""

    weights: ClassVar[dict[str, type]] = {"road_theta": nn.ParameterDict, "road_alpha": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {"variant": dict, "group_size": dict}

    def update_layer(self, name: str, config: RoadConfig, key: str) -> None:
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
        self.put(name, variant=config.variant, group_size=group)
        self.put(name, road_theta=nn.Parameter(theta), road_alpha=nn.Parameter(alpha))

    def unmergeable(self, name: str) -> str | None:
        groups = self.in_features // self.shape[1] if len(self.shape) > 2 else 1
        if self.shape[0] // groups % self.group_size[name] == 0:
            return None
        return (
            f"group_size={self.group_size[name]} pairs channels of different groups of the convolution, whose kernels "
            "read different inputs: no grouped kernel equals that. Keep the adapter unmerged."
        )

    def coefficients(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha cos(theta) and alpha sin(theta), ``[groups, 1 or 2, group / 2]`` each (by halves)."""
        half, variant = self.group_size[name] // 2, self.variant[name]
        theta = self.road_theta[name].view(-1, PER_CHANNEL[variant], half)
        alpha = self.road_alpha[name].view_as(theta)
        cosine, sine = alpha * theta.cos(), alpha * theta.sin()
        return (cosine[:, :2], sine[:, 2:]) if variant == "road_4" else (cosine, sine)

    def map_output(self, name: str, y: torch.Tensor) -> torch.Tensor:
        half = self.group_size[name] // 2
        cosine, sine = (c.expand(-1, 2, half).flatten().to(y.dtype) for c in self.coefficients(name))
        first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        return torch.addcmul(y * cosine, torch.stack((-second, first), -2).flatten(-3), sine)


RoadModel = define_tuner(
    "RoadModel",
    RoadLayer,
    RoadConfig,
    prefix="road_",
    targets=TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING,
)
