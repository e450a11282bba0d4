"""The ways in which several adapters become one: of their factors, or of what they add to a weight.

The formulas are in :mod:`peft.utils.merge_utils`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from peft.core.adapter import Adapter
from peft.core.layer.weight import bias_change, weight_change, wide
from peft.utils.error import nearest
from peft.utils.merge_utils import PruningMethod, aligned, prune, task_arithmetic, ties


class Way(NamedTuple):
    """One way of combining.

    Attributes:
        dense: of the updates dW, factored again by SVD; else of A and B, each for itself.
        pruning: what is set to zero before: small entries, or random ones with the others rescaled, or see ``prune``.
        election: entries against the majority's sign are left out of the mean (TIES).
        align: the updates are brought into one basis before (KnOTS).
    """

    dense: bool = False
    pruning: PruningMethod | None = None
    election: bool = False
    align: bool = False


WAYS = {
    "cat": Way(),
    "linear": Way(),
    "svd": Way(dense=True),
    "magnitude_prune": Way(pruning="magnitude"),
    "magnitude_prune_svd": Way(True, "magnitude"),
    "ties": Way(False, "magnitude", True),
    "ties_svd": Way(True, "magnitude", True),
    "dare_linear": Way(False, "random"),
    "dare_linear_svd": Way(True, "random"),
    "dare_ties": Way(False, "random", True),
    "dare_ties_svd": Way(True, "random", True),
    "della_svd": Way(True, "sampled", True),
    "breadcrumbs_svd": Way(True, "breadcrumbs"),
    "knots_svd": Way(True, "magnitude", True, align=True),
}


CombinationType = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "della_svd",
    "breadcrumbs_svd",
    "knots_svd",
]
Vote = Literal["total", "frequency"]
Part = tuple[Adapter, float]  # an adapter in a layer, and its weight


@dataclass(frozen=True)
class Combination:
    """How tensors of several adapters become one.

    Attributes:
        name: of the way, in :data:`WAYS`. density: fraction of entries to keep, for the ways that prune. vote: TIES',
            weighed by size ("total") or not ("frequency").

    Raises:
        ValueError: for an unknown way, or one that prunes without a density.
    """

    name: str = "svd"
    density: float | None = None
    vote: Vote = "total"

    def __post_init__(self) -> None:
        if self.name not in WAYS:
            raise ValueError(
                f"unknown combination_type {self.name!r}.{nearest(self.name, WAYS)} There are {', '.join(WAYS)}."
            )
        if self.way.pruning and self.density is None:
            raise ValueError(
                f"combination_type {self.name!r} needs density, the fraction of entries to keep, such as 0.5."
            )

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
            return ties(list(tensors), factors, density=1, majority_sign_method=self.vote)
        return task_arithmetic(list(tensors), factors)

    def merged(self, updates: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Updates as one: matrices ``[..., out, in]``, or vectors."""
        basis = None
        if self.way.align and updates[0].dim() > 1:
            basis, updates = aligned(list(updates))
        merged = self.summed([self.pruned(update) for update in updates], weights)
        return merged if basis is None else basis @ merged

    def of_weight(self, parts: Sequence[Part]) -> torch.Tensor:
        """What adapters of one layer, of any methods, add to its weight, as one: ``[out, in, *kernel]``.

        Raises:
            NoEqualWeightError: no weight equals one of them.
        """
        changes = [wide(weight_change(adapter.layer, adapter)) for adapter, _ in parts]
        merged = self.merged([change.flatten(1) for change in changes], [weight for _, weight in parts])
        return merged.view_as(changes[0])

    def of_bias(self, parts: Sequence[Part]) -> torch.Tensor | None:
        """What they add to its bias, as one; None if none of them does."""
        found = [(change, weight) for adapter, weight in parts if (change := bias_change(adapter)) is not None]
        return self.merged(*zip(*found)) if found else None
