"""The containers of a layer: one for each part and setting of its adapters, keyed by adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.core.adapter import Adapter
from peft.core.layer.buffers import BufferDict


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer


def names_held(cls: type[Adapter]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the containers of such adapters: those of tensors that train, and all others."""
    held = [(name, part.container is BufferDict) for part in cls.parts.values() for name in part.names]
    held += [(name, shared.frozen) for name, shared in cls.common.items()]
    trained = tuple(name for name, frozen in held if not frozen)
    return trained, (*(name for name, frozen in held if frozen), *cls.settings)


def held_constant(adapter: Adapter) -> Iterator[torch.Tensor]:
    """The tensors of an adapter's ``untrained`` parts."""
    for attribute, _, value in adapter.held() if adapter.untrained else ():
        if attribute in adapter.untrained:
            yield from value.parameters() if isinstance(value, nn.Module) else (value,)


def make_room(layer: BaseTunerLayer, cls: type[Adapter]) -> None:
    """Give a layer the containers that it lacks for such adapters: a variant may declare more than its method does."""
    modules, own = layer._modules, layer.__dict__
    for part in cls.parts.values():
        for name in part.names:
            if name not in modules:
                modules[name] = part.empty()
    for name, setting in cls.settings.items():
        place: dict[str, Any] = modules if setting.of_modules else own
        if name not in place:
            place[name] = setting.empty()


def make_more_room(layer: BaseTunerLayer, cls: type[Adapter]) -> None:
    """The same for a variant; what it brings is named on the layer beside what the layer's class names."""
    if cls is layer.adapter_cls:
        return
    make_room(layer, cls)
    for attribute, names in zip(("adapter_layer_names", "other_param_names"), names_held(cls)):
        layer.__dict__[attribute] = tuple(dict.fromkeys((*getattr(layer, attribute), *names)))


def hold(layer: BaseTunerLayer, container: nn.ModuleDict, name: str, module: nn.Module) -> None:
    """Put a module into a container of a layer, under the name of an adapter, which has been checked."""
    container._modules[name] = module
    if type(module) in _INERT:
        module.__dict__["training"] = layer.__dict__["training"]


_CONTAINERS = (nn.ModuleDict, nn.ParameterDict, BufferDict)
_INERT = frozenset((nn.Linear, nn.Identity))
"""Classes of parts that compute the same in both modes."""


def set_mode(layer: BaseTunerLayer, training: bool) -> None:
    """Set the mode of a layer and of all that it holds, as ``train`` of a module does; a container has none to ask.

    Inert parts have the mode of their layer since they came, so while that stays they are passed over: with thirty
    adapters they are ten thousand modules, and just to look at each takes longer than all else that a load does.
    """
    same = layer.__dict__["training"] is training
    for child in layer._modules.values():
        if child is None:
            continue
        contained = isinstance(child, _CONTAINERS)
        held = child._modules.values() if contained else [child]
        child.__dict__["training"] = training
        if same and contained and _INERT.issuperset(map(type, held)):
            continue
        for module in held:
            if module._modules or type(module).train is not nn.Module.train:
                module.train(training)
            else:
                module.__dict__["training"] = training
    layer.__dict__["training"] = training
