"""What the methods with a sparse spectrum share: how many numbers a layer trains, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option, resolve_pattern
from peft.errors import ConfigError


@dataclass
class SpectrumConfig(TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Fields of the methods that train numbers at random places of a spectrum."""

    n_frequency: int = option(1000, "How many numbers each layer trains.", minimum=1)
    n_frequency_pattern: dict[str, int] | None = option(
        dict,
        "Numbers of particular modules: a module name, an end of one, or a regular expression -> how many.",
        names=dict,
        minimum=1,
    )
    random_loc_seed: int = option(777, "Seed of the places, which are not in the file.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_loc_seed is None:
            raise ConfigError(
                f"{type(self).__name__}: random_loc_seed=None would lose the places of the trained numbers: the "
                "file has none, they are drawn from the seed when it is loaded. Give any number."
            )

    def count_for(self, key: str, shape: tuple[int, int], default: int | None = None) -> int:
        """How many numbers the module called ``key`` trains, with a weight ``[out, in * kernel]`` of this shape.

        Raises:
            ValueError: the weight has fewer entries.
        """
        n = resolve_pattern(self.n_frequency_pattern, key, self.n_frequency if default is None else default)
        if n > shape[0] * shape[1]:
            raise ValueError(
                f"n_frequency={n} is more than the {shape[0] * shape[1]} entries of the weight of "
                f"{key or 'the layer'}. Lower it, or set it for that module in n_frequency_pattern."
            )
        return n


def random_places(size: int, n: int, seed: int) -> torch.Tensor:
    """``n`` different numbers below ``size``, the same wherever they are drawn."""
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:n]
