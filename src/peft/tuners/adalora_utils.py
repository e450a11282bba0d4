"""Who keeps which ranks: importance I = |p dp| of triplets, and a budget that shrinks (arXiv 2303.10512)."""

from __future__ import annotations

from typing import Any

import torch


def mask_of(config: Any, key: str, name: str) -> list[bool] | None:
    """Which ranks of a layer are left; files name them with the adapter's name at the time, or without."""
    for pattern, mask in (config.rank_pattern or {}).items():
        if pattern == f"{key}.lora_E" or pattern.rpartition(".")[0] == f"{key}.lora_E":
            return list(mask)
    return None


class RankAllocator:
    """Who keeps which ranks: importances of the triplets (A row, E entry, B column), and the budget over time."""

    def __init__(self, config: Any, layers: dict[str, Any], name: str) -> None:
        self.config, self.layers, self.name = config, layers, name
        self.importance: dict[tuple[str, str], torch.Tensor] = {}
        self.uncertainty: dict[tuple[str, str], torch.Tensor] = {}

    def budget(self, step: int) -> int:
        """Ranks of all layers together: a cubic decay from the first to the last (equation 12)."""
        config, count = self.config, len(self.layers)
        first, last, total = config.init_r * count, config.target_r * count, config.total_step or 0
        if step <= config.tinit:
            return first
        if step > total - config.tfinal:
            return last
        rest = 1 - (step - config.tinit) / (total - config.tfinal - config.tinit)
        return int((first - last) * rest**3 + last)

    def observe(self) -> None:
        """Averages of |p dp|, and of how much it varies (equations 9 and 10)."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for key, layer in self.layers.items():
            for part in layer.weights:
                p = getattr(layer, part)[self.name]
                if p.grad is None:
                    raise ValueError(
                        "update_and_allocate reads the gradients of the adapter, and there are none. Call it after "
                        "loss.backward() and before optimizer.zero_grad()."
                    )
                now = (p * p.grad).abs().detach()
                mean = self.importance.get((key, part), torch.zeros_like(now)).mul(beta1).add(now, alpha=1 - beta1)
                old = self.uncertainty.get((key, part), torch.zeros_like(now))
                self.importance[key, part] = mean
                self.uncertainty[key, part] = old.mul(beta2).add((now - mean).abs(), alpha=1 - beta2)

    def scores(self, key: str) -> torch.Tensor:
        """Of each rank of a layer, ``[r]`` (equation 7 with the element score of equation 11)."""
        a, e, b = (self.importance[key, p] * self.uncertainty[key, p] for p in ("lora_A", "lora_E", "lora_B"))
        return e.flatten() + a.mean(1) + b.mean(0)

    @torch.no_grad()
    def allocate(self, budget: int) -> dict[str, list[bool]]:
        """Set E to zero where the score is below those of the ``budget`` best; which ones are left, by tensor name."""
        scores = {key: self.scores(key).cpu() for key in self.layers}
        every = torch.cat(list(scores.values()))
        cut = len(every) - budget
        threshold = every.kthvalue(cut).values if cut > 0 else every.min() - 1
        kept = {key: score > threshold for key, score in scores.items()}
        self.mask(kept)
        return {f"{key}.lora_E": mask.tolist() for key, mask in kept.items()}

    @torch.no_grad()
    def mask(self, kept: dict[str, torch.Tensor]) -> None:
        """Set E to zero where nothing is kept."""
        for key, mask in kept.items():
            e = self.layers[key].lora_E[self.name]
            e.mul_(mask.to(e.device)[:, None])
