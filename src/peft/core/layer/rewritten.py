"""Base weights that an adapter's start has rewritten (PiSSA, LoftQ ...): in the layer while that adapter acts.

A start of this kind takes a part of the weight into the adapter. What is left belongs to this adapter: the base model
without it, and any other adapter, stand on the original. So the layer holds the rewritten weight while the adapter is
active or merged, and the original otherwise. The one that is not in the layer is kept aside, in the host's memory.
Nothing is subtracted and added again, so the original comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.core.base.storage import Storage
from peft.core.layer import weight as weights


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer

Kept = tuple[nn.Module, Storage, Any]
"""A weight that is not in the layer: the base layer that had it, how it was stored, what that storage kept of it."""


@dataclass
class Rewritten:
    """The weights of one layer.

    Attributes:
        original: the weight before any start.
        own: adapter -> the weight that its start made of the original; None while that is in the layer.
        inside: the adapters whose starts are in the weight now.
        sums: the adapters that are weighted sums of others.
        brought: the adapters whose files hold the weight that they stand on.
    """

    original: Kept
    own: dict[str, Kept | None] = field(default_factory=dict)
    inside: tuple[str, ...] = ()
    sums: set[str] = field(default_factory=set)
    brought: set[str] = field(default_factory=set)

    def copy(self) -> Rewritten:
        """The same for a layer that goes on from here: the weights themselves are never changed."""
        return replace(self, own=dict(self.own), sums=set(self.sums), brought=set(self.brought))


@torch.no_grad()
def rewrite(layer: BaseTunerLayer, name: str, weight: torch.Tensor) -> None:
    """Let the base weight be another ``[out, in, *kernel]`` wherever the adapter ``name`` acts.

    It is in the layer afterwards, until :func:`follow` is called. The base layer gets a parameter of its own, so other
    modules that hold the same one keep theirs.

    Raises:
        ValueError: if the weight cannot be replaced; the layer is unchanged.
    """
    weights.check_writable(layer)
    with _without_merged(layer):
        _place(layer, ())
        record = layer.rewritten = layer.rewritten or Rewritten(_taken(layer))
        _write(layer, weight)
        record.own[name], record.inside = None, (name,)


def stand_on(layer: BaseTunerLayer, name: str, stored: torch.Tensor) -> None:
    """Let an adapter stand on a base weight that a file has brought, as the base layer stores it.

    Raises:
        ValueError: if the weight cannot be replaced; the layer is unchanged.
    """
    base = layer.get_base_layer()
    original = original_weight(layer)
    weight = layer.kind.orient(stored, base).to(original)
    if torch.equal(weight, original):  # nothing of its own, which would take memory
        give_back(layer, name)
        return
    rewrite(layer, name, weight)
    assert layer.rewritten is not None
    layer.rewritten.brought.add(name)
    follow(layer)


def brought_weight(layer: BaseTunerLayer, name: str) -> torch.Tensor | None:
    """What :func:`stand_on` was given, None where an adapter stands on no weight of its own."""
    record = layer.rewritten
    if record is None or name not in record.brought:
        return None
    kept, base = record.own[name], layer.get_base_layer()
    with _without_merged(layer):
        weight = weights.base_weight(layer) if kept is None else _read(layer, kept)
    return layer.kind.restore(weight, base)


def original_weight(layer: BaseTunerLayer) -> torch.Tensor:
    """The base weight ``[out, in, *kernel]`` without any adapter and any start, in the dtype that it is stored in."""
    if layer.rewritten is not None and layer.rewritten.inside:
        return _read(layer, layer.rewritten.original)
    stored = weights.base_weight(layer)
    return weights.unmerged_weight(layer).to(stored.dtype) if layer.merged else stored


@contextmanager
def for_a_start(layer: BaseTunerLayer) -> Iterator[None]:
    """A context for making an adapter: the base weight has only what merged adapters' starts have made of it."""
    keep_merged(layer)
    try:
        yield
    finally:
        follow(layer)


def keep_merged(layer: BaseTunerLayer) -> None:
    """Have the starts of merged adapters alone in the weight."""
    if layer.rewritten is not None:
        _change(layer, [name for name in layer.rewritten.inside if name in layer.merged_adapters])


def follow(layer: BaseTunerLayer) -> None:
    """Have the starts of those adapters in the weight that act on it now: the active and the merged ones."""
    if layer.rewritten is not None:
        active = () if layer.disable_adapters else layer.active_adapters
        _change(layer, [*active, *layer.merged_adapters])


def include(layer: BaseTunerLayer, names: Sequence[str]) -> None:
    """Have the starts of these adapters in the weight too, as they are about to be merged."""
    if layer.rewritten is not None:
        _change(layer, [*layer.rewritten.inside, *names])


@torch.no_grad()
def combine_starts(layer: BaseTunerLayer, name: str, parts: Sequence[tuple[str, float]]) -> None:
    """Let a weighted sum of adapters stand on the same sum of what their starts have made of the weight."""
    record = layer.rewritten
    if record is None or not any(part in record.own for part, _ in parts):
        return
    with for_a_start(layer), _without_merged(layer):
        _place(layer, ())
        original = original_weight(layer)
        total = weights.wide(original).clone()
        for part, factor in parts:
            if (kept := record.own.get(part)) is not None:
                total += factor * (weights.wide(_read(layer, kept)) - weights.wide(original))
        rewrite(layer, name, total.to(original.dtype))
        record.sums.add(name)


def refuse_several_bases(layer: BaseTunerLayer, names: Sequence[str]) -> None:
    """Raise ValueError where these adapters, one for each row of a batch, stand on another weight than the layer's."""
    record = layer.rewritten
    if record is None or all(_known(layer, [name]) == record.inside for name in set(names)):
        return
    name = next(name for name in record.own if name in layer.context.behind(names) or name in record.inside)
    raise ValueError(
        f"adapter {name!r} has a base weight of its own, from its start or its file, so it stands on another weight "
        "than the other rows of this batch. Give it a batch of its own, as the active adapter; or save it with "
        "path_initial_model_for_weight_conversion, load that, and mix it with any other."
    )


def give_back(layer: BaseTunerLayer, name: str) -> None:
    """Undo what an adapter's start has made of the base weight; after the last, nothing is kept aside."""
    record = layer.rewritten
    if record is not None and name in record.own:
        _change(layer, [other for other in record.inside if other != name])
        del record.own[name]
        record.sums.discard(name)
        record.brought.discard(name)
        if not record.own:
            layer.rewritten = None


def give_back_unmerged(layer: BaseTunerLayer) -> None:
    """The same for all adapters but those that are in the weight to stay."""
    if layer.rewritten is not None:
        _change(layer, layer.merged_adapters)
        for name in [name for name in layer.rewritten.own if name not in layer.merged_adapters]:
            give_back(layer, name)


def _known(layer: BaseTunerLayer, names: Sequence[str]) -> tuple[str, ...]:
    """Those of these adapters that have a weight of their own, always in the same order."""
    acting = layer.context.behind(names)
    return tuple(name for name in layer.rewritten.own if name in acting) if layer.rewritten is not None else ()


def _change(layer: BaseTunerLayer, names: Sequence[str]) -> None:
    """Have the starts of exactly these adapters in the weight, whatever is merged into it."""
    wanted = _known(layer, names)
    if layer.rewritten is not None and layer.rewritten.inside != wanted:
        with _without_merged(layer):
            _place(layer, wanted)


@torch.no_grad()
def _place(layer: BaseTunerLayer, names: tuple[str, ...]) -> None:
    """The same for a weight into which nothing is merged."""
    record = layer.rewritten
    if record is None or record.inside == names:
        return
    if len(record.inside) == 1:  # of several, the sum can be made again
        record.own[record.inside[0]] = _taken(layer)
    wanted = [kept for name in names if (kept := record.own[name]) is not None]
    _put(layer, wanted[0] if len(names) == 1 else record.original)
    if len(names) == 1:
        record.own[names[0]] = None
    elif names:
        original = weights.base_weight(layer)
        changed = sum((weights.wide(_read(layer, kept)) - weights.wide(original) for kept in wanted), start=original)
        _write(layer, changed.to(original.dtype))
    record.inside = names


def _write(layer: BaseTunerLayer, weight: torch.Tensor) -> None:
    base, storage = layer.get_base_layer(), layer.storage
    storage.write(base, layer.kind.weight, layer.kind.restore(weight, base), storage.replaceable)


def _taken(layer: BaseTunerLayer) -> Kept:
    """The weight that is in the layer now."""
    base, storage = layer.get_base_layer(), layer.storage
    return base, storage, storage.aside(storage.keep(base, layer.kind.weight))


def _put(layer: BaseTunerLayer, kept: Kept) -> None:
    """Bring a weight back into the layer."""
    old, storage, state = kept
    if old is layer.get_base_layer():
        storage.put_back(old, layer.kind.weight, state)
    else:  # somebody has dequantised the model meanwhile
        weights.set_base_weight(layer, _read(layer, kept))


def _read(layer: BaseTunerLayer, kept: Kept) -> torch.Tensor:
    old, storage, state = kept
    return layer.kind.orient(storage.read_kept(old, layer.kind.weight, state), old)


@contextmanager
def _without_merged(layer: BaseTunerLayer) -> Iterator[None]:
    """A context in which the layer's weight holds no adapter; those that it held are in it again afterwards."""
    merged = layer.merged_ones()
    weights.unmerge(layer)
    try:
        yield
    finally:
        if merged:
            if layer.rewritten is not None:
                inside = [*layer.rewritten.inside, *(adapter.name for adapter in merged)]
                _place(layer, _known(layer, inside))
            weights.merge(layer, merged, safe_merge=False)
