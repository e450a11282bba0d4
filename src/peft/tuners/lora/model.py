"""LoRA on a whole model, and weighted combinations of LoRA adapters."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft.combining import CombinationType, Vote, idle
from peft.compat.methods import LoraCompat, beside_start
from peft.core.combine.combined import add_combined, checked_weights, combined_config, tuner_layers
from peft.core.combine.ways import Combination
from peft.core.files.io import load_peft_weights
from peft.core.layer.weight import wide
from peft.core.model import operations
from peft.core.model.manager import check_adapter_name
from peft.core.model.registry import define_tuner
from peft.core.model.tuner import BaseTuner
from peft.errors import PeftWarning
from peft.kernels.decompositions import factorize, factorize_product, resized
from peft.tuners.lora.config import LoraConfig, divisor
from peft.tuners.lora.initialize import is_repeatable, rewrites
from peft.tuners.lora.kasa import Kasa
from peft.tuners.lora.layer import Lora, LoraLayer
from peft.tuners.lora.megatron import use_library
from peft.tuners.lora.monteclora import MonteCLora
from peft.tuners.lora.pairs import join_pair, pair_blocks, pair_rank, split_pair


PLAIN: dict[str, Any] = {
    **dict.fromkeys(("kasa_config", "use_bdlora", "monteclora_config", "velora_config")),
    **dict.fromkeys(("use_qalora", "use_rslora"), False),
}
"""Fields of variants that a weighted sum does not have: A and B that the mathematics uses are a plain pair."""


class LoraTuner(LoraCompat, BaseTuner):
    """What LoRA can do to a whole model beyond any other method."""

    def prepare_config(self, config: Any, model: nn.Module, keys: set[str] | None) -> None:
        if config.megatron_config:
            use_library(config.megatron_core)
        super().prepare_config(config, model, keys)

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
        majority_sign_method: Vote = "total",
    ) -> None:
        """Add an adapter that combines others, inactive and frozen, with scale 1.

        An adapter that a layer lacks contributes nothing there.

        Args:
            weights: one for each adapter; negative ones subtract it.
            combination_type: "cat" puts the pairs side by side: exactly the weighted sum of the updates, at the sum
                of the ranks. "svd": the best approximation of that sum at a lower rank. "linear": weighted sums of
                the A's and of the B's, exact for one adapter, refused for ranks that differ. "magnitude_prune", "ties"
                (arXiv 2306.01708), "dare_linear", "dare_ties" (arXiv 2311.03099): prune A and B, then combine them;
                with "_svd" at the end, prune the updates and factor the result. "della_svd" (arXiv 2406.11617) drops
                small entries more often, "breadcrumbs_svd" (arXiv 2312.06795) the largest and the smallest ones,
                "knots_svd" (arXiv 2410.19735) is TIES in a basis that the updates have in common.
            svd_rank: rank of the result of the "svd" ways; by default the largest rank of the adapters.
            svd_clamp: limit the entries of A and B to this quantile, in (0, 1] ("svd" ways).
            svd_full_matrices: changes nothing. svd_driver: cuSOLVER's routine, on CUDA ("svd" ways).
            density: fraction of entries to keep, for the ways that prune.
            majority_sign_method: TIES' vote, weighed by size ("total") or not ("frequency").

        Raises:
            ValueError: for unknown adapters or ways, another number of weights, a name that is taken, or adapters
                that cannot be combined. The model is then unchanged.

        Examples:
            >>> model.add_adapter("other", LoraConfig(r=8, task_type="CAUSAL_LM"))
            >>> model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", combination_type="cat")
            >>> model.set_adapter("both")
        """
        weights = checked_weights(self, adapters, weights)
        check_adapter_name(adapter_name, [*self.peft_config])
        combination = Combination(combination_type, density, majority_sign_method)
        self._check_combination(adapters, svd_rank, svd_clamp)
        given = {"density": density, "majority_sign_method": majority_sign_method, "svd_rank": svd_rank,
                 "svd_clamp": svd_clamp, "svd_driver": svd_driver}  # fmt: skip
        if unused := idle(combination_type, given):
            warnings.warn(f"{unused}.", stacklevel=2)
        rank = self._combined_rank(adapters, combination, svd_rank)
        bias = any(self.peft_config[name].lora_bias for name in adapters)
        changes = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, **PLAIN}
        config = combined_config(self, adapters, lora_bias=bias, **changes)
        mixer = Mixer(combination, svd_clamp, svd_driver)

        def fill(layer: Any) -> None:
            here = [(layer.adapters[name], weight) for name, weight in zip(adapters, weights) if name in layer]
            mixer.fill(layer.adapters[adapter_name], here)

        add_combined(self, adapters, weights, adapter_name, config, fill)

    def starts_slowly(self, config: Any) -> bool:
        return rewrites(config.init_lora_weights)

    def without_start(
        self, adapter_name: str, tensors: dict[str, torch.Tensor], config: Any, path: str
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """As plain LoRA of twice the rank: s (B A - B0 A0), A0 and B0 being the tensors saved at ``path``.

        s stays: alpha doubles with the rank, or with rsLoRA becomes sqrt(2) times as much, in patterns too.
        """
        here = [layer.adapters[adapter_name] for _, layer in tuner_layers(self) if adapter_name in layer]
        if bound := [type(adapter).__name__ for adapter in here if adapter.fixed_rank]:
            raise ValueError(
                f"adapter {adapter_name!r} is {bound[0]}, which has tensors of its own that follow the rank: there is "
                "none of twice the rank that does the same. Merge it into the base instead (merge_and_unload)."
            )
        if config.init_lora_weights == "loftq":
            warnings.warn(
                f"adapter {adapter_name!r} was trained on weights that LoftQ has rounded. The plain LoRA that is "
                "written is for the weights as they were, so outputs differ by what rounding took away and the start "
                "did not make up for. Saved without path_initial_model_for_weight_conversion, it is loaded as it is.",
                PeftWarning,
            )
        own = os.path.join(path, adapter_name)
        start = load_peft_weights(own if os.path.isdir(own) else path, device="cpu")
        tensors = beside_start(self, adapter_name, tensors, start)
        # Twice the rank halves the scale alpha / r, and takes the root of a half from alpha / sqrt(r).
        config, factor = copy.copy(config), divisor(2, config.use_rslora)
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, factor * config.lora_alpha, True
        config.corda_config = config.lora_ga_config = None  # which say how it started
        config.rank_pattern = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
        config.alpha_pattern = {key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()}
        return tensors, config

    def lost_in_a_file(self, adapter_name: str) -> str | None:
        start, records = self.peft_config[adapter_name].init_lora_weights, [w.rewritten for _, w in tuner_layers(self)]
        here = [record for record in records if record is not None and adapter_name in record.own]
        if any(adapter_name in record.sums for record in here):
            source = "a sum of adapters, some of which have"
        elif here and rewrites(start) and not is_repeatable(start):
            source = f"init_lora_weights={start!r}, which has"
        else:
            return None
        return (
            f"adapter {adapter_name!r} comes from {source} changed the base weights as loading cannot repeat it: its "
            "file alone, on the original base, is another model. Save it with "
            "path_initial_model_for_weight_conversion, or merge it into the base."
        )

    def _check_ranks(self, adapters: list[str], combination: Combination) -> None:
        if combination.way.dense or combination.name == "cat":
            return
        for path, layer in tuner_layers(self):
            ranks = {name: layer.r[name] for name in adapters if name in layer}
            if len(set(ranks.values())) > 1:
                raise ValueError(
                    f"combination_type {combination.name!r} adds up A's and B's, and those of {path!r} have different "
                    f"ranks: {ranks}. 'cat' gives the exact sum, 'svd' its best approximation at the rank you say."
                )

    def _check_combination(self, adapters: list[str], svd_rank: int | None, svd_clamp: float | None) -> None:
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
        if routers := [name for name in adapters if self.peft_config[name].arrow_config is not None]:
            raise ValueError(f"{routers} are Arrow routers, which have no update of their own. Combine their experts.")
        if gated := [name for name in adapters if self.peft_config[name].use_gating]:
            raise ValueError(
                f"{gated} have gates (use_gating), so what they do depends on the sample, so no sum of tensors is "
                "their sum. Combine adapters without gates."
            )
        if len({tuple(self.peft_config[name].alora_invocation_tokens or ()) for name in adapters}) > 1:
            raise ValueError(
                f"the adapters {adapters} begin to act at different tokens (alora_invocation_tokens), and their sum "
                "would be none that begins at one. Combine adapters with the same invocation tokens."
            )

    def _combined_rank(self, adapters: list[str], combination: Combination, svd_rank: int | None) -> int:
        """The rank of the result, the same in all layers."""
        self._check_ranks(adapters, combination)
        ranks, groups = [], 1
        for _, layer in tuner_layers(self):
            here: list[Any] = [layer.adapters[name] for name in adapters if name in layer]
            if here:
                held = [pair_rank(lora) for lora in here]
                ranks.append(sum(held) if combination.name == "cat" else max(held))
                groups = math.lcm(groups, pair_blocks(here[0])[1])
        rank = svd_rank if combination.way.dense and svd_rank is not None else max(ranks)
        return math.ceil(rank / groups) * groups  # groups share the ranks evenly

    def _get_kasa_loss(self, adapter_names: str | Sequence[str] | None = None) -> torch.Tensor | float:
        """What KaSA adds to the loss: the sum over layers of its penalty; 0.0 without KaSA.

        Args:
            adapter_names: of which adapters; the active ones by default.
        """
        return sum((lora.kasa_penalty() for lora in self._those(Kasa, adapter_names)), start=0.0)

    def _get_monteclora_loss(self, adapter_names: str | Sequence[str] | None = None) -> torch.Tensor | float:
        """What MonteCLoRA adds to the loss in training: the mean over layers; 0.0 without it, and in evaluation.

        Args:
            adapter_names: of which adapters; the active ones by default.
        """
        found = [lora for lora in self._those(MonteCLora, adapter_names) if lora.training]
        return sum((lora.monteclora_penalty() for lora in found), start=0.0) / max(len(found), 1)

    def _those(self, variant: type, adapter_names: str | Sequence[str] | None) -> list[Any]:
        """The adapters of a variant by these names, in all layers."""
        names = self.active_adapters if adapter_names is None else adapter_names
        found = (layer.adapters.get(n) for _, layer in tuner_layers(self) for n in operations.names_of(names))
        return [lora for lora in found if isinstance(lora, variant)]


class Mixer:
    """Combines the pairs of one layer."""

    def __init__(self, combination: Combination, clamp: float | None, driver: str | None) -> None:
        self.combination, self.cat = combination, combination.name == "cat"
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
        pairs = [tuple(map(wide, lora.pair())) for lora, _ in parts]
        rank = split_pair(new, a, b)[0].shape[1]
        combine = self._from_updates if self.combination.way.dense or self.cat else self._from_factors
        down, up = combine(new, pairs, weights, scales, rank)
        for tensor, value in zip((a, b), join_pair(new, resized(down, rank, 1), resized(up, rank, 2))):
            tensor.copy_(value)
        biased = [(lora, w, s) for (lora, w), s in zip(parts, scales) if lora.lora_bias]
        if biased:
            shifts = [self.combination.pruned(wide(lora.lora_B.bias) * scale) for lora, _, scale in biased]
            bias.copy_(self.combination.summed(shifts, [weight for _, weight, _ in biased]))

    def _from_factors(
        self, new: Lora, pairs: list, weights: list[float], scales: list[float], rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A = sum_i sign(w_i s_i) sqrt|w_i s_i| A_i and B = sum_i sqrt|w_i s_i| B_i, after pruning."""
        factors = [weight * scale for weight, scale in zip(weights, scales)]
        downs, ups = [self.combination.pruned(a) for a, _ in pairs], [self.combination.pruned(b) for _, b in pairs]
        split_pairs = [split_pair(new, a, b) for a, b in zip(downs, ups)]
        roots = [math.sqrt(abs(f)) for f in factors]
        # A negative weight turns one of the factors.
        signed = [math.copysign(root, f) for root, f in zip(roots, factors)]
        down = self.combination.summed([resized(a, rank, 1) for a, _ in split_pairs], signed)
        return down, self.combination.summed([resized(b, rank, 2) for _, b in split_pairs], roots)

    def _from_updates(
        self, new: Lora, pairs: list, weights: list[float], scales: list[float], rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        split_pairs = [split_pair(new, a, b) for a, b in pairs]
        if self.combination.adds:
            down = torch.cat([w * s * a for (a, _), w, s in zip(split_pairs, weights, scales)], 1)
            up = torch.cat([b for _, b in split_pairs], 2)
            return (down, up) if self.cat else factorize_product(down, up, rank, self.clamp, self.driver)
        updates = [s * (b @ a) for (a, b), s in zip(split_pairs, scales)]
        return factorize(self.combination.merged(updates, weights), rank, self.clamp, self.driver)


LoraModel = define_tuner(Lora, LoraConfig, base=LoraTuner, layer=LoraLayer, __module__=__name__)
