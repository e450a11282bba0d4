"""Weighted sums of adapters, dW = sum_i w_i dW_i, made of their tensors where what an adapter does is linear in them.

A method says in which of its tensors it is linear, the others being equal (``linear``), and along which axes several
adapters can stand side by side so that what they do adds up (``stacked``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft.core.combine.combined import add_combined, checked_weights, combined_config, resized, tuner_layers
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.tuner import BaseTuner, check_adapter_name
from peft.utils.error import CONVERSION


def add_sum(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Add an adapter, inactive and frozen, that does the weighted sum of what the given adapters do.

    In a layer that some of them do not adapt, these count as an adapter that changes nothing.

    Raises:
        ValueError: for unknown adapters, another number of weights, a name that is taken, a method whose tensors do
            not add up, or adapters that differ in what has to be equal. The model is then unchanged.
    """
    numbers = checked_weights(tuner, adapters, weights)
    check_adapter_name(adapter_name, [*tuner.peft_config])
    cls, way = tuner.layer_cls, _another_way(tuner, adapters)
    if not cls.linear and not cls.from_base:
        raise ValueError(f"adapters of {type(tuner).__name__} cannot be combined: {cls.why_no_sum}{way}")
    layers = [layer for _, layer in tuner_layers(tuner) if any(name in layer for name in adapters)]
    side_by_side = bool(cls.stacked) and any(_difference(layer, _here(layer, adapters)) for layer in layers)
    changes: dict[str, Any] = {}
    if side_by_side:
        changes = {"r": max(sum(_rank(tuner, layer, n) for n in _here(layer, adapters)) for layer in layers)}
        changes["rank_pattern"] = {}
    config = combined_config(tuner, adapters, **changes)

    def fill(layer: BaseTunerLayer) -> None:
        given = [(name, weight) for name, weight in zip(adapters, numbers) if name in layer]
        if side_by_side:
            _stack(layer, given, adapter_name)
        elif (differs := _difference(layer, [name for name, _ in given])) is not None:
            raise ValueError(
                f"these adapters differ in {differs} of {layer.key or 'a layer'}, so the sum of their tensors is not "
                f"the sum of what they do.{way}"
            )
        else:
            _sum(layer, given, sum(numbers), adapter_name)

    add_combined(tuner, adapters, adapter_name, config, fill)


def _another_way(tuner: BaseTuner, adapters: Sequence[str]) -> str:
    """What to do instead, where there is something."""
    if not all(tuner.supports_lora_conversion(name) for name in adapters):
        return ""
    return f" {CONVERSION} does their weighted sum."


def _here(layer: BaseTunerLayer, adapters: Sequence[str]) -> list[str]:
    return [name for name in adapters if name in layer]


def _is_linear(layer: BaseTunerLayer, name: str) -> bool:
    """Whether the adapter is linear in a tensor, by its name or that of the module that holds it."""
    return layer.from_base or any(name == key or name.startswith(f"{key}.") for key in layer.linear)


def _difference(layer: BaseTunerLayer, names: Sequence[str]) -> str | None:
    """In what that has to be equal some adapters of a layer differ: a name, or None."""
    if not names:
        return None
    first, *rest = [dict(layer.tensors(name)) for name in names]
    for other in rest if not layer.aligns else ():
        for key in {**first, **other}:
            if key not in first or key not in other or first[key].shape != other[key].shape:
                return f"the shape of {key}"
            if not _is_linear(layer, key) and not torch.equal(first[key], other[key]):
                return key
    for setting, container in layer.settings.items():
        held = getattr(layer, setting)
        if not issubclass(container, nn.Module) and setting not in ("scaling", *layer.aligns):
            if any(held.get(name) != held.get(names[0]) for name in names[1:]):
                return setting
    return None


def _rank(tuner: BaseTuner, layer: BaseTunerLayer, name: str) -> int:
    held = getattr(layer, "r", {}) if "r" in layer.settings else {}
    return int(held.get(name, tuner.peft_config[name].r))


def _factor(layer: BaseTunerLayer, name: str, new: str) -> float:
    """How much stronger the scale makes one adapter than another."""
    scaling = getattr(layer, "scaling", {}) if "scaling" in layer.settings else {}
    return float(scaling[name]) / float(scaling[new]) if name in scaling else 1.0


def _sum(layer: BaseTunerLayer, given: list[tuple[str, float]], total: float, new: str) -> None:
    """Each tensor is the weighted sum, or the base's and the weighted sum of the differences to it."""
    parts = [(layer.aligned(name, new), weight * _factor(layer, name, new)) for name, weight in given]
    missing = layer.neutral * (total - sum(weight for _, weight in given))
    origin = layer.origin(new)
    for key, tensor in layer.tensors(new):
        if _is_linear(layer, key) and tensor.is_floating_point():
            start = _wide(origin[key].to(tensor.device)) if key in origin else torch.zeros_like(_wide(tensor))
            tensor.copy_(start + missing + sum(weight * (_wide(part[key]) - start) for part, weight in parts))
        elif parts and not torch.equal(tensor, parts[0][0][key]):
            tensor.copy_(parts[0][0][key])


def _stack(layer: BaseTunerLayer, given: list[tuple[str, float]], new: str) -> None:
    """The tensors side by side, the weights on those in which the adapter is linear; zeros fill up what is left."""
    parts = [(dict(layer.tensors(name)), weight * _factor(layer, name, new)) for name, weight in given]
    for key, tensor in layer.tensors(new):
        axis = layer.stacked[key]
        scaled = [_wide(part[key]) * weight if _is_linear(layer, key) else part[key] for part, weight in parts]
        tensor.copy_(resized(torch.cat(scaled, axis), tensor.shape[axis], axis))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Sixteen-bit tensors are summed in float32 and rounded once."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
