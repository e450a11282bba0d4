"""Who keeps which ranks: importance I = |p dp| of triplets, and a budget that shrinks (arXiv 2303.10512)."""

from __future__ import annotations

from typing import Any

import torch

from peft.core.combine.combined import tuner_layers
from peft.core.model.tuner import BaseTuner
from peft.usage import note


def kept_of(rank_pattern: dict[str, Any] | None, key: str) -> torch.Tensor | None:
    """Which ranks of a layer a pattern keeps, as indices; it has a mask of them, or how many they are.

    Files name the layer with the adapter's name at the time, or without.
    """
    known = rank_pattern or {}
    name = next((name for name in known if f"{key}.lora_E" in (name, name.rpartition(".")[0])), "")
    note(rank_pattern, [name])
    if not name:
        return None
    mask = known[name]
    return torch.arange(mask) if isinstance(mask, int) else torch.as_tensor(mask, device="cpu").bool().nonzero()[:, 0]


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
        self.last: dict[Any, torch.Tensor] = {}  # of the last step alone

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
        now = self.last[key] = (p * p.grad).abs().detach()
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
    """Who keeps which ranks: importances of the triplets (A row, E entry, B column), and the budget over time.

    Its steps have the names of 0.21.2, since scripts call and replace them, such as ms-swift (``mask_to_budget``).

    Attributes:
        adapters: by the names of the modules that they adapt. ipt: parameter name -> importance in the last step.
        exp_avg_ipt, exp_avg_unc: averages of that, and of how uncertain it is.
    """

    def __init__(self, config: Any, adapters: dict[str, Any], adapter_name: str = "default") -> None:
        self.peft_config, self.adapters, self.adapter_name = config, adapters, adapter_name
        self.beta1, self.beta2 = config.beta1, config.beta2
        self.reset_ipt()

    def reset_ipt(self) -> None:
        """Forget all importances."""
        self.sensitivity = Sensitivity(self.beta1, self.beta2)
        self.ipt = self.sensitivity.last
        self.exp_avg_ipt, self.exp_avg_unc = self.sensitivity.importance, self.sensitivity.uncertainty

    @property
    def init_bgt(self) -> int:
        """Ranks of all layers together at the start."""
        return self.peft_config.init_r * len(self.adapters)

    @property
    def target_bgt(self) -> int:
        """Ranks of all layers together at the end."""
        return self.peft_config.target_r * len(self.adapters)

    @property
    def end(self) -> int:
        """The step in which the ranks are settled."""
        return (self.peft_config.total_step or 0) - self.peft_config.tfinal

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """Ranks of all layers together, a cubic decay (equation 12); and whether they are shared out in this step."""
        config = self.peft_config
        if step <= config.tinit:
            return self.init_bgt, False
        if step > self.end:
            return self.target_bgt, True
        done = (step - config.tinit) / (self.end - config.tinit)
        return budget_at(done, self.init_bgt, self.target_bgt), step % config.deltaT == 0

    def set_total_step(self, total_step: int) -> None:
        """Say how many steps the training has, where that was not known when the config was made."""
        self.peft_config.total_step = total_step

    def update_and_allocate(
        self, model: Any, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Take in a step's gradients, and share the budget out if it is time: the budget, and what is left if so."""
        if global_step < self.end or not self.exp_avg_ipt:  # the last step settles by those before
            self.update_ipt(model)
        budget, due = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if due or force_mask else None

    def update_ipt(self, model: Any) -> None:
        """Take in the gradients of a step."""
        for key, adapter in self.adapters.items():
            for part in ("lora_A", "lora_E", "lora_B"):
                self.sensitivity.observe(self._name(key, part), getattr(adapter, part))

    def _name(self, key: str, part: str) -> str:
        return f"{key}.{part}.{self.adapter_name}"

    def _element_score(self, name: str) -> torch.Tensor:
        """How much the loss depends on each number of a parameter."""
        return self.sensitivity.score(name)

    def _combine_ipt(self, of_e: torch.Tensor, of_pair: torch.Tensor) -> torch.Tensor:
        """The score of each rank, of its E ``[r, 1]`` and the means over its row of A and column of B ``[r, 2]``."""
        return of_e.view(-1) + of_pair.sum(dim=1, keepdim=False).view(-1)

    def scores(self, key: str) -> torch.Tensor:
        """Of each rank of a layer, ``[r]`` (equation 7)."""
        a, e, b = (self._element_score(self._name(key, part)) for part in ("lora_A", "lora_E", "lora_B"))
        return self._combine_ipt(e, torch.stack([a.mean(1), b.mean(0)], 1))

    @torch.no_grad()
    def mask_to_budget(self, model: Any, budget: int) -> dict[str, list[bool]]:
        """Set E to zero where the score is below those of the ``budget`` best; which ones are left, by tensor name."""
        scores = {key: self.scores(key).cpu() for key in self.adapters}
        every = torch.cat(list(scores.values()))
        cut = len(every) - budget
        threshold = every.kthvalue(cut).values if cut > 0 else every.min() - 1
        kept = {key: score > threshold for key, score in scores.items()}
        self.mask(kept)
        return {f"{key}.lora_E": mask.tolist() for key, mask in kept.items()}

    def mask_using_rank_pattern(self, model: Any, rank_pattern: dict[str, list[bool]]) -> None:
        """Set E to zero where a pattern keeps nothing."""
        found = {key: kept_of(rank_pattern, key) for key in self.adapters}
        self.mask({key: self.adapters[key].marks(index) for key, index in found.items() if index is not None})

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
        return self.kept(name, RankAllocator(self.peft_config[name], self.ranked(name), name))

    @property
    def rankallocator(self) -> RankAllocator:
        """Who shares out those of the active adapter; scripts tell it how long they train (``set_total_step``)."""
        return self.allocator(self.active_adapters[0])

    @property
    def trainable_adapter_name(self) -> str:
        """The adapter whose ranks are shared out. A forward that ms-swift puts in asks for it."""
        return self.active_adapters[0]

    def ranked(self, name: str) -> dict[str, Any]:
        """The adapters called so by the names of the modules that they adapt."""
        return {key: layer.adapters[name] for key, layer in tuner_layers(self) if name in layer}
