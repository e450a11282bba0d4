"""BEFT: a trained shift of the output, y' = y + beta (bias-efficient fine-tuning, arXiv 2509.15974)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import ModulesToSave, TargetModules, option
from peft.core.adapter import part
from peft.core.addition import LinearIn
from peft.core.base.kinds import Kind
from peft.core.families import Output
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType


@dataclass
class BeftConfig(TargetModules, ModulesToSave):
    """Config of BEFT: y' = y + beta, best on the value projections.

    For the smallest adapters, one number for each output of a few layers; merged, it is a bias.
    """

    METHOD: ClassVar[PeftType] = PeftType.BEFT

    init_weights: bool = option(True, "Start at zero, so that nothing changes; otherwise at random numbers.")


class Beft(Output):
    """A vector beta ``[1, out]``. Merged, it is part of the bias, which a layer without one gets."""

    beft_bias = part()
    adds = LinearIn("beft_bias")

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: Any) -> str | None:
        return None if kind.bias else "it has no bias that BEFT could train; target linear or convolutional layers"

    def create(self, config: BeftConfig, key: str) -> None:
        shape = 1, self.shape[0]
        self.beft_bias = nn.Parameter(torch.zeros(shape) if config.init_weights else torch.randn(shape))

    def shift(self) -> torch.Tensor:
        return self.beft_bias[0]


BeftModel = define_tuner(Beft, BeftConfig)
