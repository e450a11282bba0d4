"""LoRA on a whole model, and weighted combinations of LoRA adapters."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch

from peft.compat.methods import LoraCompat
from peft.core.combine.combined import (
    add_combined,
    checked_weights,
    combined_config,
    factorize,
    factorize_product,
    resized,
    tuner_layers,
)
from peft.core.model.manager import check_adapter_name
from peft.core.model.registry import define_tuner
from peft.core.model.tuner import BaseTuner
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Lora, LoraLayer
from peft.tuners.lora.pairs import join_pair, pair_blocks, split_pair
from peft.utils.error import nearest
from peft.utils.merge_utils import prune, task_arithmetic, ties


class Way(NamedTuple):
    """One way of combining.

    Attributes:
        dense: of the updates dW, factored again by SVD; else of A and B, each for itself.
        pruning: what is set to zero before: small entries, or random ones with the others rescaled.
        election: entries against the majority's sign are left out of the mean (TIES).
    """

    dense: bool = False
    pruning: Literal["magnitude", "random"] | None = None
    election: bool = False


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
]


class LoraTuner(LoraCompat, BaseTuner):
    """What LoRA can do to a whole model beyond any other method."""

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that combines others, inactive and frozen, with scale 1.

        An adapter that a layer lacks contributes nothing there; ranks may differ.

        Args:
            weights: one for each adapter; negative ones subtract it.
            combination_type: "cat" puts the pairs side by side: exactly the weighted sum of the updates, at the sum
                of the ranks. "svd": the best approximation of that sum at a lower rank. "linear": weighted sums of
                the A's and of the B's, which is exact for one adapter only. "magnitude_prune", "ties"
                (arXiv 2306.01708), "dare_linear", "dare_ties" (arXiv 2311.03099): prune A and B, then combine them;
                with "_svd" at the end, prune the updates and factor the result.
            svd_rank: rank of the result of the "svd" ways; by default the largest rank of the adapters.
            svd_clamp: limit the entries of A and B to this quantile, in (0, 1] ("svd" ways).
            svd_full_matrices: accepted as others pass it; the result does not depend on it.
            svd_driver: cuSOLVER's routine, on CUDA ("svd" ways).
            density: fraction of entries to keep, for the ways that prune.
            majority_sign_method: TIES' vote, weighed by size ("total") or not ("frequency").

        Raises:
            ValueError: for unknown adapters or ways, another number of weights, a name that is taken, or adapters
                that cannot be combined. The model is then unchanged.

        Examples:
            >>> model.add_adapter("other", LoraConfig(r=8, task_type="CAUSAL_LM"))
            >>> model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", combination_type="linear")
            >>> model.set_adapter("both")
        """
        weights = checked_weights(self, adapters, weights)
        check_adapter_name(adapter_name, [*self.peft_config])
        self._check_combination(adapters, combination_type, svd_rank, svd_clamp, density)
        rank = self._combined_rank(adapters, combination_type, svd_rank)
        bias = any(self.peft_config[name].lora_bias for name in adapters)
        changes = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
        config = combined_config(self, adapters, lora_bias=bias, **changes)
        way = WAYS[combination_type]
        mixer = Mixer(way, combination_type == "cat", density, majority_sign_method, svd_clamp, svd_driver)

        def fill(layer: Any) -> None:
            here = [(layer.adapters[name], weight) for name, weight in zip(adapters, weights) if name in layer]
            mixer.fill(layer.adapters[adapter_name], here)

        add_combined(self, adapters, adapter_name, config, fill)

    def _check_combination(
        self, adapters: list[str], way: str, svd_rank: int | None, svd_clamp: float | None, density: float | None
    ) -> None:
        if way not in WAYS:
            raise ValueError(f"unknown combination_type {way!r}.{nearest(way, WAYS)} There are {', '.join(WAYS)}.")
        if WAYS[way].pruning and density is None:
            raise ValueError(f"combination_type {way!r} needs density, the fraction of entries to keep, such as 0.5.")
        if svd_rank is not None and svd_rank < 1:
            raise ValueError(f"svd_rank is the rank of the new adapter and has to be at least 1, got {svd_rank}.")
        if svd_clamp is not None and not 0 < svd_clamp <= 1:
            raise ValueError(f"svd_clamp is a quantile and has to be in (0, 1], got {svd_clamp}.")
        if dora := [name for name in adapters if self.peft_config[name].use_dora]:
            raise ValueError(
                f"adapters {dora} use DoRA, which divides by the norm of the adapted weight: what they add up to is "
                "not what their A, B and magnitudes add up to. Combine adapters trained with use_dora=False, or merge "
                "these into the base model one after another."
            )

    def _combined_rank(self, adapters: list[str], way: str, svd_rank: int | None) -> int:
        """The rank of the result, the same in all layers."""
        ranks, groups = [], 1
        for _, layer in tuner_layers(self):
            here: list[Any] = [layer.adapters[name] for name in adapters if name in layer]
            if here:
                held = [lora.r for lora in here]
                ranks.append(sum(held) if way == "cat" else max(held))
                groups = math.lcm(groups, pair_blocks(here[0])[1])
        rank = svd_rank if WAYS[way].dense and svd_rank is not None else max(ranks)
        return math.ceil(rank / groups) * groups


class Mixer:
    """Combines the pairs of one layer; ``cat``: side by side instead of summed."""

    def __init__(
        self, way: Way, cat: bool, density: float | None, vote: Any, clamp: float | None, driver: str | None
    ) -> None:
        self.way, self.cat, self.density, self.vote = way, cat, density, vote
        self.clamp, self.driver = clamp, driver

    def fill(self, new: Lora, parts: list[tuple[Lora, float]]) -> None:
        """Set A and B of an adapter from those of others, given with their weights."""
        a, b = new.pair()
        bias: Any = new.lora_B.bias if new.lora_bias else None
        for tensor in (a, b, bias):
            if tensor is not None:
                tensor.zero_()
        if not parts:
            return
        scales = [float(lora.scaling) for lora, _ in parts]
        weights = [weight for _, weight in parts]
        pairs = [tuple(map(_wide, lora.pair())) for lora, _ in parts]
        rank = split_pair(new, a, b)[0].shape[1]
        combine = self._from_updates if self.way.dense or self.cat else self._from_factors
        down, up = combine(new, pairs, weights, scales, rank)
        for tensor, value in zip((a, b), join_pair(new, resized(down, rank, 1), resized(up, rank, 2))):
            tensor.copy_(value)
        biased = [(lora, w, s) for (lora, w), s in zip(parts, scales) if lora.lora_bias]
        if biased:
            shifts = [self._pruned(_wide(lora.lora_B.bias) * scale) for lora, _, scale in biased]
            bias.copy_(self._summed(shifts, [weight for _, weight, _ in biased]))

    def _from_factors(
        self, new: Lora, pairs: list, weights: list[float], scales: list[float], rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A = sum_i sign(w_i s_i) sqrt|w_i s_i| A_i and B = sum_i sqrt|w_i s_i| B_i, after pruning."""
        factors = [weight * scale for weight, scale in zip(weights, scales)]
        downs, ups = [self._pruned(a) for a, _ in pairs], [self._pruned(b) for _, b in pairs]
        split_pairs = [split_pair(new, a, b) for a, b in zip(downs, ups)]
        roots = [math.sqrt(abs(f)) for f in factors]
        signed = [math.copysign(root, f) for root, f in zip(roots, factors)]
        down = self._summed([resized(a, rank, 1) for a, _ in split_pairs], signed)
        return down, self._summed([resized(b, rank, 2) for _, b in split_pairs], roots)

    def _from_updates(
        self, new: Lora, pairs: list, weights: list[float], scales: list[float], rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        split_pairs = [split_pair(new, a, b) for a, b in pairs]
        if self.way.pruning is None:
            down = torch.cat([w * s * a for (a, _), w, s in zip(split_pairs, weights, scales)], 1)
            up = torch.cat([b for _, b in split_pairs], 2)
            return (down, up) if self.cat else factorize_product(down, up, rank, self.clamp, self.driver)
        updates = [self._pruned(s * (b @ a)) for (a, b), s in zip(split_pairs, scales)]
        return factorize(self._summed(updates, weights), rank, self.clamp, self.driver)

    def _pruned(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.way.pruning is None or self.density is None:
            return tensor
        return prune(tensor, self.density, self.way.pruning, rescale=self.way.pruning == "random")

    def _summed(self, tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        factors = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        if self.way.election:
            return ties(tensors, factors, density=1, majority_sign_method=self.vote)
        return task_arithmetic(tensors, factors)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


LoraModel = define_tuner(Lora, LoraConfig, base=LoraTuner, layer=LoraLayer, __module__=__name__)
