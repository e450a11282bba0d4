"""PVeRA: VeRA whose inner activations are drawn from a normal distribution that it learns (arXiv 2512.07703)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from peft.config import option
from peft.core.adapter import input_dropout, part, setting, shared
from peft.core.families import LowRank
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.kernels import Factors
from peft.peft_types import PeftType
from peft.tuners.vera_utils import SharedPair, SharedPairConfig, vera_pair


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


def pvera_draw(mean: torch.Tensor, log_variance: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """z = mu + s e of z ~ N(mu, s^2): inner activations, drawn with the noise e; all of one shape.

    (mu, log s^2) = d * (A x) with A ``[2 r, in]``, and y' = y + b * (B z).
    """
    return torch.addcmul(mean, (log_variance / 2).exp(), noise)


class Drawn(torch.autograd.Function):
    """The same z ``[n, r]`` from A x ``[n, 2 r]`` and d ``[2 r]``, of which autograd keeps no more than these."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, d: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h, d, noise)
        mean, log_variance = (h * d).chunk(2, -1)
        return pvera_draw(mean, log_variance, noise)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        h, d, noise = ctx.saved_tensors
        deviation = (h.chunk(2, -1)[1] * (d.chunk(2)[1] / 2)).exp()
        both = torch.cat((gradient, gradient * noise * deviation / 2), -1)
        return both * d, (both * h).sum(0), None


class Pvera(SharedPair):
    """(mu, log s^2) = d * (A x) with A ``[2 r, in]``; y' = y + b * (B z), z = mu + s e in training and mu else.

    As a weight it is that of the mean: dW = diag(b) B diag(d) A with the first halves of d and A.
    """

    pvera_lambda_b, pvera_lambda_d = part(), part()
    pvera_A, pvera_B = shared(frozen=True), shared(frozen=True)
    r, pvera_dropout = setting(), input_dropout()
    sample_at_inference, pvera_generator = setting(), setting()
    random_in_training = True
    draws: ClassVar[int] = 2

    def create(self, config: PveraConfig, key: str) -> None:
        seed = config.generator_seed
        self.r, self.sample_at_inference = config.r, config.sample_at_inference
        self.pvera_generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        self.start(config)
        self.pvera_dropout = config.pvera_dropout

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.frozen()
        return vera_pair(a.chunk(2)[0], b, self.pvera_lambda_d.chunk(2)[0], self.pvera_lambda_b)

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        return super().kernel(layer, adapters, x) if adapters[0].samples() else None

    def drawn(self, h: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, None]:
        return Drawn.apply(h, d, self.noise(h.new_empty(()).expand(len(h), self.r))), None

    def inner(self, h: torch.Tensor) -> torch.Tensor:
        mean, log_variance = halves(h, getattr(self.base, "groups", 1), self.kind.channel_axis)
        return pvera_draw(mean, log_variance, self.noise(mean))

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return super().delta(x) if self.samples() else LowRank.delta(self, x)

    def factors(self) -> Factors | None:
        return None if self.samples() else super().factors()

    def samples(self) -> bool:
        """Whether z is drawn, and not its mean."""
        return self.training or self.sample_at_inference

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        """e of :func:`pvera_draw`."""
        if self.pvera_generator is None:
            return torch.randn(like.shape, dtype=like.dtype, device=like.device)
        # drawn on the CPU, so that a seed means the same on every device
        return torch.randn(like.shape, generator=self.pvera_generator).to(like)


def halves(x: torch.Tensor, groups: int, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of the channels, or of those of each group."""
    if groups == 1:
        first, second = x.chunk(2, axis)
    else:
        parts = x.unflatten(axis, (groups, 2, -1))  # [..., groups, half, channels of a half, ...]
        first, second = (part.flatten(axis - 1, axis) for part in parts.unbind(axis - 1))
    return first, second


PveraModel = define_tuner(Pvera, PveraConfig, prefix="pvera_lambda_")
