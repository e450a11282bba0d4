"""GraLoRA: dW of k x k blocks, each a low-rank product of its own [+ one LoRA over all] (arXiv 2505.20355)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.families.families import ScaledLayer, input_dropout, padded
from peft.core.model.registry import define_tuner
from peft.tuners.lycoris_utils import kaiming, zeros
from peft.utils.constants import TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


@dataclass
class GraloraConfig(TargetModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of GraLoRA: the weight is cut into k x k blocks, and each gets a low-rank update of rank r / k.

    Use it where a LoRA of high rank overfits or is upset by outliers among the inputs: with the same number of
    parameters and operations, the update has rank up to k times as high.
    """

    METHOD: ClassVar[PeftType] = PeftType.GRALORA
    OWN_BIAS: ClassVar[str] = "gralora_only"

    r: int = option(32, "Rank of the blocks together: as many parameters as a LoRA of that rank.", minimum=1)
    hybrid_r: int = option(0, "Rank of a plain LoRA over the whole weight, besides the blocks.", minimum=0)
    alpha: int = option(64, "The update is scaled by alpha / (r + hybrid_r).")
    gralora_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    gralora_k: int = option(2, "Blocks in each direction; it divides r.", minimum=1)
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            raise ConfigError(f"GraloraConfig: r={self.r} must be a multiple of gralora_k={self.gralora_k}.")


class GraloraLayer(ScaledLayer):
    """h_n = x_n A_n for the k chunks of x; piece j of each h_n goes to chunk j of the output: y_j = [h_nj]_n B_j.

    A ``[k, in / k, r]`` and B ``[k, r, out / k]``, rounded up where k does not divide; chunks are filled with zeros.
    """

    weights: ClassVar[dict[str, type]] = {
        "gralora_A": nn.ParameterDict,
        "gralora_B": nn.ParameterDict,
        "gralora_A_general": nn.ModuleDict,
        "gralora_B_general": nn.ModuleDict,
    }
    settings: ClassVar[dict[str, type]] = {
        "alpha": dict,
        "ranks": dict,
        "scaling": dict,
        "gralora_dropout": nn.ModuleDict,
    }

    def update_layer(self, name: str, config: GraloraConfig, key: str) -> None:
        k, r, (rows, columns) = config.gralora_k, config.r, fan(self.shape)
        inner, outer = -(-columns // k), -(-rows // k)
        last, pairs = zeros if config.init_weights else kaiming, []
        for _ in range(k):  # each chunk is drawn like a linear layer of its own
            pairs.append((kaiming(r, inner).detach().T, last(outer, r).detach().T))
        a, b = (nn.Parameter(torch.stack(parts)) for parts in zip(*pairs))
        self.put(name, gralora_A=a, gralora_B=b, alpha=config.alpha, ranks=r + config.hybrid_r)
        self.put(name, gralora_dropout=input_dropout(config.gralora_dropout))
        self.put(name, scaling=self.initial_scaling(name))
        if config.hybrid_r:
            down = nn.Linear(columns, config.hybrid_r, bias=False)
            up = nn.Linear(config.hybrid_r, rows, bias=False)
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            if config.init_weights:
                nn.init.zeros_(up.weight)
            self.put(name, gralora_A_general=down, gralora_B_general=up)

    def initial_scaling(self, name: str) -> float:
        return self.alpha[name] / self.ranks[name]

    def delta_weight(self, name: str) -> torch.Tensor:
        a, b, (rows, columns) = self.gralora_A[name], self.gralora_B[name], fan(self.shape)
        pieces_a, pieces_b = a.unflatten(2, (len(a), -1)), b.unflatten(1, (len(a), -1))
        weight = torch.einsum("nijp,jnpo->joni", pieces_a, pieces_b).flatten(2).flatten(0, 1)[:rows, :columns]
        if name in self.gralora_A_general:
            weight = weight + self.gralora_B_general[name].weight @ self.gralora_A_general[name].weight
        return (weight * self.scaling[name]).view(self.shape)

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = x if self.kind.lookup else self.gralora_dropout[name](x)
        if not self.kind.matrix:
            return super().delta(name, x)
        a, b, rows = self.gralora_A[name], self.gralora_B[name] * self.scaling[name], self.shape[0]
        chunks = (
            padded(x, len(a) * a.shape[1]).reshape(-1, len(a), a.shape[1]).transpose(0, 1)
        )  # [n, row of x, in / k]
        pieces = (chunks @ a).unflatten(2, (len(a), -1))  # [n, row of x, j, r / k]
        y = pieces.permute(2, 1, 0, 3).flatten(2) @ b  # [j, row of x, out / k]
        y = y.transpose(0, 1).flatten(1)[:, :rows].unflatten(0, x.shape[:-1])
        if name in self.gralora_A_general:
            y = y + self.gralora_B_general[name](self.gralora_A_general[name](x)) * self.scaling[name]
        return y


GraloraModel = define_tuner(
    "GraloraModel",
    GraloraLayer,
    GraloraConfig,
    prefix="gralora_",
    targets=TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING,
)
