"""Where the parts of an adapter go: to the device of the base weight, and into its dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from peft.core.base.storage.sharded import Team


if TYPE_CHECKING:
    from peft.core.adapter import Adapter
    from peft.core.layer.layer import BaseTunerLayer

Place = tuple[torch.device | None, torch.dtype | None]


def settle(layer: BaseTunerLayer, adapter: Adapter, device: torch.device | None = None) -> None:
    """Put an adapter's parts on the device, and what trains of them into the dtype, of the base weight.

    Args:
        device: put them there instead, in the dtypes that they have.
    """
    storage, base, weight = layer.storage, layer.get_base_layer(), layer.kind.weight
    place = storage.device_and_dtype(base, weight) if device is None else (device, None)
    for attribute, _, item in adapter.held():
        has_rules = _has_rules(item)
        tensors = _all_tensors(item)
        for t in tensors:
            if not t.is_contiguous():  # made by a decomposition; FSDP 1 takes the gradients of such apart
                t.data = t.data.contiguous()
        if not has_rules and _are_at(tensors, *place):  # nearly always: the rest need not be asked
            continue
        device, dtype = _place_of(tensors, place)
        frozen = not isinstance(item, nn.Module | nn.Parameter)  # kept as exact as it was made
        if not has_rules and _are_at(tensors, device, None if frozen else dtype):
            continue
        moved = item.to(device=device, dtype=None if frozen else dtype)
        if isinstance(item, nn.Parameter) and moved is not item:
            moved = nn.Parameter(moved.detach(), requires_grad=item.requires_grad)
        if moved is not item:
            layer._modules[attribute][adapter.name] = moved  # type: ignore[index]
    # Where processes compute a layer together, they start from the same adapter, whatever each has drawn.
    mesh = None if layer.kind.whole else storage.mesh(base, weight)
    for tensor in adapter.parameters() if mesh is not None else ():
        if not tensor.is_meta:
            Team(mesh).agree(tensor)


def place_for(layer: BaseTunerLayer, item: torch.Tensor | nn.Module) -> Place:
    """Device and dtype for a new part: those of the base weight, where that is a dense tensor."""
    base, weight = layer.get_base_layer(), layer.kind.weight
    return _place_of(_all_tensors(item), layer.storage.device_and_dtype(base, weight))


def _place_of(tensors: list[torch.Tensor], place: Place) -> Place:
    """Where a part made of these tensors goes, if what floats goes to this place."""
    device, dtype = place
    device = None if any(t.is_meta for t in tensors) else device  # but in the dtype that it is to have
    return device, dtype if dtype is not None and all(t.is_floating_point() for t in tensors) else None


def _are_at(tensors: list[torch.Tensor], device: torch.device | None, dtype: torch.dtype | None) -> bool:
    """Whether tensors are on this device and in this dtype already (None: any)."""
    for t in tensors:
        if (device is not None and t.device != device) or (dtype is not None and t.dtype != dtype):
            return False
    return True


def _has_rules(item: torch.Tensor | nn.Module) -> bool:
    """Whether a part is more than a module with a weight: then its own ``to`` says how it moves."""
    return isinstance(item, nn.Module) and bool(item._modules or item._buffers)


def _all_tensors(item: torch.Tensor | nn.Module) -> list[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        return [item]
    if _has_rules(item):
        return [*item.parameters(), *item.buffers()]
    return [p for p in item._parameters.values() if p is not None]
