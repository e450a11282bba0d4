"""The principal components of layers' inputs, until they no longer turn; how EVA shares ranks out by them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from peft.errors import some
from peft.tuners.lora.incremental_pca import IncrementalPCA
from peft.tuners.lora.preparing import evaluating, seen_by


class Components:
    """The components ``[k, in]`` of what one layer has seen, and which of them have come to rest.

    Attributes:
        at_rest: ``[k]``, whether the last batch has turned a component by less than the cosine similarity ``tau``.
    """

    def __init__(self, count: int, tau: float) -> None:
        self.pca, self.count, self.tau = IncrementalPCA(n_components=count), count, tau
        self.waiting: list[torch.Tensor] = []
        self.at_rest = torch.zeros(count, dtype=torch.bool)

    def add(self, rows: torch.Tensor) -> None:
        """Take rows ``[n, in]``; fewer than there are components wait for more."""
        self.waiting.append(rows.float())
        if sum(map(len, self.waiting)) < self.count:
            return
        before = self.pca.components_
        self.pca.partial_fit(torch.cat(self.waiting))
        self.waiting = []
        if before is not None:
            now: Any = self.pca.components_
            self.at_rest = (torch.cosine_similarity(before, now, dim=1) >= self.tau).cpu()

    def shares(self) -> list[float]:
        """Which share of the variance each component explains."""
        return [] if self.pca.components_ is None else self.pca.explained_variance_ratio_.tolist()


def shared_out(shares: dict[str, list[float]], budget: int, same: dict[str, str]) -> dict[str, int]:
    """How many ranks each layer gets: those of the components that explain most, over all layers.

    Args:
        shares: by layer, for each component the share of the variance that it explains.
        budget: how many ranks there are. same: layer -> the one that has the same input, which gets no fewer.
    """
    order = sorted(((share, name) for name, values in shares.items() for share in values), key=lambda c: -c[0])
    ranks = dict.fromkeys(shares, 0)
    for _, name in order[:budget]:
        ranks[name] += 1
    for name, first in same.items():
        if ranks[first] < ranks[name]:
            ranks[first], ranks[name] = ranks[name], ranks[first]
    return ranks


def _digest(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest() + str(rows.shape)


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """The rows ``[n, in]`` of all processes, in their order; each may have another n."""
    world = torch.distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(map(int, counts))
    padded = nn.functional.pad(rows, (0, 0, 0, most - len(rows))).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])


def _rounds(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches over and over."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("the dataloader gives no batches.")


class Watched:
    """The layers of a model whose inputs are looked at.

    Args:
        layers: by name. ranks: what each has now; together they are the budget.
        most: how many components of each are wanted at most.
        run: runs the model on a batch.
        take: makes rows ``[n, in]`` of what a layer of this name got.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        ranks: dict[str, int],
        most: dict[str, int],
        tau: float,
        run: Callable[[Any], Any],
        take: Callable[[str, torch.Tensor], torch.Tensor],
    ) -> None:
        self.model, self.layers, self.ranks, self.most, self.tau = model, layers, ranks, most, tau
        self.run, self.take = run, take

    def twins(self, batch: Any) -> dict[str, str]:
        """Layers whose input is that of one before them, and that one's name.

        Raises:
            ValueError: if a layer is not called.
        """
        digests: dict[str, str] = {}

        def see(name: str, module: nn.Module, x: torch.Tensor) -> None:
            digests.setdefault(name, _digest(self.take(name, x)))

        with evaluating(self.model), seen_by(self.layers.items(), see):
            self.run(batch)
        if unseen := [name for name in self.layers if name not in digests]:
            raise ValueError(
                f"{some(unseen)} saw no input in the first batch, so EVA knows nothing of it; leave it out "
                "of target_modules, or start in another way."
            )
        first: dict[str, str] = {}
        of = {name: first.setdefault(f"{digests[name]} {self.most[name]}", name) for name in self.layers}
        return {name: other for name, other in of.items() if name != other}

    def components(self, batches: Iterable[Any], progress: bool) -> tuple[dict[str, Components], dict[str, int]]:
        """The components of each layer, and the rank that it is to have; layers of one input share the former."""
        rounds = _rounds(batches)
        same = self.twins(next(rounds))
        found = {name: Components(self.most[name], self.tau) for name in self.layers if name not in same}
        every = {name: found[same.get(name, name)] for name in [*found, *same]}
        budget, ranks = sum(self.ranks.values()), dict(self.most)

        def restless() -> list[str]:
            return [name for name, c in found.items() if not bool(c.at_rest[: ranks[name]].all())]

        def see(name: str, module: nn.Module, x: torch.Tensor) -> None:
            found[name].add(self.take(name, x))

        rounds = _rounds(batches)
        with tqdm(total=len(found), desc="EVA: layers at rest", disable=not progress) as bar:
            while names := restless():
                bar.update(len(found) - len(names) - bar.n)
                with evaluating(self.model), seen_by([(name, self.layers[name]) for name in names], see):
                    self.run(next(rounds))
                if all(c.shares() for c in found.values()):
                    ranks = shared_out({name: c.shares() for name, c in every.items()}, budget, same)
            bar.update(len(found) - bar.n)
        return every, ranks
