"""LoKr: a Kronecker product (LyCORIS, arXiv 2309.14859, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from peft.config import option
from peft.core.adapter import part
from peft.core.filling import kaiming, zeros
from peft.core.model.registry import define_tuner
from peft.kernels.made_again import made_again
from peft.peft_types import PeftType
from peft.tuners.lycoris_utils import Lycoris, LycorisConfig, LycorisTuner, mix, through_core
from peft.usage import counts


@dataclass
class LoKrConfig(LycorisConfig):
    """Config of LoKr: dW = s W1 (x) W2, with W2, and W1 if asked for, low-rank where that is smaller.

    For very small files in image generation: the Kronecker product has full rank where both factors have, at few
    parameters.
    """

    METHOD: ClassVar[PeftType] = PeftType.LOKR

    decompose_both: bool = option(
        False, "Whether W1 can be low-rank too.", lacks="W1 of no adapted layer is large enough to be of low rank"
    )
    decompose_factor: int = option(
        -1, "Size of W1, in layers it divides, and the most in others; -1: W1 and W2 as equal as can be.", minimum=-1
    )
    rank_dropout_scale: bool = option(
        False, "Whether rank_dropout scales up the outputs that it keeps.", needs="rank_dropout"
    )
    init_weights: bool | str = option(
        True,
        "Start with W1 = 0, or with 'lycoris' W2 = 0, so that nothing changes; otherwise at random numbers.",
        choices=(True, False, "lycoris"),
    )


def lokr_weight(
    first: torch.Tensor, second: torch.Tensor, shape: tuple[int, ...], by_rows: bool = False
) -> torch.Tensor:
    """dW / s = W1 (x) W2, ``[out, in, *kernel]``.

    Args:
        first, second: W1 ``[o1, i1]`` and W2 ``[o2, i2, *kernel]``. shape: of dW.
        by_rows: multiply three axes of W2 with ``W1[None]`` and read the product row by row.
    """
    axes = (1, *first.shape) if by_rows else (*first.shape, *[1] * len(shape[2:]))
    return torch.kron(first.view(axes), second).view(shape)


def lokr_factor(
    whole: torch.Tensor | None, a: Any, b: Any, core: torch.Tensor | None = None, kernel: tuple[int, ...] = ()
) -> torch.Tensor:
    """W1 or W2 from what is held of it: itself, or a pair, which may have a core between.

    Args:
        a, b: ``[o, r]`` and ``[r, i * kernel]``; with a core ``[r, o]`` and ``[r, i]``. core: ``[r, r, *kernel]``.
        kernel: that of W2, where the core does not tell.
    """
    if whole is not None:
        return whole
    if core is not None:
        return through_core(a, b, core, (a.shape[1], b.shape[1], *(kernel or core.shape[2:])))
    return (a @ b).unflatten(1, (-1, *kernel)) if kernel else a @ b


def lokr_product(
    x: torch.Tensor, first: torch.Tensor, second: Callable[[torch.Tensor], torch.Tensor], dims: int
) -> torch.Tensor:
    """(W1 (x) W2) x without the product: x as ``[i1, i2]``, then W2 acts on its rows and W1 on its columns.

    Args:
        x: ``[..., in, *positions]``. first: W1 ``[o1, i1]``. second: W2 x. dims: the number of axes after ``in``.
    """
    i1, lead = first.shape[1], x.shape[: -dims - 1]
    y = second(x.unflatten(-dims - 1, (i1, -1)).flatten(0, -dims - 2))  # [batch i1, o2, *positions]
    mixed = first @ y.flatten(1).unflatten(0, (*lead, i1))  # [..., o1, o2 positions]
    return mixed.unflatten(-1, y.shape[1:]).flatten(-dims - 2, -dims - 1)


class LoKr(Lycoris):
    """dW = s W1 (x) W2, W1 ``[o1, i1]`` and W2 ``[o2, i2, *kernel]``, o1 o2 = out and i1 i2 = in.

    A low-rank W1 is a pair ``[o1, r]``, ``[r, i1]``; W2 is ``[o2, r]``, ``[r, i2 * kernel]``. With
    ``use_effective_conv2d`` a low-rank W2 goes through a core ``[r, r, *kernel]``, and is ``[r, o2]``, ``[r, i2]``.

    In the file format, a whole W2 of a ``Conv1d`` is multiplied as three axes with ``W1[None]`` and the product read
    as ``[out, in, kernel]``, row by row.
    """

    lokr_w1, lokr_w1_a, lokr_w1_b, lokr_w2, lokr_w2_a = part(), part(), part(), part(), part()
    lokr_w2_b, lokr_t2 = part(), part()

    def create(self, config: LoKrConfig, key: str) -> None:
        super().create(config, key)
        r, (out, inner, *kernel) = self.r, self.shape
        o1, o2 = factorization(out, config.decompose_factor)
        i1, i2 = factorization(inner, config.decompose_factor)
        first = zeros if config.init_weights is True else kaiming  # what makes W1 zero, or not
        last = zeros if config.init_weights == "lycoris" else kaiming
        if config.decompose_both and r < max(o1, i1) / 2:
            counts("decompose_both")
            self.lokr_w1_a, self.lokr_w1_b = first(o1, r), kaiming(r, i1)
        else:
            self.lokr_w1 = first(o1, i1)
        if r >= max(o2, i2) / 2:
            self.lokr_w2 = last(o2, i2, *kernel)
        elif self.has_core(config):
            self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2 = kaiming(r, o2), last(r, i2), kaiming(*self.core_shape(r))
        else:
            self.lokr_w2_a, self.lokr_w2_b = kaiming(o2, r), last(r, i2 * math.prod(kernel))

    def first(self) -> torch.Tensor:
        """W1, ``[o1, i1]``."""
        return lokr_factor(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b)

    def second(self) -> torch.Tensor:
        """W2, ``[o2, i2, *kernel]``."""
        return lokr_factor(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2, self.shape[2:])

    def delta_weight(self) -> torch.Tensor:
        return lokr_weight(self.first(), self.second(), self.shape, self._reads_rows()) * self.scaling

    def _reads_rows(self) -> bool:
        return len(self.shape) == 3 and self.lokr_w2 is not None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """dW x, without dW where that is possible."""
        first, dims = self.first() * self.scaling, len(self.shape) - 2
        if self.kind.lookup:
            table = self.second().T
            outer, inner = F.embedding(x // len(table), first.T), F.embedding(x % len(table), table)
            return self.kind.scaled(self.base, (outer[..., None] * inner[..., None, :]).flatten(-2))
        if self._reads_rows() or (dims and self.shape[1] != self.in_features):  # groups have no such x
            return super().product(x)
        a, b = self.lokr_w2_a, self.lokr_w2_b
        by_rank = a is not None and self.lokr_t2 is None and a.numel() + b.numel() < len(a) * b.shape[1]
        second = (a, b) if by_rank else (self.second(),)

        def product(x: torch.Tensor, first: torch.Tensor, *second: torch.Tensor) -> torch.Tensor:
            return lokr_product(x, first, lambda rows: self._apply_second(rows, *second), dims)

        return made_again(product, x, first, *second, entries=x.numel())

    def _apply_second(self, rows: torch.Tensor, *second: torch.Tensor) -> torch.Tensor:
        """W2 x, by way of the rank where that is cheaper."""
        if len(second) == 1:
            return self.kind.apply(self.base, rows, *second)
        a, b = second  # [out, r], [r, in, *kernel]
        return mix(a, self.kind.apply(self.base, rows, b.view(len(b), -1, *self.shape[2:])), len(self.shape) - 2)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers m, n with m n = dimension.

    ``(factor, dimension / factor)`` if that is whole, else m <= n as close to each other as can be with m <= factor
    (-1: without that limit).
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension)
    limit = limit if factor == -1 else min(limit, factor)
    m = next((m for m in range(limit, 1, -1) if dimension % m == 0), 1)
    return m, dimension // m


LoKrModel = define_tuner(LoKr, LoKrConfig, base=LycorisTuner)
