"""Layers of methods that third parties have written for 0.21: their containers, and their forward, are their own.

Such a layer derives from ``BaseTunerLayer`` without calling its constructor, names its containers in
``adapter_layer_names`` and ``other_param_names``, and fills them in ``update_layer``. What the rest of the package
asks of a layer is read from these containers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from torch import nn

from peft.core.adapter import Adapter, part
from peft.core.base.kinds import WHOLE
from peft.core.layer.buffers import BufferDict
from peft.core.model.context import Context, Known


class Made:
    """An attribute that an object gets when it is first asked for, if its constructor has not made one."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.make(instance)
        return value


class Held(Adapter):
    """An adapter at such a layer: what its containers have under its name."""

    def held(self) -> list[tuple[str, part, Any]]:
        constant = containers(self.layer, self.layer.other_param_names)
        return super().held() + [
            (name, CONSTANT, holder[self.name]) for name, holder in constant if self.name in holder
        ]


CONSTANT = part(BufferDict)


def containers(layer: Any, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Those of these attributes of a layer that are containers of tensors."""
    for name in names:
        holder = layer._modules.get(name)
        if isinstance(holder, nn.ModuleDict | nn.ParameterDict | BufferDict):
            yield name, holder


class FromContainers(MutableMapping):
    """The adapters of such a layer by name, as they are when one asks."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __iter__(self) -> Iterator[str]:
        trained = containers(self.layer, self.layer.adapter_layer_names)
        return iter(dict.fromkeys(name for _, holder in trained for name in holder))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Adapter:
        if name not in iter(self):
            raise KeyError(name)
        return Held(self.layer, name)

    def __setitem__(self, name: str, adapter: Adapter) -> None:
        raise TypeError(f"{type(self.layer).__name__} makes its adapters itself, in its update_layer.")

    def __delitem__(self, name: str) -> None:
        layer = self.layer
        for _, holder in containers(layer, (*layer.adapter_layer_names, *layer.other_param_names)):
            if name in holder:
                del holder[name]


class Unconstructed:
    """What the constructor of ``BaseTunerLayer`` gives a layer, for those that have not called it."""

    kind: Any = WHOLE
    read_by_parent: Any = False
    cast_input_dtype_enabled: Any = True
    _storage: Any = None
    _disable_adapters: Any = False
    _active_adapter: Any = "default"
    adapters: Any = Made(FromContainers)
    merged_adapters: Any = Made(lambda layer: [])
    originals: Any = Made(lambda layer: {})
    tied_to: Any = Made(lambda layer: {})
    context: Any = Made(lambda layer: Context(Known()))
    _paused: Any = Made(lambda layer: [])
