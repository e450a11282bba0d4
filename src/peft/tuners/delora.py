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
    check_pattern,
    option,
    resolve_pattern,
)
from peft.core.base.kinds import fan
from peft.core.families.families import LowRankLayer, input_dropout
from peft.core.layer.buffers import BufferDict
from peft.core.model.registry import define_tuner
from peft.tuners.lycoris_utils import kaiming, zeros
from peft.utils.constants import TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


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
    lambda_pattern: dict | None = option(dict, "Strengths of particular modules, with keys like `rank_pattern`'s.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lambda_pattern = check_pattern(self, "lambda_pattern")


class DeloraLayer(LowRankLayer):
    """A ``[r, in * kernel]``, B ``[out, r]``, lambda ``[1]``; ``delora_w_norm`` holds the norms of W's columns.

    Norms of a_k and b_k below 1e-4 count as that.
    """

    weights: ClassVar[dict[str, type]] = {
        "delora_A": nn.ParameterDict,
        "delora_B": nn.ParameterDict,
        "delora_lambda": nn.ParameterDict,
        "delora_w_norm": BufferDict,
    }
    settings: ClassVar[dict[str, type]] = {"r": dict, "delora_dropout": nn.ModuleDict}
    dropout: ClassVar[str] = "delora_dropout"

    def update_layer(self, name: str, config: DeloraConfig, key: str) -> None:
        r, (rows, columns) = resolve_pattern(config.rank_pattern, key, config.r), fan(self.shape)
        strength = float(resolve_pattern(config.lambda_pattern, key, config.delora_lambda))
        a, b = kaiming(r, columns), zeros(rows, r) if config.init_weights else kaiming(rows, r)
        norm = torch.empty(columns)
        if not a.is_meta:  # otherwise the file brings it
            norm = self.unmerged_weight().detach().flatten(1).norm(dim=0)
        self.put(name, r=r, delora_A=a, delora_B=b, delora_w_norm=norm)
        self.put(name, delora_lambda=nn.Parameter(torch.full((1,), strength)))
        self.put(name, delora_dropout=input_dropout(config.module_dropout))

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.delora_A[name], self.delora_B[name]
        norms = a.norm(dim=1).clamp_min(1e-4) * b.norm(dim=0).clamp_min(1e-4)
        return a * self.delora_w_norm[name].to(a.dtype), b * (self.delora_lambda[name] / (self.r[name] * norms))


DeloraModel = define_tuner(
    "DeloraModel",
    DeloraLayer,
    DeloraConfig,
    prefix="delora_",
    targets=TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING,
)
