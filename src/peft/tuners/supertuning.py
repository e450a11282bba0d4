"""Super tuning: W' = W + values at the largest (or smallest) entries of W [+ s B A] (arXiv 2607.09287)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ModulesToSave, TargetModules, option
from peft.core.base.kinds import fan
from peft.core.families.families import SparseLayer, drops, input_dropout
from peft.core.layer.buffers import BufferDict
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


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
    lora_alpha: float | None = option(None, "The low-rank update is scaled by lora_alpha / r; None: by 2.")
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


class SupertuningLayer(SparseLayer):
    """dW holds ``supertuning_values[k]`` at ``supertuning_indices[k]`` of the flat weight, plus s B A."""

    weights: ClassVar[dict[str, type]] = {
        "supertuning_values": nn.ParameterDict,
        "supertuning_indices": BufferDict,
        "supertuning_lora_A": nn.ModuleDict,
        "supertuning_lora_B": nn.ModuleDict,
    }
    settings: ClassVar[dict[str, type]] = {
        "save_indices": dict,
        "lora_scaling": dict,
        "supertuning_lora_dropout": nn.ModuleDict,
    }
    linear: ClassVar[tuple[str, ...]] = ("supertuning_values", "supertuning_lora_B")

    def update_layer(self, name: str, config: SupertuningConfig, key: str) -> None:
        rows, columns = fan(self.shape)
        count = int((1 - config.sparsity) * rows * columns)
        if not count:
            raise ValueError(
                f"sparsity={config.sparsity} leaves none of the {rows * columns} entries of {key or 'the layer'} to "
                "train. Lower it, or leave that module out of target_modules."
            )
        values = torch.zeros(count) if config.init_weights else torch.randn(count)
        indices = torch.empty(count, dtype=torch.int32)
        if not (config.save_precomputed_indices and values.is_meta):  # otherwise the file brings them
            size = self.unmerged_weight().detach().abs().flatten()
            indices = size.topk(count, largest=config.select_top).indices.to(torch.int32)
        self.put(name, save_indices=config.save_precomputed_indices)
        self.put(name, supertuning_values=nn.Parameter(values), supertuning_indices=indices)
        if config.r is not None:
            a, b = nn.Linear(columns, config.r, bias=False), nn.Linear(config.r, rows, bias=False)
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            if config.init_weights:
                nn.init.zeros_(b.weight)
            else:
                nn.init.kaiming_uniform_(b.weight, a=math.sqrt(5))
            self.put(name, supertuning_lora_A=a, supertuning_lora_B=b)
            self.put(name, lora_scaling=2.0 if config.lora_alpha is None else config.lora_alpha / config.r)
            self.put(name, supertuning_lora_dropout=input_dropout(config.lora_dropout))

    def entries(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.supertuning_indices[name].long(), self.supertuning_values[name]

    def fused(self, names: list[str], x: torch.Tensor) -> torch.Tensor | None:
        return None if any(name in self.supertuning_lora_A for name in names) else super().fused(names, x)

    def low_rank(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[r, in * kernel]`` and s B ``[out, r]``."""
        b = self.supertuning_lora_B[name].weight * self.lora_scaling[name]
        return self.supertuning_lora_A[name].weight, b

    def delta_weight(self, name: str) -> torch.Tensor:
        return self.fold(name, self.supertuning_values[name].new_zeros(self.shape), None)

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        weight = super().fold(name, weight, weight)
        if name not in self.supertuning_lora_A:
            return weight
        a, b = self.low_rank(name)
        return weight + (b @ a).view(self.shape).to(weight.dtype)

    def unfold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight - self.delta_weight(name).to(weight.dtype)

    def needs_weight(self) -> bool:
        return self.sums_exactly() and not drops(self, self.supertuning_lora_dropout.values())

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.supertuning_lora_A or not drops(self, [self.supertuning_lora_dropout[name]]):
            return super().delta(name, x)
        base, (a, b) = self.get_base_layer(), self.low_rank(name)
        sparse = self.multiplied(x, lambda: SparseLayer.delta_weight(self, name).to(dtype=_float(x)), [name])
        dropped = x if self.kind.lookup else self.supertuning_lora_dropout[name](x)
        return sparse + self.kind.up(base, self.kind.down(base, dropped, a), b)

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        kept = super().adapter_state(name)
        return (entry for entry in kept if self.save_indices[name] or entry[0] != "supertuning_indices")


def _float(x: torch.Tensor) -> torch.dtype | None:
    return x.dtype if x.is_floating_point() else None


SupertuningModel = define_tuner(
    "SupertuningModel",
    SupertuningLayer,
    SupertuningConfig,
    prefix="supertuning_",
    targets=TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING,
)
