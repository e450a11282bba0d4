"""The ways in which several adapters become one: of their factors, or of what they add to a weight.

The formulas are in :mod:`peft.kernels.task_tensors`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args
from zlib import crc32

import torch

from peft.combining import WAYS, CombinationType, Vote, Way
from peft.core.adapter import Adapter
from peft.core.layer.weight import bias_change, weight_change, wide
from peft.errors import ConfigChoiceError, WrongTypeError, nearest
from peft.kernels.task_tensors import aligned, prune, task_arithmetic, ties


Part = tuple[Adapter, float]  # an adapter in a layer, and its weight


@dataclass(frozen=True)
class Combination:
    """How tensors of several adapters become one.

    Attributes:
        name: of the way, in :data:`WAYS`. density: fraction of entries to keep, for the ways that prune. vote: TIES',
            weighed by size ("total") or not ("frequency"). seed: of what is pruned at random in each layer; without
            one it is drawn from torch's generator as layers come.

    Raises:
        ValueError: for an unknown way or vote, or a way that prunes without a density.
    """

    name: CombinationType = "svd"
    density: float | None = None
    vote: Vote = "total"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.name not in WAYS:
            raise ValueError(
                f"unknown combination_type {self.name!r}.{nearest(self.name, WAYS)} There are {', '.join(WAYS)}."
            )
        if self.vote not in get_args(Vote):
            raise ConfigChoiceError(f"majority_sign_method is 'total' or 'frequency', got {self.vote!r}.")
        if self.way.pruning and self.density is None:
            raise WrongTypeError(
                f"combination_type {self.name!r} needs density, the fraction of entries to keep, such as 0.5."
            )

    def seeded(self) -> Combination:
        """The same with a seed of torch's generator: layers are pruned alike in any order, and when asked again."""
        chance = self.way.pruning in ("random", "sampled")
        return replace(self, seed=int(torch.randint(2**31, ()))) if chance else self

    @contextlib.contextmanager
    def draws(self, layer: Any) -> Iterator[None]:
        """Within, torch's CPU generator is that of one layer."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            # By crc32 and not by `hash`, which Python salts anew in each process.
            torch.random.default_generator.manual_seed(self.seed ^ crc32(f"{layer.key}.{layer.kind.weight}".encode()))
            yield

    @property
    def way(self) -> Way:
        """What it does."""
        return WAYS[self.name]

    @property
    def adds(self) -> bool:
        """Whether it is the weighted sum."""
        return self.way.pruning is None

    def pruned(self, tensor: torch.Tensor) -> torch.Tensor:
        """One adapter's tensor, pruned."""
        if self.way.pruning is None or self.density is None:
            return tensor
        return prune(tensor, self.density, self.way.pruning, rescale=self.way.pruning == "random")

    def summed(self, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Pruned tensors as one."""
        factors = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        if self.way.election:
            return ties(list(tensors), factors, density=1, majority_sign_method=self.vote)  # pruned already
        return task_arithmetic(list(tensors), factors)

    def merged(self, updates: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Updates as one: matrices ``[..., out, in]``, or vectors. They are pruned as they come."""
        basis = None
        if self.way.align:
            updates = list(updates)  # one basis for all: they cannot come one by one
            if updates[0].dim() > 1:
                basis, updates = aligned(updates)
        merged = self.summed([self.pruned(update) for update in updates], weights)
        return merged if basis is None else basis @ merged

    def of_weight(self, parts: Sequence[Part]) -> torch.Tensor:
        """What adapters of one layer, of any methods, add to its weight, as one: ``[out, in, *kernel]``.

        Raises:
            NoEqualWeightError: no weight equals one of them.
        """
        changes = (wide(weight_change(adapter.layer, adapter)) for adapter, _ in parts)
        first = next(changes)
        shape, updates = first.shape, itertools.chain([first.flatten(1)], (change.flatten(1) for change in changes))
        del first  # each is held until it is pruned, and no longer
        with self.draws(parts[0][0].layer):
            return self.merged(updates, [weight for _, weight in parts]).view(shape)

    def of_bias(self, parts: Sequence[Part]) -> torch.Tensor | None:
        """What they add to its bias, as one; None if none of them does."""
        found = [(change, weight) for adapter, weight in parts if (change := bias_change(adapter)) is not None]
        with self.draws(parts[0][0].layer):
            return self.merged(*zip(*found)) if found else None
