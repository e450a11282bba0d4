"""LoKr: a Kronecker product (LyCORIS, arXiv 2309.14859, section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import option
from peft.core.model.registry import define_tuner
from peft.tuners.lycoris_utils import LycorisConfig, LycorisLayer, LycorisTuner, kaiming, mix, through_core, zeros
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


@dataclass
class LoKrConfig(LycorisConfig):
    """Config of LoKr: dW = s W1 (x) W2, with W2, and W1 if asked for, low-rank where that is smaller.

    For very small files in image generation: the Kronecker product has full rank where both factors have, at few
    parameters.
    """

    METHOD: ClassVar[PeftType] = PeftType.LOKR

    decompose_both: bool = option(False, "Whether W1 can be low-rank too.")
    decompose_factor: int = option(
        -1, "Size of W1, in layers it divides, and the most in others; -1: W1 and W2 as equal as can be.", minimum=-1
    )
    rank_dropout_scale: bool = option(False, "Whether rank_dropout scales up the outputs that it keeps.")
    init_weights: bool | str = option(
        True,
        "Start with W1 = 0, or with 'lycoris' W2 = 0, so that nothing changes; otherwise at random numbers.",
        choices=(True, False, "lycoris"),
    )


class LoKrLayer(LycorisLayer):
    """dW = s W1 (x) W2, W1 ``[o1, i1]`` and W2 ``[o2, i2, *kernel]``, o1 o2 = out and i1 i2 = in.

    A low-rank W1 is a pair ``[o1, r]``, ``[r, i1]``; W2 is ``[o2, r]``, ``[r, i2 * kernel]``. With
    ``use_effective_conv2d`` a low-rank W2 goes through a core ``[r, r, *kernel]``, and is ``[r, o2]``, ``[r, i2]``.

    In the file format, a whole W2 of a ``Conv1d`` is multiplied as three axes with ``W1[None]`` and the product read
    as ``[out, in, kernel]``, row by row.
    """

    weights: ClassVar[dict[str, type]] = dict.fromkeys(
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), nn.ParameterDict
    )

    def update_layer(self, name: str, config: LoKrConfig, key: str) -> None:
        super().update_layer(name, config, key)
        r, (out, inner, *kernel) = self.r[name], self.shape
        o1, o2 = factorization(out, config.decompose_factor)
        i1, i2 = factorization(inner, config.decompose_factor)
        first = zeros if config.init_weights is True else kaiming  # what makes W1 zero, or not
        last = zeros if config.init_weights == "lycoris" else kaiming
        if config.decompose_both and r < max(o1, i1) / 2:
            self.put(name, lokr_w1_a=first(o1, r), lokr_w1_b=kaiming(r, i1))
        else:
            self.put(name, lokr_w1=first(o1, i1))
        if r >= max(o2, i2) / 2:
            self.put(name, lokr_w2=last(o2, i2, *kernel))
        elif self.has_core(config):
            self.put(name, lokr_w2_a=kaiming(r, o2), lokr_w2_b=last(r, i2), lokr_t2=kaiming(*self.core_shape(r)))
        else:
            self.put(name, lokr_w2_a=kaiming(o2, r), lokr_w2_b=last(r, i2 * math.prod(kernel)))

    def first(self, name: str) -> torch.Tensor:
        """W1, ``[o1, i1]``."""
        return self.lokr_w1[name] if name in self.lokr_w1 else self.lokr_w1_a[name] @ self.lokr_w1_b[name]

    def second(self, name: str) -> torch.Tensor:
        """W2, ``[o2, i2, *kernel]``."""
        if name in self.lokr_w2:
            return self.lokr_w2[name]
        a, b, kernel = self.lokr_w2_a[name], self.lokr_w2_b[name], self.shape[2:]
        if name in self.lokr_t2:
            return through_core(a, b, self.lokr_t2[name], (a.shape[1], b.shape[1], *kernel))
        return (a @ b).view(a.shape[0], -1, *kernel)

    def delta_weight(self, name: str) -> torch.Tensor:
        first, second = self.first(name), self.second(name)
        axes = (1, *first.shape) if self._reads_rows(name) else (*first.shape, *[1] * len(self.shape[2:]))
        return torch.kron(first.view(axes), second).view(self.shape) * self.scaling[name]

    def _reads_rows(self, name: str) -> bool:
        return len(self.shape) == 3 and name in self.lokr_w2

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """dW x without dW: x as ``[i1, i2]``, then W2 acts on its rows and W1 on its columns."""
        base, first, dims = self.get_base_layer(), self.first(name) * self.scaling[name], len(self.shape) - 2
        if self.kind.lookup:
            table = self.second(name).T
            outer, inner = F.embedding(x // len(table), first.T), F.embedding(x % len(table), table)
            return self.kind.scaled(base, (outer[..., None] * inner[..., None, :]).flatten(-2))
        if self._reads_rows(name) or (dims and self.shape[1] != self.in_features):  # groups have no such x
            return super().product(name, x)
        i1, lead = first.shape[1], x.shape[: -dims - 1]
        y = self._rows(name, x.unflatten(-dims - 1, (i1, -1)).flatten(0, -dims - 2), dims)
        mixed = first @ y.flatten(1).unflatten(0, (*lead, i1))
        return mixed.unflatten(-1, y.shape[1:]).flatten(-dims - 2, -dims - 1)

    def _rows(self, name: str, rows: torch.Tensor, dims: int) -> torch.Tensor:
        """W2 x, by way of the rank where that is cheaper."""
        base = self.get_base_layer()
        if name in self.lokr_w2_a and name not in self.lokr_t2:
            a, b = self.lokr_w2_a[name], self.lokr_w2_b[name]
            if a.numel() + b.numel() < len(a) * b.shape[1]:
                return mix(a, self.kind.apply(base, rows, b.view(len(b), -1, *self.shape[2:])), dims)
        return self.kind.apply(base, rows, self.second(name))


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


LoKrModel = define_tuner(
    "LoKrModel",
    LoKrLayer,
    LoKrConfig,
    prefix="lokr_",
    targets=TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING,
    base=LycorisTuner,
)
