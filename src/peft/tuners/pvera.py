"""PVeRA: VeRA whose inner activations are drawn from a normal distribution that it learns (arXiv 2512.07703)."""

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
from peft.kernels import Factors
from peft.tuners.vera_utils import ScaledTable, SharedPairConfig, shared_pair, vectors
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


@dataclass
class PveraConfig(SharedPairConfig):
    """Config of PVeRA: VeRA that draws its inner activations, y' = y + b * (B z), z ~ N(d_mu A x, exp(d_sigma A x)).

    For very few trained parameters with some regularisation from the noise, and for uncertainty estimates from
    several draws (``sample_at_inference``).
    """

    METHOD: ClassVar[PeftType] = PeftType.PVERA
    OWN_BIAS: ClassVar[str] = "pvera_only"

    pvera_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    sample_at_inference: bool = option(
        False, "Draw z in evaluation mode too, as in training; otherwise it is the mean. A merged adapter is its mean."
    )
    generator_seed: int | None = option(None, "Seed of the draws of z; None: they come from torch's own generator.")


class PveraLayer(LowRankLayer):
    """(mu, log s^2) = d * (A x) with A ``[2 r, in]``; y' = y + b * (B z), z = mu + s e in training and mu else.

    As a weight it is that of the mean: dW = diag(b) B diag(d) A with the first halves of d and A.
    """

    weights: ClassVar[dict[str, type]] = {"pvera_lambda_b": nn.ParameterDict, "pvera_lambda_d": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {
        "r": dict,
        "pvera_dropout": nn.ModuleDict,
        "sample_at_inference": dict,
        "pvera_generator": dict,
    }
    shared: ClassVar[tuple[str, ...]] = ("pvera_A", "pvera_B")
    dropout: ClassVar[str] = "pvera_dropout"
    random_in_training: ClassVar[bool] = True

    @classmethod
    def share(cls, config: PveraConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, torch.Tensor]:
        """A ``[2 r, largest in]`` and B ``[largest out, r]``."""
        a, b = shared_pair(2 * config.r, config.r, config.projection_prng_key, layers)
        return {"pvera_A": a, "pvera_B": b}

    def update_layer(self, name: str, config: PveraConfig, key: str) -> None:
        b, d = vectors(self.shape[0], 2 * config.r, config)
        seed = config.generator_seed
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        self.put(name, r=config.r, sample_at_inference=config.sample_at_inference, pvera_generator=generator)
        self.put(name, pvera_lambda_b=b, pvera_lambda_d=d, pvera_dropout=input_dropout(config.pvera_dropout))

    def down(self, name: str) -> torch.Tensor:
        """A for the mean, then for the log-variance, ``[2 r, in * kernel]``, cut to this layer."""
        return self.pvera_A[name][:, : fan(self.shape)[1]].to(self.dtype_of(name))

    def up(self, name: str) -> torch.Tensor:
        """B, ``[out, r]``, cut to this layer."""
        return self.pvera_B[name][: self.shape[0]].to(self.dtype_of(name))

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        b, d = self.pvera_lambda_b[name], self.pvera_lambda_d[name].chunk(2)[0]
        return self.down(name).chunk(2)[0], ScaledTable.apply(b, self.up(name), d)

    def factors(self, name: str) -> Factors | None:
        return None if self.samples(name) else super().factors(name)

    def samples(self, name: str) -> bool:
        """Whether z is drawn, and not its mean."""
        return self.training or self.sample_at_inference[name]

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if not self.samples(name):
            return super().delta(name, x)
        base, x = self.get_base_layer(), self.dropped(name, x)
        groups = getattr(base, "groups", 1)  # each has its own A x
        a, d, axis = self.down(name), self.pvera_lambda_d[name], self.kind.channel_axis
        both = self.kind.down(base, x, a) * self.kind.along_channels(d if groups == 1 else d.repeat(groups), base)
        if groups == 1:
            center, spread = both.chunk(2, axis)
        else:
            parts = both.unflatten(axis, (groups, 2, -1))
            center, spread = (part.flatten(axis - 1, axis) for part in parts.unbind(axis - 1))
        generator = self.pvera_generator[name]
        if generator is None:
            noise = torch.randn_like(center)
        else:  # drawn on the CPU, so that a seed means the same on every device
            noise = torch.randn(center.shape, generator=generator).to(center)
        z = torch.addcmul(center, (spread / 2).exp(), noise)
        return self.kind.up(base, z, self.up(name)) * self.kind.along_channels(self.pvera_lambda_b[name], base)


PveraModel = define_tuner(
    "PveraModel",
    PveraLayer,
    PveraConfig,
    prefix="pvera_lambda_",
    targets=TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING,
)
