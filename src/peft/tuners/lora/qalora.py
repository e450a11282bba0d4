"""QA-LoRA: A reads the inputs pooled by quantisation group, so dW can go into zero points (arXiv 2309.14717)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from peft.core.adapter import setting
from peft.core.base.kinds import Kind
from peft.core.filling import skip_values, unfilled_linear
from peft.errors import ConfigError
from peft.kernels import Factors
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.initialize import is_drawn, orthogonal, rewrites
from peft.tuners.lora.layer import Lora


def pooled(x: torch.Tensor, size: int) -> torch.Tensor:
    """``[..., in]`` -> ``[..., in / size]``: the mean of each group of ``size`` features, times the number of groups.

    The paper takes the sum. Files and the start of A follow the factor that is in use.
    """
    groups = x.unflatten(-1, (-1, size))
    return groups.mean(-1) * groups.shape[-2]


def spread(a: torch.Tensor, size: int) -> torch.Tensor:
    """The matrix ``[r, in]`` that multiplies x as A ``[r, in / size]`` multiplies :func:`pooled` x."""
    return a.repeat_interleave(size, 1) * (a.shape[1] / size)


class QaLora(Lora):
    """y' = y + s B A pool(drop(x)), A ``[r, in / g]``: dW has one value for all inputs of a group of g.

    Where the weight is kept as (q - zero) * scale with floating zero points in such groups, merging moves the zero
    points and rounds no weight. Dense layers and other storages are merged as usual. The backward pass keeps the
    pooled input, g times smaller than the input.
    """

    option: ClassVar[str] = "use_qalora"
    qalora_group_size = setting()
    excludes: ClassVar[dict[str, str]] = {
        "BdLora": "QA-LoRA's A reads groups of inputs, BD-LoRA's blocks of them: they cut the same axis in two ways"
    }

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if not kind.matrix:
            return "QA-LoRA pools the inputs of linear layers by quantisation group, and this is none"
        if config.init_lora_weights == "eva" or rewrites(config.init_lora_weights):
            return f"QA-LoRA's A is smaller than init_lora_weights={config.init_lora_weights!r} makes it"
        return None

    def create(self, config: LoraConfig, key: str) -> None:
        self.qalora_group_size = size = config.qalora_group_size
        if self.in_features % size:
            raise ConfigError(
                f"use_qalora: qalora_group_size={size} does not divide the {self.in_features} inputs of "
                f"{key or type(self.base).__name__!r}. Choose the group size of the quantised model."
            )
        super().create(config, key)

    def make_pair(self, config: LoraConfig) -> None:
        super().make_pair(config)  # a whole A is drawn first, as elsewhere, so a seed gives the same numbers
        down = unfilled_linear(self.in_features // self.qalora_group_size, self.r)
        if not (is_drawn(config) and skip_values()):
            init = config.init_lora_weights
            if init == "orthogonal":
                orthogonal(down.weight, self.lora_B.weight)
            elif init == "gaussian":
                nn.init.normal_(down.weight, std=1 / self.r)
            elif isinstance(init, bool):
                down.reset_parameters()
            else:
                nn.init.zeros_(down.weight)
        self.lora_A = down

    def takes(self, saved: str, shape: torch.Size) -> bool:
        """Others write a full A for layers that are not quantised, and mean plain LoRA by it."""
        return saved == "lora_A.weight" and shape == (self.r, self.in_features)

    def _size(self, a: torch.Tensor) -> int:
        return self.in_features // a.shape[1]

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = super().pair()
        return self.of_inputs(a), b

    def of_inputs(self, a: torch.Tensor) -> torch.Tensor:
        return spread(a, self._size(a)) if self._size(a) > 1 else a

    def product(self) -> Factors | None:
        return None  # they would read, and keep, the input that is not pooled

    def update(self, x: torch.Tensor) -> torch.Tensor:
        cls, size = type(self), self._size(self.lora_A.weight)
        if size == 1 or (cls.pair, cls.acting_pair) != (QaLora.pair, Lora.acting_pair):
            return super().update(x)
        return self.lora_B(self.lora_A(pooled(x, size))) * self.scaling

    def group_change(self) -> tuple[torch.Tensor, int] | None:
        cls, (a, b) = type(self), self.held_pair()
        if cls.pair is not QaLora.pair or cls.fold is not Lora.fold:
            return None
        return b @ a * (self.scaling * a.shape[1] / self._size(a)), self._size(a)
