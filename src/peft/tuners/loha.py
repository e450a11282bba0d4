"""LoHa: a Hadamard product of two low-rank matrices (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from peft.config import option
from peft.core.adapter import part
from peft.core.base.kinds import fan
from peft.core.filling import kaiming, zeros
from peft.core.model.registry import define_tuner
from peft.kernels.decompositions import face_splitting
from peft.peft_types import PeftType
from peft.tuners.lycoris_utils import Lycoris, LycorisConfig, LycorisTuner, mix, through_core


@dataclass
class LoHaConfig(LycorisConfig):
    """Config of LoHa: dW = s (A1 B1) * (A2 B2), entry by entry, of rank up to r^2.

    For concepts and styles in image generation, where a higher rank at the size of a LoRA helps; it has kernels
    of convolutions of its own (``use_effective_conv2d``).
    """

    METHOD: ClassVar[PeftType] = PeftType.LOHA

    init_weights: bool = option(True, "Start with B2 = 0, so that nothing changes; otherwise at random numbers.")


def loha_weight(
    a1: torch.Tensor,
    b1: torch.Tensor,
    a2: torch.Tensor,
    b2: torch.Tensor,
    cores: tuple[torch.Tensor, torch.Tensor] | None,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """dW / s = (A1 B1) * (A2 B2), ``[out, in, *kernel]``.

    Args:
        a1, b1, a2, b2: A ``[out, r]`` and B ``[r, in * kernel]``; with cores ``[r, out]`` and ``[r, in]``.
        cores: t1 and t2 ``[r, r, *kernel]`` between the two of a pair, or None. shape: of dW.
    """
    if cores is None:
        return (a1 @ b1).view(shape) * (a2 @ b2).view(shape)
    return through_core(a1, b1, cores[0], shape) * through_core(a2, b2, cores[1], shape)


class LoHa(Lycoris):
    """dW = s (A1 B1) * (A2 B2), A ``[out, r]`` and B ``[r, in * kernel]``.

    With ``use_effective_conv2d`` each product goes through a core t ``[r, r, *kernel]``; then A is ``[r, out]`` and B
    is ``[r, in]``.
    """

    hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, hada_t1 = part(), part(), part(), part(), part()
    hada_t2 = part()

    def create(self, config: LoHaConfig, key: str) -> None:
        super().create(config, key)
        r, (out, columns), core = self.r, fan(self.shape), self.has_core(config)
        a, b = ((r, out), (r, self.shape[1])) if core else ((out, r), (r, columns))
        self.hada_w1_a, self.hada_w1_b, self.hada_w2_a = kaiming(*a), kaiming(*b), kaiming(*a)
        self.hada_w2_b = zeros(*b) if config.init_weights else kaiming(*b)
        if core:
            self.hada_t1, self.hada_t2 = kaiming(*self.core_shape(r)), kaiming(*self.core_shape(r))

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A1, B1, A2, B2."""
        return self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b

    def delta_weight(self) -> torch.Tensor:
        cores = None if self.hada_t1 is None else (self.hada_t1, self.hada_t2)
        return loha_weight(*self.pairs(), cores, self.shape) * self.scaling

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """dW x without dW, where that is cheaper."""
        a1, b1, a2, b2 = self.pairs()
        if self.kind.lookup:
            first, second = F.embedding(x, b1.T) @ a1.T, F.embedding(x, b2.T) @ a2.T
            return self.kind.scaled(self.base, first * second) * self.scaling
        r, (out, columns) = self.r, fan(self.shape)
        grouped = len(self.shape) > 2 and self.shape[1] != self.in_features
        if grouped or self.hada_t1 is not None or r * r * (out + columns) >= out * columns:
            return super().product(x)
        a, b = face_splitting(a1, b1, a2, b2)
        inner = self.kind.apply(self.base, x, b.view(r * r, *self.shape[1:]))  # b: [r * r, in, *kernel]
        return mix(a, inner, len(self.shape) - 2) * self.scaling


LoHaModel = define_tuner(LoHa, LoHaConfig, base=LycorisTuner)
