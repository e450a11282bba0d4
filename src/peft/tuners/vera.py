"""VeRA: dW = diag(b) B diag(d) A, a frozen random pair for the model and two trained vectors a layer (2310.11454)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import option
from peft.core.base.kinds import fan
from peft.core.families.families import LowRankLayer, input_dropout
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.kernels.linear import Factors
from peft.tuners.vera_utils import ScaledTable, SharedPairConfig, shared_pair, vectors
from peft.utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


@dataclass
class VeraConfig(SharedPairConfig):
    """Config of VeRA: dW = diag(b) B diag(d) A with A and B shared and frozen.

    For many small adapters: the random matrices are the same for all, and each keeps two vectors a layer, a tenth
    of a LoRA's parameters. It takes a higher rank (256) and a ten times higher learning rate than LoRA.
    """

    METHOD: ClassVar[PeftType] = PeftType.VERA
    OWN_BIAS: ClassVar[str] = "vera_only"

    vera_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)


class VeraLayer(LowRankLayer):
    """dW = diag(b) B diag(d) A; each layer uses the leading ``in`` columns of A and ``out`` rows of B.

    A convolution is its matrix ``[out, in * kernel]``.
    """

    weights: ClassVar[dict[str, type]] = {"vera_lambda_b": nn.ParameterDict, "vera_lambda_d": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {"r": dict, "vera_dropout": nn.ModuleDict}
    shared: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")
    dropout: ClassVar[str] = "vera_dropout"

    @classmethod
    def share(cls, config: VeraConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, torch.Tensor]:
        """A ``[r, largest in]`` and B ``[largest out, r]``."""
        a, b = shared_pair(config.r, config.r, config.projection_prng_key, layers)
        return {"vera_A": a, "vera_B": b}

    def update_layer(self, name: str, config: VeraConfig, key: str) -> None:
        b, d = vectors(self.shape[0], config.r, config)
        self.put(name, r=config.r, vera_lambda_b=b, vera_lambda_d=d, vera_dropout=input_dropout(config.vera_dropout))

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and diag(b) B diag(d), cut to this layer: the first is frozen, so that no gradient needs the input."""
        b, d = self.vera_lambda_b[name], self.vera_lambda_d[name]
        rows, columns = fan(self.shape)
        return self.vera_A[name][:, :columns].to(d), ScaledTable.apply(b, self.vera_B[name][:rows].to(b), d)

    def factors(self, name: str) -> Factors | None:
        """None in training: the gradient of b by the pair takes a product that it does not by the output."""
        trains = torch.is_grad_enabled() and self.vera_lambda_b[name].requires_grad
        return None if trains else super().factors(name)

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        base, kind, d, (rows, columns) = self.get_base_layer(), self.kind, self.vera_lambda_d[name], fan(self.shape)
        a, b = self.vera_A[name][:, :columns].to(d), self.vera_B[name][:rows].to(d)
        groups = getattr(base, "groups", 1)  # each has its own A x
        h = kind.down(base, self.dropped(name, x), a) * kind.along_channels(
            d if groups == 1 else d.repeat(groups), base
        )
        return kind.up(base, h, b) * kind.along_channels(self.vera_lambda_b[name], base)


VeraModel = define_tuner(
    "VeraModel",
    VeraLayer,
    VeraConfig,
    prefix="vera_lambda_",
    targets=TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
)
