"""ABBA: dW = s (B1 A1) * (B2 A2), entry by entry, of rank r1 r2 at the size of rank r1 + r2 (arXiv 2505.14238)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.families import LowRank
from peft.core.filling import draw_like_linear, skip_values
from peft.core.model.registry import define_tuner
from peft.kernels.decompositions import face_splitting, halves, svd


@dataclass
class AbbaConfig(TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Config of ABBA: the product, entry by entry, of two trained low-rank updates.

    For tasks where LoRA's rank is the limit: with r1 = r2 = r / 2 it has LoRA's number of parameters and the rank
    r^2 / 4. Nothing as large as the weight is made in a step. Unlike HiRA's, the update is not bound to the weight.
    """

    METHOD: ClassVar[str] = "ABBA"

    r1: int = option(8, "Rank of the first pair, which starts from the weight's singular vectors.", minimum=1)
    r2: int = option(8, "Rank of the second pair, which starts as LoRA's does.", minimum=1)
    alpha: float = option(16, "The update is scaled by alpha / sqrt(r1 r2).")
    dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with B2 = 0, so that nothing changes; otherwise B2 is random.")


def abba_weight(a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor, scale: float) -> torch.Tensor:
    """dW = s (B1 A1) * (B2 A2) ``[out, in * kernel]`` of A1 ``[r1, in * kernel]``, B1 ``[out, r1]`` and the others."""
    return scale * (b1 @ a1) * (b2 @ a2)


class Abba(LowRank):
    """A1 ``[r1, in * kernel]`` and B1 ``[out, r1]``, A2 and B2 likewise; B1 A1 starts as the best W of its rank."""

    abba_A1, abba_B1, abba_A2, abba_B2 = part(), part(), part(), part()
    abba_scale, abba_dropout = setting(), input_dropout()

    def create(self, config: AbbaConfig, key: str) -> None:
        (out, columns), r2 = fan(self.shape), config.r2
        r1 = min(config.r1, out, columns)
        a1, b1, a2, b2 = (torch.empty(size) for size in ((r1, columns), (out, r1), (r2, columns), (out, r2)))
        if not skip_values():
            a1, b1 = halves(*svd(self.base_weight().detach().flatten(1).float()), r1)
            draw_like_linear(a2)
            nn.init.zeros_(b2) if config.init_weights else draw_like_linear(b2)
        self.abba_A1, self.abba_B1 = nn.Parameter(a1), nn.Parameter(b1)
        self.abba_A2, self.abba_B2 = nn.Parameter(a2), nn.Parameter(b2)
        self.abba_scale, self.abba_dropout = config.alpha / math.sqrt(r1 * r2), config.dropout

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        b, a = face_splitting(self.abba_B1, self.abba_A1, self.abba_B2, self.abba_A2)  # theorem 1
        return a, self.abba_scale * b

    def delta_weight(self) -> torch.Tensor:
        pairs = (self.abba_A1, self.abba_B1, self.abba_A2, self.abba_B2)
        return abba_weight(*pairs, self.abba_scale).view(self.shape)  # [out, in, *kernel]


AbbaModel = define_tuner(Abba, AbbaConfig)
