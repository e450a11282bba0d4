"""VeRA: dW = diag(b) B diag(d) A, a frozen random pair for the model and two trained vectors a layer (2310.11454)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from peft.config import option
from peft.core.adapter import input_dropout, part, setting, shared
from peft.core.base.kinds import fan
from peft.core.families import LowRank
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.tuners.vera_utils import SharedPairConfig, fused, projected, raised, shared_pair, vectors, vera_pair
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


class Vera(LowRank):
    """dW = diag(b) B diag(d) A; each layer uses the leading ``in`` columns of A and ``out`` rows of B.

    A convolution is its matrix ``[out, in * kernel]``.
    """

    vera_lambda_b, vera_lambda_d = part(), part()
    vera_A, vera_B = shared(frozen=True), shared(frozen=True)
    r, vera_dropout = setting(), input_dropout()

    @classmethod
    def share(cls, config: VeraConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, torch.Tensor]:
        """A ``[r, largest in]`` and B ``[largest out, r]``."""
        a, b = shared_pair(config.r, config.r, config.projection_prng_key, layers)
        return {"vera_A": a, "vera_B": b}

    def create(self, config: VeraConfig, key: str) -> None:
        self.r, self.vera_dropout = config.r, config.vera_dropout
        self.vera_lambda_b, self.vera_lambda_d = vectors(self.shape[0], config.r, config)

    def frozen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, cut to this layer."""
        (rows, columns), d = fan(self.shape), self.vera_lambda_d
        return self.vera_A[:, :columns].to(d), self.vera_B[:rows].to(d)

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first is frozen, so that no gradient needs the input."""
        return vera_pair(*self.frozen(), self.vera_lambda_d, self.vera_lambda_b)

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        vera = fused(layer, adapters, x)
        if vera is None:
            return super().kernel(layer, adapters, x)
        a, b = vera.frozen()
        h, made = projected(layer, vera.dropped(x), a)
        # what another layer's A x has saved is spent on keeping less
        return raised(layer, x, h, vera.vera_lambda_d, vera.vera_lambda_b, b, keeps=not made)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        base, kind, d, (a, b) = self.base, self.kind, self.vera_lambda_d, self.frozen()
        groups = getattr(base, "groups", 1)  # each has its own A x
        h = kind.down(base, self.dropped(x), a) * self.along_channels(d if groups == 1 else d.repeat(groups))
        return kind.up(base, h, b) * self.along_channels(self.vera_lambda_b)


VeraModel = define_tuner(Vera, VeraConfig, prefix="vera_lambda_")
