"""VeRA: dW = diag(b) B diag(d) A, a frozen random pair for the model and two trained vectors a layer (2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from peft.config import option
from peft.core.adapter import input_dropout, part, setting, shared
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType
from peft.tuners.vera_utils import SharedPair, SharedPairConfig, vera_pair


@dataclass
class VeraConfig(SharedPairConfig):
    """Config of VeRA: dW = diag(b) B diag(d) A with A and B shared and frozen.

    For many small adapters: the random matrices are the same for all, and each keeps two vectors a layer, a tenth
    of a LoRA's parameters. It takes a higher rank (256) and a ten times higher learning rate than LoRA.
    """

    METHOD: ClassVar[PeftType] = PeftType.VERA
    OWN_BIAS: ClassVar[str] = "vera_only"

    vera_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)


class Vera(SharedPair):
    """dW = diag(b) B diag(d) A; each layer uses the leading ``in`` columns of A and ``out`` rows of B."""

    vera_lambda_b, vera_lambda_d = part(), part()
    vera_A, vera_B = shared(frozen=True), shared(frozen=True)
    r, vera_dropout = setting(), input_dropout()

    def create(self, config: VeraConfig, key: str) -> None:
        self.r, self.vera_dropout = config.r, config.vera_dropout
        self.start(config)

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first is frozen, so that no gradient needs the input."""
        return vera_pair(*self.frozen(), self.vera_lambda_d, self.vera_lambda_b)


VeraModel = define_tuner(Vera, VeraConfig, prefix="vera_lambda_")
