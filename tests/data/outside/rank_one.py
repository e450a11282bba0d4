"""Rank one: dW = s u v^T, one column and one row for each layer (an example, arXiv 2106.09685 with r = 1).

A package of a third party that brings a method of its own. Nobody imports it: its entry point names this module.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import part, setting
from peft.core.base.kinds import fan
from peft.core.families import LowRank
from peft.core.model.registry import define_tuner


@dataclass
class RankOneConfig(TargetModules, ModulesToSave, LayerSelection):
    """Config of rank one: the least that LoRA can be.

    For seeing how a package brings a method.
    """

    METHOD: ClassVar[str] = "RANK_ONE"
    scale: float = option(1.0, "The update is multiplied by it.", above=0)


class RankOne(LowRank):
    """dW = s u v^T with v ``[in * kernel]`` random and u ``[out]`` zero at the start."""

    one_u, one_v, one_scale = part(), part(), setting()

    def create(self, config: RankOneConfig, key: str) -> None:
        out, columns = fan(self.shape)
        self.one_u = nn.Parameter(torch.zeros(out))
        self.one_v = nn.Parameter(torch.randn(columns) / columns**0.5)
        self.one_scale = config.scale

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one_v[None], self.one_scale * self.one_u[:, None]


RankOneModel = define_tuner(RankOne, RankOneConfig)
