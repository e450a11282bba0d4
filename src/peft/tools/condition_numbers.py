"""Which weights to adapt, by their condition numbers (KappaTune, arXiv 2506.16289).

A weight of low condition number spreads what it knows over all directions, so an update there disturbs little of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from tqdm import tqdm

from peft.core.base.kinds import kind_of
from peft.core.base.storage import storage_of
from peft.core.layer.weight import wide
from peft.core.model.walk import join, walk


MOE_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


def condition_number(weight: torch.Tensor) -> float:
    """Largest over smallest singular value of a matrix, computed in float32; of a stack ``[n, a, b]`` the mean."""
    values = torch.linalg.svdvals(wide(weight.detach()))
    return float((values[..., 0] / values[..., -1]).mean())  # over the experts, of a stack


class KappaTuneSelector:
    """Ranks the linear layers and the stacked experts of a base model, lowest condition number first.

    Computed when first asked for: one singular value decomposition for each weight, on its device.

    Args:
        model: the base model; quantised weights are read dense one by one.
        max_dim_size_to_analyze: weights with a longer side are left out.
        moe_param_suffixes: how the names of stacked experts (parameters ``[experts, a, b]``) end; by default those of
            transformers' mixtures of experts.
        show_progress: show a progress bar.

    Examples:
        >>> selector = KappaTuneSelector(model)
        >>> config = LoraConfig(target_modules=selector.get_best_targets(top_p=0.2))
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = MOE_SUFFIXES if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self.show_progress = show_progress
        self._found: tuple[dict[str, float], dict[str, float]] | None = None

    def _weights(self) -> Iterator[tuple[str, nn.Module, str, bool]]:
        """Name, module, attribute, and whether it is a parameter rather than a layer, of each weight to analyse."""
        for site in walk(self.model):
            kind = kind_of(site.module)
            if kind is not None and kind.matrix and not kind.lookup:
                if max(kind.shape(site.module)) <= self.max_dim_size_to_analyze:
                    yield site.key, site.module, kind.weight, False
            for attribute, parameter in site.module._parameters.items():
                name = join(site.key, attribute)
                fits = parameter is not None and parameter.dim() == 3 and name.endswith(self.moe_param_suffixes)
                if fits and max(parameter.shape[1:]) <= self.max_dim_size_to_analyze:
                    yield name, site.module, attribute, True

    def condition_numbers(self) -> tuple[dict[str, float], dict[str, float]]:
        """Condition numbers by the names of layers, and by those of parameters.

        Raises:
            ValueError: if a weight cannot be read.
        """
        if self._found is None:
            found: tuple[dict[str, float], dict[str, float]] = {}, {}
            weights = list(self._weights())
            for name, module, attribute, stacked in tqdm(weights, "condition numbers", disable=not self.show_progress):
                weight = storage_of(module, attribute).read(module, attribute)
                if weight.is_meta:
                    raise ValueError(f"{name!r} is on the meta device: load the model's weights first.")
                found[stacked][name] = condition_number(weight)
            self._found = found
        return self._found

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names for ``target_modules``, lowest condition number first.

        Args:
            top_p: this part of all, at least one. num_modules: this many; goes before ``top_p``.
            threshold: only those with at most this condition number.
        """
        return _lowest(self.condition_numbers()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names for ``target_parameters``; see :meth:`get_best_targets`."""
        return _lowest(self.condition_numbers()[1], top_p, num_modules, threshold)


def _lowest(numbers: dict[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    names = sorted(numbers, key=numbers.__getitem__)
    if count is None and top_p is not None:
        count = max(1, int(len(names) * top_p))
    return [name for name in names[:count] if threshold is None or numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The part ``top_p`` of the linear layers, and of the stacked experts, with the lowest condition numbers.

    Returns:
        ``{"target_modules": names, "target_parameters": names or None}``; see :class:`KappaTuneSelector`.

    Examples:
        >>> config = LoraConfig(**find_kappa_target_modules(model, top_p=0.2))
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    parameters = selector.get_best_target_parameters(top_p) or None
    return {"target_modules": selector.get_best_targets(top_p), "target_parameters": parameters}
