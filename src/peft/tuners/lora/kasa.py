"""KaSA: W without its smallest singular components, and dW = s B diag(sigma) A beside it (arXiv 2412.06071)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from peft.core.adapter import part, setting
from peft.core.base.kinds import Kind, fan
from peft.core.filling import skip_values
from peft.core.layer.buffers import BufferDict
from peft.kernels import Factors
from peft.kernels.decompositions import orthogonality, svd
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.initialize import rewrites
from peft.tuners.lora.layer import Lora


def minor_part(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The r smallest singular components of W ``[out, in]`` as factors: V^T ``[r, in]`` and U S ``[out, r]``, float32.

    W minus their product is the best approximation of W by a matrix with r singular values less.
    """
    u, s, v = svd(weight.float())
    return v[-r:].contiguous(), u[:, -r:] * s[-r:]


def penalty(a: torch.Tensor, b: torch.Tensor, sigma: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """beta |sigma|^2 + gamma (|B^T B - I| + |A A^T - I|), in Frobenius norms (arXiv 2412.06071, eq. 9 to 11).

    Args:
        a: ``[r, in]``. b: ``[out, r]``. sigma: ``[r]``.
    """
    return beta * sigma.square().sum() + gamma * orthogonality(a, b)


class Kasa(Lora):
    """W' = W - U_r S_r V_r + s B diag(sigma) A, with the r smallest singular components of W; sigma is ``lora_diag``.

    The base keeps its weight: what is taken away belongs to the adapter, as a second pair that is never trained. So
    the base is itself again when the adapter is disabled or deleted, adapters of other kinds beside this one are not
    affected, and a quantised weight is not rounded a second time. Files hold A, B and sigma; the components are found
    anew in the base that they are loaded on. A and B start as plain LoRA's do and sigma at random: dW is zero at
    first, but W' is not W.
    """

    option: ClassVar[str] = "kasa_config"
    lora_diag = part()
    kasa_V, kasa_US = part(BufferDict, remade=True), part(BufferDict, remade=True)
    ties: ClassVar[bool] = False
    kasa_options = setting()
    fixed_rank: ClassVar[bool] = True
    reversible: ClassVar[bool] = False  # the weight comes back as it was, without the rounding of what is taken away
    agrees: ClassVar[frozenset[str]] = frozenset({"delta"})
    excludes: ClassVar[dict[str, str]] = {
        "BdLora": "what KaSA takes from the weight is no product of blocks, so shards would have to exchange it"
    }

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if rewrites(config.init_lora_weights):
            return (
                f"KaSA weighs B A by random numbers at first, so what init_lora_weights={config.init_lora_weights!r} "
                "takes out of the weight would not come back"
            )
        return super().refuses(kind, module, config)

    def make_pair(self, config: LoraConfig) -> None:
        super().make_pair(config)
        self.kasa_options = config.kasa_config
        self.lora_diag = nn.Parameter(torch.randn(self.r))
        if not skip_values():
            self.loaded()

    def loaded(self) -> None:
        super().loaded()
        r = min(self.r, *fan(self.shape))
        if self.kasa_V is None or self.kasa_V.is_meta or len(self.kasa_V) != r:
            self.kasa_V, self.kasa_US = minor_part(self.base_weight().detach().flatten(1), r)

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[A; V] and [B diag(sigma), -U S / s]: the scale turns dW up and down, not what is taken from W."""
        a, b = super().pair()
        trained = b * self.lora_diag.to(b.dtype).view(1, -1, *[1] * (b.dim() - 2))
        v, us = self.kasa_V.to(a.dtype), self.kasa_US.to(b.dtype)
        taken = us * (-1 / self.scaling if self.scaling else 0)
        return torch.cat([a, v.view(-1, *a.shape[1:])]), torch.cat([trained, taken.view(*us.shape, *b.shape[2:])], 1)

    def product(self) -> Factors | None:
        return None if self.drops() else super().product()

    def training_factors(self) -> Sequence[Factors] | None:
        """What trains, with sigma between A and B, and what is taken from W: of that no gradients are made."""
        cls = type(self)
        alone = (cls.pair, cls.acting_pair, cls.product) == (Kasa.pair, Lora.acting_pair, Kasa.product)
        if not alone or not self.adds_product or self.drops():
            return super().training_factors()
        held = self.held_product()
        if held is None:
            return None
        return replace(held, middle=self.lora_diag), Factors(self.kasa_V, self.kasa_US, -1.0)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind.lookup or not self.drops():
            return super().delta(x)
        dropped = self.lora_dropout(x)  # what is taken from W reads x whole, as W does
        taken = self.kind.down(self.base, dropped - x, self.kasa_V.to(x.dtype))
        return self.update(dropped) + self.kind.up(self.base, taken, self.kasa_US.to(x.dtype))

    def kasa_penalty(self) -> torch.Tensor:
        """What the loss gets from this layer."""
        a, b = self.held_pair()
        return penalty(a.flatten(1), b.flatten(1), self.lora_diag, self.kasa_options.beta, self.kasa_options.gamma)
