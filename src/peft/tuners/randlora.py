"""RandLoRA: dW = s sum_n B_n diag(lambda_n) A diag(gamma_n), of full rank, with frozen random bases (2502.00987)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import input_dropout, part, setting, shared
from peft.core.base.kinds import fan
from peft.core.families import LowRank, ScaledBy
from peft.core.layer import routes
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.kernels.few import is_small
from peft.kernels.linear import is_transformed
from peft.kernels.made_again import made_again, reading
from peft.peft_types import PeftType


@dataclass
class RandLoraConfig(TargetModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of RandLoRA: weighted sums of frozen random products, as many as the update needs to have full rank.

    For when low rank holds a task back: the update has full rank at about the parameters of a LoRA, for more time in
    each step.
    """

    METHOD: ClassVar[PeftType] = PeftType.RANDLORA
    OWN_BIAS: ClassVar[str] = "randlora_only"

    r: int = option(32, "Rank of each basis. A smaller one means more bases, and more trained parameters.", minimum=1)
    projection_prng_key: int = option(0, "Seed of the bases.")
    save_projection: bool = option(
        True, "Write the bases into the file. Without, they are drawn anew from projection_prng_key when it is loaded."
    )
    sparse: bool = option(False, "Bases of -1, 0 and 1 (then scaled), 0 with the probability 2/3.")
    very_sparse: bool = option(
        False, "As sparse, but 0 with the probability 1 - 1/sqrt(d), d the smaller side of the largest layer."
    )
    randlora_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    randlora_alpha: int = option(640, "The update is scaled by randlora_alpha / r; about 20 r is usual.", stuck=0)
    init_weights: bool = option(True, "Start with lambda = 0, so that nothing changes; otherwise lambda is random.")


class WeightedBases(torch.autograd.Function):
    """lambda[p, n] A[p] gamma[n] as ``[r * N, width]``, keeping only the factors for the backward pass."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, basis: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """Weights ``[r, N]``, basis ``[r, width]``, gamma ``[N, width]``."""
        ctx.save_for_backward(weights, basis, gamma)
        result = basis.new_empty(weights.numel(), basis.shape[1])  # no view of another: what is one is not made again
        torch.mul(basis[:, None], gamma[None], out=result.view(*weights.shape, -1)).mul_(weights[:, :, None])
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:  # type: ignore[override]
        weights, basis, gamma = ctx.saved_tensors
        each = gradient.view(*weights.shape, -1) * basis[:, None]
        return (each * gamma).sum(-1), None, torch.einsum("rn,rnw->nw", weights, each)


def weighted_bases(weights: torch.Tensor, basis: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """What :class:`WeightedBases` gives, by plain operations where ``torch.func`` or a compiler is at work."""
    few = is_small(weights.shape[1] * basis.numel())
    if few or is_transformed() or torch.compiler.is_compiling():  # an exported program may run where gradients are on
        return (basis[:, None] * gamma * weights[:, :, None]).flatten(0, 1)
    return WeightedBases.apply(weights, basis, gamma)


def randlora_pair(
    weights: torch.Tensor, gamma: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' ``[r N, narrow]`` and B' ``[wide, r N]`` of dW = B' A' = sum B_n diag(lambda_n) A diag(gamma_n).

    Column ``n r + p`` of B' is ``B[:, n, p]``; row ``p N + n`` of A' is ``lambda[p, n] A[p] gamma[n]``. So B and A are
    paired in different orders, and the sum is not the paper's, basis by basis. With random bases both are as good, and
    the format of the files has the former.

    Args:
        weights: lambda ``[r, N]``, times the scale. gamma: ``[N, narrow]``. a: A ``[r, narrow]``.
        b: B ``[wide, bases of the largest layer, r]``, of which the first N are used.
    """
    a = made_again(weighted_bases, weights, a, gamma, entries=gamma.numel() * len(a))
    return a, b.flatten(1)[:, : len(a)]


class RandLora(LowRank, ScaledBy):
    """dW = s B' A', transposed where out < in: the wide side of the layer belongs to B, the narrow one to A.

    B' and A' are sums of products in an order that is not the paper's: see :func:`randlora_pair`.
    """

    randlora_lambda, randlora_gamma = part(), part()
    randlora_A, randlora_B = shared(frozen=True), shared(frozen=True)
    r, num_bases, randlora_alpha, randlora_dropout = setting(), setting(), setting(), input_dropout()

    @classmethod
    def share(cls, config: RandLoraConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, torch.Tensor]:
        """A ``[r, 1, narrow]`` and B ``[wide, N, r]`` for the largest layer, both with the standard deviation 1."""
        narrow, wide = sorted(map(max, zip(*(fan(layer.shape) for layer in layers))))
        a, b = drawn_bases(config, narrow, wide)
        return {"randlora_A": (a / a.std()).float(), "randlora_B": (b / b.std()).float().contiguous()}

    def create(self, config: RandLoraConfig, key: str) -> None:
        narrow, r = min(fan(self.shape)), config.r
        self.r, self.randlora_alpha, self.num_bases = r, config.randlora_alpha, (bases := -(-narrow // r))
        self.scale_by(config.randlora_alpha / r)
        self.randlora_dropout = config.randlora_dropout
        start = torch.zeros(r, bases) if config.init_weights else torch.randn(r, bases) * 0.1
        self.randlora_lambda = nn.Parameter(start)
        self.randlora_gamma = nn.Parameter(torch.full((bases, narrow), 1 / max(bases, narrow)))

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        """The fused products, of which autograd keeps no A', which is as large as the weight."""
        with reading(x):
            return routes.low_rank(layer, adapters, (x,), {})

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        weights, (out, inner) = self.randlora_lambda, fan(self.shape)
        narrow, wide = sorted((out, inner))
        bases = self.randlora_A[:, 0, :narrow].to(weights), self.randlora_B[:wide].to(weights)
        a, b = randlora_pair(weights * self.scaling, self.randlora_gamma, *bases)
        return (b.T, a.T) if out < inner else (a, b)


def drawn_bases(config: RandLoraConfig, narrow: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[r, 1, narrow]`` and B ``[wide, N, r]``, of any standard deviation."""
    bases, generator = -(-narrow // config.r), torch.Generator().manual_seed(config.projection_prng_key)
    shapes = (config.r, 1, narrow), (wide, bases, config.r)
    if config.sparse or config.very_sparse:
        chance = 0.5 / math.sqrt(narrow) if config.very_sparse else 1 / 6
        drawn = [torch.rand(shape, generator=generator) for shape in shapes]
        a, b = ((u > 1 - chance).float() - (u < chance).float() for u in drawn)
        return a, b
    a = _uniform(shapes[0], narrow, generator)
    return a, _uniform((bases, wide, config.r), config.r, generator).transpose(0, 1)


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform in +-1 / sqrt(fan in); drawn in bfloat16, as files without the bases rely on."""
    bound = math.sqrt(1 / fan_in)
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


RandLoraModel = define_tuner(RandLora, RandLoraConfig)
