"""HiRA: a Hadamard product of the weight itself and a low-rank matrix (ICLR 2025, openreview TwJrTz9cRS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import (
    ExcludeModules,
    FanInFanOut,
    LayerSelection,
    ModulesToSave,
    RankPattern,
    TargetModules,
    option,
    resolve_pattern,
)
from peft.core.families.families import FoldLayer, drops, input_dropout
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


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


class HiraLayer(FoldLayer):
    """W' = W + W * (B A), A ``[r, in, *kernel]`` and B ``[out, r, 1...]``; tables have names of their own for them."""

    weights: ClassVar[dict[str, type]] = {
        "hira_A": nn.ParameterDict,
        "hira_B": nn.ParameterDict,
        "hira_embedding_A": nn.ParameterDict,
        "hira_embedding_B": nn.ParameterDict,
    }
    settings: ClassVar[dict[str, type]] = {"r": dict, "hira_dropout": nn.ModuleDict}
    linear: ClassVar[tuple[str, ...]] = ("hira_B", "hira_embedding_B")
    stacked: ClassVar[dict[str, int]] = {"hira_A": 0, "hira_B": 1, "hira_embedding_A": 0, "hira_embedding_B": 1}

    def update_layer(self, name: str, config: HiraConfig, key: str) -> None:
        r = resolve_pattern(config.rank_pattern, key, config.r)
        out, *rest = self.shape
        a, b = torch.randn(r, *rest), torch.randn(out, r, *[1] * (len(rest) - 1))
        if config.init_weights and self.kind.lookup:
            a.zero_()
            b.normal_()
        elif config.init_weights:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            b.zero_()
        pair = ("hira_embedding_A", "hira_embedding_B") if self.kind.lookup else ("hira_A", "hira_B")
        self.put(name, r=r, **{pair[0]: nn.Parameter(a), pair[1]: nn.Parameter(b)})
        self.put(name, hira_dropout=input_dropout(config.hira_dropout))

    def product(self, name: str) -> torch.Tensor:
        """B A, in the shape of W."""
        if self.kind.lookup:
            a, b = self.hira_embedding_A[name], self.hira_embedding_B[name]
        else:
            a, b = self.hira_A[name], self.hira_B[name]
        return (b.flatten(1) @ a.flatten(1)).view(self.shape)

    def reweight(self, name: str, base: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(base, base, self.product(name).to(base.dtype))

    def change(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        return self.unmerged_weight().to(dtype=dtype) * self.product(name)

    def needs_weight(self) -> bool:
        return self.sums_exactly() and not drops(self, self.hira_dropout.values())

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return super().delta(name, x if self.kind.lookup else self.hira_dropout[name](x))


HiraModel = define_tuner(
    "HiraModel",
    HiraLayer,
    HiraConfig,
    prefix="hira_",
    targets=TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING,
)
