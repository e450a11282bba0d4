"""DyLoRA: dW = s/b B[:, :b] A[:b], trained for all ranks b at once by drawing b in each step (arXiv 2210.07558)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.combine.combined import tuner_layers
from peft.core.families import LowRank
from peft.core.filling import kaiming, zeros
from peft.core.model.registry import define_tuner
from peft.core.model.tuner import BaseTuner


@dataclass
class DyLoraConfig(TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Config of DyLoRA: a LoRA whose first b ranks are a LoRA of rank b, for each b.

    For choosing the rank after training instead of searching for it: ``model.base_model.use_rank(b)`` computes with
    the first b. One training costs about as much as that of the largest rank.
    """

    METHOD: ClassVar[str] = "DYLORA"

    r: int = option(8, "The largest rank.", minimum=1)
    min_r: int = option(1, "The smallest rank that a step draws.", minimum=1)
    alpha: float = option(8, "The update of rank b is scaled by alpha / b.")
    rank: int | None = option(None, "The rank that is used outside of training; None for the largest.", minimum=1)
    last_only: bool = option(
        False, "A step trains the last of the drawn ranks only, and leaves those before it as they are."
    )
    dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise B is random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_r", "rank"):
            if (getattr(self, name) or 1) > self.r:
                raise ValueError(f"{name}={getattr(self, name)} is more than the largest rank, r={self.r}.")


def first_ranks(
    a: torch.Tensor, b: torch.Tensor, rank: int, alpha: float, last_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A[:rank] and alpha / rank B[:, :rank]; with ``last_only`` a gradient reaches the last of these ranks only.

    Args:
        a: ``[r, in]``. b: ``[out, r]``.
    """
    a, b = a[:rank], b[:, :rank]
    if last_only:
        a, b = torch.cat([a[:-1].detach(), a[-1:]]), torch.cat([b[:, :-1].detach(), b[:, -1:]], 1)
    return a, alpha / rank * b


class DyLora(LowRank):
    """A is ``[r, in * kernel]``, B ``[out, r]``. Each layer draws a rank of its own from torch's generator."""

    dylora_A, dylora_B = part(), part()
    dylora_alpha, dylora_range, dylora_rank, dylora_last = setting(), setting(), setting(), setting()
    dylora_dropout = input_dropout()
    random_in_training = True

    def create(self, config: DyLoraConfig, key: str) -> None:
        (out, columns), r = fan(self.shape), config.r
        self.dylora_A = kaiming(r, columns)
        self.dylora_B = zeros(out, r) if config.init_weights else kaiming(out, r)
        self.dylora_alpha, self.dylora_range, self.dylora_rank = config.alpha, (config.min_r, r), config.rank or r
        self.dylora_last, self.dylora_dropout = config.last_only, config.dropout

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        return first_ranks(self.dylora_A, self.dylora_B, self.dylora_rank, self.dylora_alpha)

    def acting_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.training:
            return self.pair()
        least, most = self.dylora_range
        drawn = int(torch.randint(least, most + 1, ()))  # on the CPU, and once for each layer
        return first_ranks(self.dylora_A, self.dylora_B, drawn, self.dylora_alpha, self.dylora_last)


class DyLoraTuner(BaseTuner):
    """Applies DyLoRA: the rank can be chosen after training."""

    def use_rank(self, rank: int, adapter_name: str | None = None) -> None:
        """Compute, merge and convert with the first ranks of an adapter; its config says so, hence its files do.

        Args:
            rank: how many. adapter_name: the active one, if None.

        Raises:
            ValueError: the adapter has fewer; or none of that name is there.

        Examples:
            >>> model.base_model.use_rank(4)
        """
        name = adapter_name or self.active_adapters[0]
        config = self.peft_config.get(name)
        if config is None:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(self.peft_config)}.")
        if not 1 <= rank <= config.r:
            raise ValueError(f"rank should be from 1 to {config.r}, the largest rank of {name!r}, got {rank}.")
        config.rank = rank
        for _, layer in tuner_layers(self):
            if name in layer:
                layer.adapters[name].dylora_rank = rank


DyLoraModel = define_tuner(DyLora, DyLoraConfig, base=DyLoraTuner)
