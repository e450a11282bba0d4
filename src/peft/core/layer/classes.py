"""The classes of adapted layers: one for each method, and under it one for each kind of base layer."""

from __future__ import annotations

import os
from typing import Any, TypeGuard, TypeVar

from torch import nn

from peft.core.adapter import Adapter
from peft.core.base.kinds import Kind
from peft.core.base.storage import storage_of
from peft.core.layer.layer import BaseTunerLayer


Own = TypeVar("Own", bound=BaseTunerLayer)

# Names of adapted layers: one class for each, over the method's one layer, for isinstance tests and printed models.
LAYER_NAMES = (
    "Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "ParamWrapper", "Linear4bit",
    "Linear8bitLt",
)  # fmt: skip


def layer_class(
    adapter_cls: type[Adapter], layer: type[BaseTunerLayer] | None = None, name: str = "Layer"
) -> type[BaseTunerLayer]:
    """The class of layers that hold such adapters, and its subclasses for each kind of base layer."""
    above = layer or adapter_cls.layer_base or BaseTunerLayer
    members = {"__module__": adapter_cls.__module__, "__doc__": adapter_cls.__doc__}
    check_names(adapter_cls, above)
    if layer is not None:
        layer.adapter_cls = adapter_cls
        layer.__init_subclass__()
        made: Any = layer
    else:
        bases = (above, nn.Module) if adapter_cls.any_module else (above,)
        made = type(name, bases, {**members, "adapter_cls": adapter_cls})
    own = () if issubclass(made, nn.Module) else (nn.Module,)
    names = () if adapter_cls.any_module else LAYER_NAMES
    made.by_name = {kind: type(kind, (made, *own), dict(members)) for kind in names}
    for kind, cls in made.by_name.items():  # where pickles find them: `LoraLayer.Linear`
        cls.__qualname__ = f"{made.__qualname__}.{kind}"
        setattr(made, kind, cls)
    return made


def check_names(adapter_cls: type[Adapter], layer: type) -> None:
    """Refuse parts and settings that shadow what every layer has: they would break it in ways that are hard to find.

    Raises:
        TypeError: it names the class, the part or setting, and another name for it.
    """
    declared = {name for cls in BaseTunerLayer.__mro__ for name in vars(cls).get("__annotations__", ())}
    for name in (*adapter_cls.parts, *adapter_cls.settings, *adapter_cls.common):
        taken = hasattr(layer, name) or hasattr(nn.Module(), name) or name in declared
        if taken and name not in vars(layer).get("allowed_names", ()):
            kind = "setting" if name in adapter_cls.settings else "part"
            raise TypeError(
                f"{adapter_cls.__name__} declares the {kind} {name!r}, but every adapted layer has an attribute of "
                f"that name. Call it something else, such as `{adapter_cls.__name__.lower()}_{name} = {kind}(...)`."
            )


def prefix_of(adapter_cls: type[Adapter]) -> str:
    """What the names of all parts have in common, up to an underscore: ``"hira_"``."""
    names = [name for part in adapter_cls.parts.values() for name in part.names] + list(adapter_cls.common)
    return os.path.commonprefix(names).rpartition("_")[0] + "_"


def class_for(layer_cls: type[BaseTunerLayer], kind: Kind, module: nn.Module) -> type[BaseTunerLayer]:
    """The class of the layer around a module of this kind."""
    if not layer_cls.by_name:
        return layer_cls
    special = storage_of(module, kind.weight).layer_name
    return layer_cls.by_name[special if special in layer_cls.by_name else kind.name]


def is_own(module: Any, layer_cls: type[Own]) -> TypeGuard[Own]:
    """Whether a module is such a layer and holds adapters of its method: a class below it may hold another's."""
    return isinstance(module, layer_cls) and issubclass(module.adapter_cls, layer_cls.adapter_cls)
