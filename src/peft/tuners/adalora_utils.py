"""Who keeps which ranks: importance I = |p dp| of triplets, and a budget that shrinks (arXiv 2303.10512)."""

from __future__ import annotations

from typing import Any

import torch

from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import walk


def mask_of(config: Any, key: str) -> list[bool] | None:
    """Which ranks of a layer are left; files name them with the adapter's name at the time, or without."""
    for pattern, mask in (config.rank_pattern or {}).items():
        if pattern == f"{key}.lora_E" or pattern.rpartition(".")[0] == f"{key}.lora_E":
            return list(mask)
    return None


class BudgetTuner(BaseTuner):
    """A tuner that shares out a budget in the course of training, by what it keeps for each adapter."""

    def kept(self, name: str, start: Any) -> Any:
        """What is kept for an adapter; ``start`` if there is nothing yet."""
        return self.__dict__.setdefault("_budgets", {}).setdefault(name, start)

    def forget(self, adapter_name: str) -> None:
        self.__dict__.get("_budgets", {}).pop(adapter_name, None)


class Sensitivity:
    """How much a loss depends on each number: I = |p dp|, averaged, times how uncertain that average is."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.importance: dict[Any, torch.Tensor] = {}
        self.uncertainty: dict[Any, torch.Tensor] = {}

    def observe(self, key: Any, p: torch.Tensor) -> None:
        """Take in the gradient of one tensor (equations 9 and 10).

        Raises:
            ValueError: it has none.
        """
        if p.grad is None:
            raise ValueError(
                "update_and_allocate reads the gradients of the adapter, and there are none. Call it after "
                "loss.backward() and before optimizer.zero_grad()."
            )
        now = (p * p.grad).abs().detach()
        mean = self.importance.get(key, torch.zeros_like(now)).mul(self.beta1).add(now, alpha=1 - self.beta1)
        old = self.uncertainty.get(key, torch.zeros_like(now))
        self.importance[key] = mean
        self.uncertainty[key] = old.mul(self.beta2).add((now - mean).abs(), alpha=1 - self.beta2)

    def score(self, key: Any) -> torch.Tensor:
        """Of each number of a tensor (equation 11)."""
        return self.importance[key] * self.uncertainty[key]


def budget_at(done: float, first: int, last: int, exponent: float = 3.0) -> int:
    """How much of a budget that shrinks from ``first`` to ``last`` is left at a share of the way (equation 12)."""
    return int((first - last) * (1 - done) ** exponent + last)


class RankAllocator:
    """Who keeps which ranks: importances of the triplets (A row, E entry, B column), and the budget over time."""

    def __init__(self, config: Any, adapters: dict[str, Any]) -> None:
        self.config, self.adapters = config, adapters
        self.sensitivity = Sensitivity(config.beta1, config.beta2)

    def budget(self, step: int) -> int:
        """Ranks of all layers together: a cubic decay from the first to the last (equation 12)."""
        config, count = self.config, len(self.adapters)
        first, last, total = config.init_r * count, config.target_r * count, config.total_step or 0
        if step <= config.tinit:
            return first
        if step > total - config.tfinal:
            return last
        return budget_at((step - config.tinit) / (total - config.tfinal - config.tinit), first, last)

    def set_total_step(self, total_step: int) -> None:
        """Say how many steps the training has, where that was not known when the config was made."""
        self.config.total_step = total_step

    def observe(self) -> None:
        """Take in the gradients of a step."""
        for key, adapter in self.adapters.items():
            for part in ("lora_A", "lora_E", "lora_B"):
                self.sensitivity.observe((key, part), getattr(adapter, part))

    def scores(self, key: str) -> torch.Tensor:
        """Of each rank of a layer, ``[r]`` (equation 7)."""
        a, e, b = (self.sensitivity.score((key, part)) for part in ("lora_A", "lora_E", "lora_B"))
        return e.flatten() + a.mean(1) + b.mean(0)

    @torch.no_grad()
    def allocate(self, budget: int) -> dict[str, list[bool]]:
        """Set E to zero where the score is below those of the ``budget`` best; which ones are left, by tensor name."""
        scores = {key: self.scores(key).cpu() for key in self.adapters}
        every = torch.cat(list(scores.values()))
        cut = len(every) - budget
        threshold = every.kthvalue(cut).values if cut > 0 else every.min() - 1
        kept = {key: score > threshold for key, score in scores.items()}
        self.mask(kept)
        return {f"{key}.lora_E": mask.tolist() for key, mask in kept.items()}

    def mask_to_budget(self, model: Any, budget: int) -> dict[str, list[bool]]:
        """:meth:`allocate`, as third parties know it (ms-swift); ``model`` is not asked, the adapters are known."""
        return self.allocate(budget)

    @torch.no_grad()
    def mask(self, kept: dict[str, torch.Tensor]) -> None:
        """Set E to zero where nothing is kept."""
        for key, mask in kept.items():
            e = self.adapters[key].lora_E
            e.mul_(mask.to(e.device)[:, None])


class Allocating(BudgetTuner):
    """A tuner whose adapters share out ranks."""

    def allocator(self, name: str) -> RankAllocator:
        """Who shares out those of an adapter."""
        return self.kept(name, RankAllocator(self.peft_config[name], self.ranked(name)))

    @property
    def rankallocator(self) -> RankAllocator:
        """Who shares out those of the active adapter; scripts tell it how long they train (``set_total_step``)."""
        return self.allocator(self.active_adapters[0])

    def ranked(self, name: str) -> dict[str, Any]:
        """The adapters called so by the names of the modules that they adapt."""
        wrappers = ((site.key, w) for site in walk(self.model) for _, w in site.wrappers)
        found = ((key, w.adapters) for key, w in wrappers if isinstance(w, self.layer_cls))
        return {key: adapters[name] for key, adapters in found if name in adapters}
