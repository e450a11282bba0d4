"""HiRA: a Hadamard product of the weight itself and a low-rank matrix (ICLR 2025, openreview TwJrTz9cRS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, LayerSelection, ModulesToSave, RankPattern, TargetModules, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.addition import SideBySide
from peft.core.families import Fold
from peft.core.filling import draw_like_linear
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType


@dataclass
class HiraConfig(TargetModules, ExcludeModules, FanInFanOut, ModulesToSave, LayerSelection, RankPattern):
    """Config of HiRA: dW = W * (B A), entry by entry.

    A low-rank pair whose update can have full rank: for tasks where LoRA's rank is the limit. The weight takes part in
    every step, so one costs more than LoRA's until merged.
    """

    METHOD: ClassVar[PeftType] = PeftType.HIRA

    r: int = option(32, "Rank of B A. The update itself can have full rank.", minimum=1)
    hira_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with B A = 0, so that nothing changes; otherwise at random numbers.")


def hira_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B A, ``[out, in, *kernel]``, of A ``[r, in, *kernel]`` and B ``[out, r, 1...]``."""
    return b @ a if a.dim() == 2 else (b.flatten(1) @ a.flatten(1)).unflatten(1, a.shape[1:])


class Hira(Fold):
    """W' = W + W * (B A), A ``[r, in, *kernel]`` and B ``[out, r, 1...]``; tables have names of their own for them."""

    hira_A = part(table="hira_embedding_A")
    hira_B = part(table="hira_embedding_B")
    r, hira_dropout = setting(), input_dropout()
    adds = SideBySide("hira_B", hira_A=0, hira_B=1)

    def create(self, config: HiraConfig, key: str) -> None:
        self.r = r = config.rank_at(key)
        out, *rest = self.shape
        a, b = torch.randn(r, *rest), torch.randn(out, r, *[1] * (len(rest) - 1))
        if config.init_weights and self.kind.lookup:
            a.zero_()
            b.normal_()
        elif config.init_weights:
            draw_like_linear(a)
            b.zero_()
        self.hira_A, self.hira_B = nn.Parameter(a), nn.Parameter(b)
        self.hira_dropout = config.hira_dropout

    def product(self) -> torch.Tensor:
        """B A, in the shape of W."""
        return hira_product(self.hira_A, self.hira_B)

    def folded(self, base: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(base, base, self.product().to(base.dtype))

    def change(self, dtype: torch.dtype | None) -> torch.Tensor:
        return self.base_weight().to(dtype=dtype) * self.product()

    def prefers_folding(self) -> bool:
        return self.sums_exactly() and not self.drops(self.hira_dropout)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return super().delta(x if self.kind.lookup else self.hira_dropout(x))


HiraModel = define_tuner(Hira, HiraConfig)
