"""Tensors of the base model that a file holds beside an adapter's: trained along with it, and its own from then on."""

from __future__ import annotations

import torch
from torch import nn

from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.auxiliary import TrainedBiases
from peft.core.model.record import record_of
from peft.core.model.walk import join, plain, walk


def weights_under(root: nn.Module, prefix: str, adapter: str) -> dict[str, BaseTunerLayer]:
    """The weights that an adapter adapts, by their names in files, with the layers that adapt them."""
    found = {}
    for site in walk(root):
        for _, layer in site.wrappers:
            if isinstance(layer, BaseTunerLayer) and adapter in layer and layer.kind.weight:
                weight = site.module._parameters.get(layer.kind.weight)
                if weight is not None and weight.is_floating_point() and not weight.is_meta:
                    found[prefix + plain(join(site.path, layer.kind.weight))] = layer
    return found


def base_places(root: nn.Module, prefix: str) -> dict[str, tuple[nn.Module, str]]:
    """Tensors of the base model that a file may hold, trained along: all that float, but no adapted weight."""
    found = {}
    for site in walk(root):
        adapted = any(isinstance(wrapper, BaseTunerLayer) for _, wrapper in site.wrappers)
        buffers = () if adapted else site.module._buffers.keys() - site.module._non_persistent_buffers_set
        for attribute in (*site.module._parameters, *buffers):
            p = getattr(site.module, attribute)
            if p is not None and p.is_floating_point() and not (adapted and attribute == "weight"):
                place = site.module, attribute
                found[prefix + join(site.key, attribute)] = found[prefix + plain(join(site.path, attribute))] = place
    return found


def train_along(
    root: nn.Module, adapter: str, given: list[tuple[tuple[nn.Module, str], torch.Tensor]], names: list[str]
) -> None:
    """Keep tensors of the base model that a file brings as the adapter's own: they act while it is active."""
    noted = record_of(root)
    record = noted.biases = noted.biases or TrainedBiases()
    record.add(adapter, [place for place, _ in given])
    held = record.tensors(adapter)
    for (module, attribute), value in given:
        held[id(module), attribute].copy_(value)
    record.apply(record.choose(names), requires_grad=False)
