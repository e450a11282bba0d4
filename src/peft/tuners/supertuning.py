"""Super tuning: W' = W + values at the largest (or smallest) entries of W [+ s B A] (arXiv 2607.09287)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import ModulesToSave, TargetModules, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.addition import LinearIn
from peft.core.base.kinds import fan
from peft.core.families import Sparse
from peft.core.families.delta import floating
from peft.core.filling import draw_like_linear
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.kernels.sparse import with_entries
from peft.peft_types import PeftType


@dataclass
class SupertuningConfig(TargetModules, ModulesToSave):
    """Config of super tuning: trains the entries of each weight with the largest magnitude, and, with r, a LoRA too.

    Use it where a sparse update is wanted that keeps to the entries which matter most; its number of parameters is
    set by a share of the weight and not by a rank.
    """

    METHOD: ClassVar[PeftType] = PeftType.SUPERTUNING

    sparsity: float = option(0.99, "Share of the entries of each weight that are not trained.", minimum=0, below=1)
    select_top: bool = option(True, "Train the entries of largest magnitude; otherwise those of the smallest.")
    r: int | None = option(None, "Rank of a low-rank update besides the sparse one; None: no such update.", minimum=1)
    lora_alpha: float | None = option(None, "The low-rank update is scaled by lora_alpha / r; None: 2 r.")
    lora_dropout: float = option(0.0, "Dropout on the input of the low-rank update.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with zeros, so that nothing changes; otherwise at random numbers.")
    save_precomputed_indices: bool = option(
        True, "Write the positions into the file. Without, they are found again in the base model when it is loaded."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None and (self.lora_alpha is not None or self.lora_dropout):
            raise ConfigError(
                "SupertuningConfig: lora_alpha and lora_dropout belong to the low-rank update, which needs r."
            )
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r


def supertuned(
    weight: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
) -> torch.Tensor:
    """W' = W + values at positions [+ B A].

    Args:
        weight: W ``[out, in, *kernel]``. positions: in the flat W, ``[n]``. values: ``[n]``.
        a, b: ``[r, in * kernel]`` and ``[out, r]``, s in it.
    """
    weight = with_entries(weight, positions, values.to(weight.dtype))
    return weight if a is None or b is None else weight + (b @ a).view(weight.shape).to(weight.dtype)


class Supertuning(Sparse):
    """dW holds ``supertuning_values[k]`` at ``supertuning_indices[k]`` of the flat weight, plus s B A."""

    supertuning_values = part()
    supertuning_indices = part(BufferDict, saved_by="save_indices")
    supertuning_lora_A, supertuning_lora_B = part(nn.ModuleDict), part(nn.ModuleDict)
    save_indices, select_top = setting(), setting()
    lora_scaling, supertuning_lora_dropout = setting(), input_dropout()
    adds = LinearIn("supertuning_values", "supertuning_lora_B")

    def create(self, config: SupertuningConfig, key: str) -> None:
        rows, columns = fan(self.shape)
        count = trained_count(config, rows * columns, key)
        values = torch.zeros(count) if config.init_weights else torch.randn(count)
        self.save_indices, self.select_top = config.save_precomputed_indices, config.select_top
        self.supertuning_values = nn.Parameter(values)
        brought = config.save_precomputed_indices and values.is_meta  # by the file
        self.supertuning_indices = torch.empty(count, dtype=torch.int32) if brought else self.chosen()
        if config.r is not None:
            self.supertuning_lora_A, self.supertuning_lora_B = low_rank_pair(config, rows, columns)
            assert config.lora_alpha is not None
            self.lora_scaling = config.lora_alpha / config.r
            self.supertuning_lora_dropout = config.lora_dropout

    def chosen(self) -> torch.Tensor:
        """The positions of the largest, or smallest, entries of the base."""
        size = self.base_weight().detach().abs().flatten()
        return size.topk(len(self.supertuning_values), largest=self.select_top).indices.to(torch.int32)

    def loaded(self) -> None:
        if self.supertuning_indices.is_meta:
            self.supertuning_indices = self.chosen()

    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.supertuning_indices.long(), self.supertuning_values

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        return None if any(adapter.low_rank() for adapter in adapters) else super().kernel(layer, adapters, x)

    def low_rank(self) -> tuple[torch.Tensor, ...]:
        """A ``[r, in * kernel]`` and s B ``[out, r]``, where there is such a pair."""
        down, up = self.supertuning_lora_A, self.supertuning_lora_B
        return () if down is None else (down.weight, up.weight * self.lora_scaling)

    def delta_weight(self) -> torch.Tensor:
        return supertuned(self.supertuning_values.new_zeros(self.shape), *self.entries(), *self.low_rank())

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return supertuned(weight, *self.entries(), *self.low_rank())

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - self.delta_weight().to(weight.dtype)

    def prefers_folding(self) -> bool:
        return self.sums_exactly() and not self.drops(self.supertuning_lora_dropout)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        if not self.drops(self.supertuning_lora_dropout):
            return super().delta(x)
        base, (a, b) = self.base, self.low_rank()
        sparse = self.multiplied(x, lambda: super(Supertuning, self).delta_weight().to(dtype=floating(x)))
        dropped = x if self.kind.lookup else self.supertuning_lora_dropout(x)
        return sparse + self.kind.up(base, self.kind.down(base, dropped, a), b)


def trained_count(config: SupertuningConfig, size: int, key: str) -> int:
    """How many of the ``size`` entries of the weight of the module called ``key`` train.

    Raises:
        ValueError: none.
    """
    count = int((1 - config.sparsity) * size)
    if not count:
        raise ValueError(
            f"sparsity={config.sparsity} leaves none of the {size} entries of {key or 'the layer'} to train. Lower "
            "it, or leave that module out of target_modules."
        )
    return count


def low_rank_pair(config: SupertuningConfig, rows: int, columns: int) -> tuple[nn.Linear, nn.Linear]:
    """A and B of the update besides the sparse one, as they start."""
    assert config.r is not None
    a, b = nn.Linear(columns, config.r, bias=False), nn.Linear(config.r, rows, bias=False)
    draw_like_linear(a.weight)
    if config.init_weights:
        nn.init.zeros_(b.weight)
    else:
        draw_like_linear(b.weight)
    return a, b


SupertuningModel = define_tuner(Supertuning, SupertuningConfig)
