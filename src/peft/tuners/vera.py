"""VeRA: one frozen random pair for the whole model, two trained vectors a layer (arXiv 2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.families import DeltaLayer
from peft.core.kinds import fan
from peft.core.layer import BaseTunerLayer
from peft.core.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


@dataclass
class VeraConfig(TargetModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of VeRA: dW = diag(b) B diag(d) A with A and B shared and frozen."""

    METHOD: ClassVar[PeftType] = PeftType.VERA
    OWN_BIAS: ClassVar[str] = "vera_only"

    r: int = option(256, "Rows of A and columns of B. Large, as only r + out numbers are trained a layer.", minimum=1)
    projection_prng_key: int = option(0, "Seed of A and B.")
    save_projection: bool = option(
        True, "Write A and B into the file. Without, they are drawn again from projection_prng_key when it is loaded."
    )
    vera_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    d_initial: float = option(0.1, "What d starts at.")
    init_weights: bool = option(True, "Start with b = 0, so that nothing changes; otherwise b = 1 and d is random.")


class VeraLayer(DeltaLayer):
    """dW = diag(b) B diag(d) A; each layer uses the leading ``in`` columns of A and ``out`` rows of B.

    A convolution is its matrix ``[out, in * kernel]``.
    """

    weights: ClassVar[dict[str, type]] = {"vera_lambda_b": nn.ParameterDict, "vera_lambda_d": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {"r": dict, "vera_dropout": nn.ModuleDict}
    shared: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")

    @classmethod
    def share(cls, config: VeraConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, torch.Tensor]:
        """A ``[r, largest in]`` and B ``[largest out, r]``, uniform in +-sqrt(6 / columns)."""
        generator = torch.Generator().manual_seed(config.projection_prng_key)

        def draw(rows: int, columns: int) -> torch.Tensor:
            bound = math.sqrt(6 / columns)
            return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

        sizes = [fan(layer.shape) for layer in layers]
        a = draw(config.r, max(columns for _, columns in sizes))
        return {"vera_A": a, "vera_B": draw(max(rows for rows, _ in sizes), config.r)}

    def update_layer(self, name: str, config: VeraConfig, key: str) -> None:
        b, d = torch.ones(self.shape[0]), torch.randn(config.r)
        if config.init_weights:
            b, d = torch.zeros(self.shape[0]), d.fill_(config.d_initial)
        self.put(name, r=config.r, vera_lambda_b=nn.Parameter(b), vera_lambda_d=nn.Parameter(d))
        self.put(name, vera_dropout=nn.Dropout(config.vera_dropout) if config.vera_dropout else nn.Identity())

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """diag(d) A and diag(b) B, cut to this layer."""
        b, d = self.vera_lambda_b[name], self.vera_lambda_d[name]
        rows, columns = fan(self.shape)
        a = self.vera_A[name][:, :columns].to(d)
        return d[:, None] * a, b[:, None] * self.vera_B[name][:rows].to(b)

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.kind.lookup or len(self.shape) > 2:
            return super().delta(name, x if self.kind.lookup else self.vera_dropout[name](x))
        a, b = self.pair(name)
        return F.linear(F.linear(self.vera_dropout[name](x), a), b)

    def delta_weight(self, name: str) -> torch.Tensor:
        a, b = self.pair(name)
        return (b @ a).view(self.shape)


VeraModel = define_tuner(
    "VeraModel",
    VeraLayer,
    VeraConfig,
    prefix="vera_lambda_",
    targets=TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
)
