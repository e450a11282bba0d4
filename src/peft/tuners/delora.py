"""DeLoRA: dW = B diag(lambda / (r |a_k| |b_k|)) A diag(|w_j|), its strength apart from its direction (2503.18225)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import (
    ExcludeModules,
    LayerSelection,
    ModulesToSave,
    RankPattern,
    TargetModules,
    TrainedBias,
    option,
    resolve_pattern,
)
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.families import LowRank
from peft.core.filling import kaiming, zeros
from peft.core.layer.buffers import BufferDict
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType


@dataclass
class DeloraConfig(TargetModules, ExcludeModules, TrainedBias, ModulesToSave, LayerSelection, RankPattern):
    """Config of DeLoRA: a low-rank update of rank-one parts with norm 1, and one trained strength for each layer.

    Use it where long training or a large learning rate makes a LoRA drift: the norm of the update is bounded by
    lambda, whatever A and B become.
    """

    METHOD: ClassVar[PeftType] = PeftType.DELORA
    OWN_BIAS: ClassVar[str] = "delora_only"

    r: int = option(8, "Rank of the update.", minimum=1)
    delora_lambda: int = option(15, "What the strength lambda starts at: a bound of the norm of the update.")
    module_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise at random numbers.")
    lambda_pattern: dict[str, float] | None = option(
        dict, "Strengths of particular modules, with keys like `rank_pattern`'s.", names=dict
    )


def delora_core(a: torch.Tensor, b: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """The first diagonal ``[r]`` of dW = B diag(lambda / (r |a_k| |b_k|)) A diag(|w_j|).

    Norms of a_k and b_k below 1e-4 count as that.

    Args:
        a, b: ``[r, in * kernel]`` and ``[out, r]``. strength: lambda ``[1]``.
    """
    norms = a.norm(dim=1).clamp_min(1e-4) * b.norm(dim=0).clamp_min(1e-4)  # B starts at 0
    return strength / (len(a) * norms)


class Delora(LowRank):
    """A ``[r, in * kernel]``, B ``[out, r]``, lambda ``[1]``; ``delora_w_norm`` holds the norms of W's columns."""

    delora_A, delora_B, delora_lambda = part(), part(), part()
    delora_w_norm = part(BufferDict)
    r, delora_dropout = setting(), input_dropout()

    def create(self, config: DeloraConfig, key: str) -> None:
        r, (rows, columns) = config.rank_at(key), fan(self.shape)
        strength = float(resolve_pattern(config.lambda_pattern, key, config.delora_lambda))
        self.r, self.delora_A = r, kaiming(r, columns)
        self.delora_B = zeros(rows, r) if config.init_weights else kaiming(rows, r)
        norm = torch.empty(columns)
        if not self.delora_A.is_meta:  # otherwise the file brings it
            norm = self.base_weight().detach().flatten(1).norm(dim=0)
        self.delora_w_norm, self.delora_lambda = norm, nn.Parameter(torch.full((1,), strength))
        self.delora_dropout = config.module_dropout

    def outer(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.delora_A * self.delora_w_norm.to(self.delora_A.dtype), self.delora_B

    def core(self) -> torch.Tensor:
        return delora_core(self.delora_A, self.delora_B, self.delora_lambda)


DeloraModel = define_tuner(Delora, DeloraConfig)
