"""LoHa: a Hadamard product of two low-rank matrices (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import option
from peft.core.base.kinds import fan
from peft.core.model.registry import define_tuner
from peft.tuners.lycoris_utils import LycorisConfig, LycorisLayer, LycorisTuner, kaiming, mix, through_core, zeros
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


@dataclass
class LoHaConfig(LycorisConfig):
    """Config of LoHa: dW = s (A1 B1) * (A2 B2), entry by entry, of rank up to r^2.

    For concepts and styles in image generation, where a higher rank at the size of a LoRA helps; it has kernels
    of convolutions of its own (``use_effective_conv2d``).
    """

    METHOD: ClassVar[PeftType] = PeftType.LOHA

    init_weights: bool = option(True, "Start with B2 = 0, so that nothing changes; otherwise at random numbers.")


class LoHaLayer(LycorisLayer):
    """dW = s (A1 B1) * (A2 B2), A ``[out, r]`` and B ``[r, in * kernel]``.

    With ``use_effective_conv2d`` each product goes through a core t ``[r, r, *kernel]``; then A is ``[r, out]`` and B
    is ``[r, in]``.
    """

    weights: ClassVar[dict[str, type]] = dict.fromkeys(
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), nn.ParameterDict
    )

    def update_layer(self, name: str, config: LoHaConfig, key: str) -> None:
        super().update_layer(name, config, key)
        r, (out, columns), core = self.r[name], fan(self.shape), self.has_core(config)
        a, b = ((r, out), (r, self.shape[1])) if core else ((out, r), (r, columns))
        self.put(name, hada_w1_a=kaiming(*a), hada_w1_b=kaiming(*b), hada_w2_a=kaiming(*a))
        self.put(name, hada_w2_b=zeros(*b) if config.init_weights else kaiming(*b))
        if core:
            self.put(name, hada_t1=kaiming(*self.core_shape(r)), hada_t2=kaiming(*self.core_shape(r)))

    def pairs(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A1, B1, A2, B2."""
        return self.hada_w1_a[name], self.hada_w1_b[name], self.hada_w2_a[name], self.hada_w2_b[name]

    def delta_weight(self, name: str) -> torch.Tensor:
        a1, b1, a2, b2 = self.pairs(name)
        if name in self.hada_t1:
            first = through_core(a1, b1, self.hada_t1[name], self.shape)
            second = through_core(a2, b2, self.hada_t2[name], self.shape)
        else:
            first, second = (a1 @ b1).view(self.shape), (a2 @ b2).view(self.shape)
        return first * second * self.scaling[name]

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """dW x without dW, by (A1 B1) * (A2 B2) = A B with all r^2 products of columns of A1 and A2 in A."""
        a1, b1, a2, b2 = self.pairs(name)
        base = self.get_base_layer()
        if self.kind.lookup:
            first, second = F.embedding(x, b1.T) @ a1.T, F.embedding(x, b2.T) @ a2.T
            return self.kind.scaled(base, first * second) * self.scaling[name]
        r, (out, columns) = self.r[name], fan(self.shape)
        grouped = len(self.shape) > 2 and self.shape[1] != self.in_features
        if grouped or name in self.hada_t1 or r * r * (out + columns) >= out * columns:
            return super().product(name, x)
        a = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        b = (b1[:, None, :] * b2[None, :, :]).view(r * r, *self.shape[1:])
        return mix(a, self.kind.apply(base, x, b), len(self.shape) - 2) * self.scaling[name]


LoHaModel = define_tuner(
    "LoHaModel",
    LoHaLayer,
    LoHaConfig,
    prefix="hada_",
    targets=TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING,
    base=LycorisTuner,
)
