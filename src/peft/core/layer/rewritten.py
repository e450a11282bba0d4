"""Base weights that an adapter's start has rewritten (PiSSA, LoftQ ...), and how they come back bit for bit.

The original is kept as long as the adapter is there: subtracting and adding again would round. That takes as much
memory as the rewritten weights once more; those of an accelerator are kept in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from peft.core.layer import weight as weights


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer


@torch.no_grad()
def rewrite(layer: BaseTunerLayer, name: str, weight: torch.Tensor) -> None:
    """Let the base weight be another ``[out, in, *kernel]`` for as long as the layer has the adapter ``name``.

    The base layer gets a parameter of its own, so other modules that hold the same one keep theirs.

    Raises:
        ValueError: if the weight cannot be replaced; the layer is unchanged.
    """
    weights.check_writable(layer)
    base, attribute, storage = layer.get_base_layer(), layer.kind.weight, layer.storage
    with _without_merged(layer):
        if name not in layer.rewritten:
            layer.rewritten[name] = base, storage, storage.aside(storage.keep(base, attribute))
        storage.write(base, attribute, layer.kind.restore(weight, base), storage.replaceable)


@torch.no_grad()
def give_back(layer: BaseTunerLayer, name: str) -> None:
    """Take out of the base weight what an adapter's start has changed; after the last, it is the original's bits."""
    if name not in layer.rewritten:
        return
    base, attribute, kind = layer.get_base_layer(), layer.kind.weight, layer.kind
    with _without_merged(layer):
        names = list(layer.rewritten)
        later = names[names.index(name) + 1 :]
        old, storage, kept = layer.rewritten[name]
        if old is not base:  # somebody has dequantised the model meanwhile
            weights.set_base_weight(layer, kind.orient(storage.read_kept(old, attribute, kept), old))
        elif later:
            _take_from_under(layer, name, later)
        else:
            storage.put_back(base, attribute, kept)
        del layer.rewritten[name]


def _take_from_under(layer: BaseTunerLayer, name: str, later: list[str]) -> None:
    """Undo one change of the weight on which others stand: the next of them begins where it did."""
    (base, storage, kept), attribute = layer.rewritten[name], layer.kind.weight
    states = [layer.rewritten[other][2] for other in later]
    before, after = (weights.wide(storage.read_kept(base, attribute, state)) for state in (kept, states[0]))
    change, moved = before - after, []
    for state in (*states[1:], storage.keep(base, attribute)):
        storage.put_back(base, attribute, state)
        stored = storage.read(base, attribute)
        storage.write(base, attribute, (weights.wide(stored) + change).to(stored.dtype), storage.replaceable)
        moved.append(storage.keep(base, attribute))
    for other, state in zip(later, (kept, *map(storage.aside, moved[:-1]))):
        layer.rewritten[other] = base, storage, state


def give_back_unmerged(layer: BaseTunerLayer) -> None:
    """The same for all adapters but those that are in the weight to stay."""
    for name in reversed([name for name in layer.rewritten if name not in layer.merged_adapters]):
        give_back(layer, name)


@contextmanager
def _without_merged(layer: BaseTunerLayer) -> Iterator[None]:
    """A context in which the layer's weight holds no adapter; those that it held are in it again afterwards."""
    merged = layer.merged_ones()
    weights.unmerge(layer)
    try:
        yield
    finally:
        if merged:
            weights.merge(layer, merged, safe_merge=False)
