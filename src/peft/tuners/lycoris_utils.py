"""What LoHa and LoKr share: config fields, scale, dropouts of whole rows and of the whole update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft._lazy import also_known
from peft.compat.methods import LycorisCompat
from peft.config import ExcludeModules, LayerSelection, ModulesToSave, RankPatterns, TargetModules, option
from peft.core.adapter import setting
from peft.core.base.kinds import Kind
from peft.core.families import Scaled
from peft.core.layer.scaled import ScaledLayer
from peft.core.model.tuner import BaseTuner
from peft.usage import counts


@dataclass
class LycorisConfig(RankPatterns, TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Fields of the methods that come from LyCORIS (arXiv 2309.14859)."""

    r: int = option(8, "Rank of the factors.", minimum=1)
    alpha: int = option(8, "The update is scaled by alpha / r.", stuck=0)
    rank_dropout: float = option(
        0.0, "Share of the outputs that get no update in a training step.", minimum=0, below=1
    )
    module_dropout: float = option(
        0.0, "Probability of leaving out the whole update of a layer in a training step.", minimum=0, below=1
    )
    use_effective_conv2d: bool = option(
        False,
        "Give convolutions with a kernel larger than 1 a core tensor [r, r, *kernel] between smaller factors.",
        lacks="no adapted layer is a convolution with a larger kernel and factors of low rank",
    )


class LycorisLayer(ScaledLayer):
    """A layer with LoHa or LoKr adapters."""


class Lycoris(Scaled):
    """dW, scaled by alpha / r. A method defines :meth:`delta_weight` and, where cheaper, :meth:`product`."""

    r, alpha, scaling, rank_dropout = setting(), setting(), setting(), setting()
    rank_dropout_scale, module_dropout = setting(), setting()
    layer_base: ClassVar[Any] = LycorisLayer

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: LycorisConfig) -> str | None:
        if kind.read_elsewhere and (config.rank_dropout or config.module_dropout):
            return "its weight is not used by calling it, so rank_dropout and module_dropout have no place there"
        return None

    def create(self, config: Any, key: str) -> None:
        self.r = config.rank_at(key)
        self.alpha = config.alpha_at(key)
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.rank_dropout_scale = getattr(config, "rank_dropout_scale", True)
        self.scaling = self.initial_scaling()

    def has_core(self, config: LycorisConfig) -> bool:
        """Whether a convolution's factors have a core tensor between them."""
        found = config.use_effective_conv2d and math.prod(self.shape[2:]) > 1
        if found:
            counts("use_effective_conv2d")
        return found

    def core_shape(self, r: int) -> tuple[int, ...]:
        """Shape of that tensor. The file format gives kernels of one dimension a second one of size 1."""
        kernel = self.shape[2:]
        return (r, r, *kernel, 1) if len(kernel) == 1 else (r, r, *kernel)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """dW x, without dropout."""
        return super().delta(x)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x)
        if not self.training:
            return y
        if p := self.module_dropout:  # multiplied and not skipped: every parameter gets a gradient
            y = y * (torch.rand(1, device=y.device) > p).to(y.dtype)
        if p := self.rank_dropout:
            kept = (torch.rand(self.shape[0], device=y.device) > p).to(y.dtype)
            if self.rank_dropout_scale:
                kept = kept / kept.mean().clamp_min(1 / len(kept))
            y = y * self.along_channels(kept)
        return y

    def initial_scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.r


class LycorisTuner(LycorisCompat, BaseTuner):
    """Base of the tuners of these methods."""


def through_core(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor, shape: Any) -> torch.Tensor:
    """Sum over ranks i, j of ``core[i, j] a[i, out] b[j, in]``: a convolution's weight ``[out, in, *kernel]``."""
    return torch.einsum("ijk,io,jn->onk", core.flatten(2), a, b).contiguous().view(shape)


def mix(w: torch.Tensor, x: torch.Tensor, dims: int) -> torch.Tensor:
    """``w`` applied to the channels of x, which stand before the last ``dims`` axes."""
    return x @ w.mT if dims == 0 else (w @ x.flatten(-dims)).unflatten(-1, x.shape[-dims:])


also_known(__name__)
