"""Weighted sums of adapters, dW = sum_i w_i dW_i, made of their tensors where what an adapter does is linear in them.

A method says what its tensors mean for a sum: see :mod:`peft.core.addition`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peft.core.adapter import Adapter
from peft.core.combine.combined import add_combined, checked_weights, combined_config, tuner_layers
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.weight import wide
from peft.core.model.manager import check_adapter_name
from peft.errors import CONVERSION
from peft.kernels.decompositions import resized


if TYPE_CHECKING:
    from peft.core.model.tuner import BaseTuner


def add_sum(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Add an adapter, inactive and frozen, that does the weighted sum of what the given adapters do.

    In a layer that some of them do not adapt, these count as an adapter that changes nothing.

    Raises:
        ValueError: for unknown adapters, another number of weights, a name that is taken, a method whose tensors do
            not add up, or adapters that differ in what has to be equal. The model is then unchanged.
    """
    numbers = checked_weights(tuner, adapters, weights)
    check_adapter_name(adapter_name, [*tuner.peft_config])
    adds, way = tuner.layer_cls.adapter_cls.adds, _another_way(tuner, adapters)
    if not adds.possible:
        raise ValueError(f"adapters of {type(tuner).__name__} cannot be combined: {adds.why_not}{way}")
    layers = [layer for _, layer in tuner_layers(tuner) if any(name in layer for name in adapters)]
    side_by_side = bool(adds.stacked) and any(_difference(_here(layer, adapters)) for layer in layers)
    changes: dict[str, Any] = {}
    if side_by_side:
        changes = {"r": max(sum(_rank(tuner, adapter) for adapter in _here(layer, adapters)) for layer in layers)}
        changes["rank_pattern"] = {}
    config = combined_config(tuner, adapters, **changes)

    def fill(layer: BaseTunerLayer) -> None:
        given = [(layer.adapters[name], weight) for name, weight in zip(adapters, numbers) if name in layer]
        new = layer.adapters[adapter_name]
        if side_by_side:
            _stack(given, new)
        elif (differs := _difference([adapter for adapter, _ in given])) is not None:
            raise ValueError(
                f"these adapters differ in {differs} of {layer.key or 'a layer'}, so the sum of their tensors is not "
                f"the sum of what they do.{way}"
            )
        else:
            _sum(given, sum(numbers), new)

    add_combined(tuner, adapters, numbers, adapter_name, config, fill)


def _another_way(tuner: BaseTuner, adapters: Sequence[str]) -> str:
    """What to do instead, where there is something."""
    if not all(tuner.supports_lora_conversion(name) for name in adapters):
        return ""
    return f" {CONVERSION} does their weighted sum."


def _here(layer: BaseTunerLayer, adapters: Sequence[str]) -> list[Adapter]:
    return [layer.adapters[name] for name in adapters if name in layer.adapters]


def _is_linear(adapter: Adapter, name: str) -> bool:
    """Whether the adapter is linear in a tensor, by its name or that of the module that holds it."""
    if adapter.adds.replaces:
        return True
    declared = [(adapter.parts.get(key.partition(".")[0]), key) for key in adapter.adds.linear]
    keys = [
        key if part is None else key.replace(part.name, part.attribute(adapter.layer), 1) for part, key in declared
    ]
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def _difference(adapters: Sequence[Adapter]) -> str | None:
    """In what that has to be equal some adapters of a layer differ: a name, or None."""
    if not adapters:
        return None
    one, adds = adapters[0], adapters[0].adds
    first, *rest = [dict(adapter.tensors()) for adapter in adapters]
    for other in rest if not adds.aligns else ():  # what is aligned first may be of other shapes
        for key in {**first, **other}:
            if key not in first or key not in other or first[key].shape != other[key].shape:
                return f"the shape of {key}"
            if not _is_linear(one, key) and not torch.equal(first[key], other[key]):
                return key
    for name, declared in one.settings.items():
        # A scaling is no part of the comparison: it goes into the adapter's weight.
        if declared.container is dict and name not in ("scaling", *adds.aligns):
            if any(declared.__get__(adapter) != declared.__get__(one) for adapter in adapters[1:]):
                return name
    return None


def _rank(tuner: BaseTuner, adapter: Any) -> int:
    # The rank in this layer, which a pattern may have changed.
    held = adapter.r if "r" in adapter.settings else None
    return int(tuner.peft_config[adapter.name].r if held is None else held)


def _factor(adapter: Any, new: Any) -> float:
    """How much stronger the scale makes one adapter than another."""
    return float(adapter.scaling) / float(new.scaling) if "scaling" in adapter.settings else 1.0


def _sum(given: list[tuple[Adapter, float]], total: float, new: Adapter) -> None:
    """Each tensor is the weighted sum, or the base's and the weighted sum of the differences to it."""
    parts = [(adapter.aligned(new), weight * _factor(adapter, new)) for adapter, weight in given]
    # What those that are not in this layer would bring: an adapter that changes nothing is not zero everywhere.
    missing = new.adds.neutral * (total - sum(weight for _, weight in given))
    origin = new.origin()
    for key, tensor in new.tensors():
        if _is_linear(new, key) and tensor.is_floating_point():
            start = wide(origin[key].to(tensor.device)) if key in origin else torch.zeros_like(wide(tensor))
            tensor.copy_(start + missing + sum(weight * (wide(part[key]) - start) for part, weight in parts))
        # Equal in all of them, so the first one's will do; what layers share is then written once.
        elif parts and not torch.equal(tensor, parts[0][0][key]):
            tensor.copy_(parts[0][0][key])


def _stack(given: list[tuple[Adapter, float]], new: Adapter) -> None:
    """The tensors side by side, the weights on those in which the adapter is linear; zeros fill up what is left."""
    parts = [(dict(adapter.tensors()), weight * _factor(adapter, new)) for adapter, weight in given]
    axes = {new.parts[name].attribute(new.layer): axis for name, axis in new.adds.stacked}
    for key, tensor in new.tensors():
        axis = axes[key]
        scaled = [wide(part[key]) * weight if _is_linear(new, key) else part[key] for part, weight in parts]
        tensor.copy_(resized(torch.cat(scaled, axis), tensor.shape[axis], axis))
