"""How an adapter declares what it holds at a layer: trained tensors, settings, and tensors of the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from peft.core.filling import blank
from peft.core.layer.buffers import BufferDict


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer


class part:
    """Declares a tensor, or a module of tensors, that an adapter has at each layer: ``hira_A = part()``.

    Read from an adapter it is what that adapter holds, None where it has none; what is assigned is stored.

    Args:
        container: ``nn.ParameterDict`` for a trained tensor, ``nn.ModuleDict`` a module, ``BufferDict`` a frozen one.
        table: the name that it has at tables of embeddings, if another.
        remade: no file holds it: :meth:`Adapter.loaded` makes it from the config, the base and the other parts.
        bare: its module holds a single ``weight``, saved under the bare name.
        saved_by: the setting that says whether files hold it, if not all do.
    """

    def __init__(
        self,
        container: type = nn.ParameterDict,
        *,
        table: str | None = None,
        remade: bool = False,
        bare: bool = False,
        saved_by: str = "",
    ) -> None:
        self.container, self.table, self.remade, self.bare, self.saved_by = container, table, remade, bare, saved_by
        held = {nn.ModuleDict: "_modules", BufferDict: "_buffers"}
        self.slot = held.get(container, "_parameters")

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.names = (name,) if self.table is None else (name, self.table)  # attributes of a layer that may hold it

    def empty(self) -> Any:
        """A container for it; frozen tensors that a file holds belong to the state dict, too."""
        made = blank(self.container)
        if self.container is BufferDict:
            made.persistent = not self.remade
        return made

    def attribute(self, layer: BaseTunerLayer) -> str:
        """The attribute of this layer that holds it."""
        return self.table if self.table is not None and layer.kind.lookup else self.name

    def __get__(self, adapter: Any, owner: type | None = None) -> Any:
        return self if adapter is None else self.read(adapter.layer, adapter.name)

    def read(self, layer: BaseTunerLayer, name: str) -> Any:
        """What the adapter of this name holds at a layer."""
        attribute = self.name if self.table is None else self.attribute(layer)
        if attribute in layer.__dict__:  # tensors that others put in front for a while, by ``object.__setattr__``
            return layer.__dict__[attribute].get(name)
        own = layer._modules[attribute].__dict__
        value = own[self.slot].get(name)  # FSDP and functional calls put plain tensors in the place of parameters
        return own.get(name) if value is None else value

    def __set__(self, adapter: Any, value: Any) -> None:
        adapter.layer.put(adapter.name, **{self.attribute(adapter.layer): value})


class setting:
    """Declares what else is kept for each adapter of a layer, a number or a dropout: ``r = setting()``.

    Args:
        container: ``dict``, or ``nn.ModuleDict`` for modules without trained tensors.
    """

    def __init__(self, container: type = dict) -> None:
        self.container = container
        self.of_modules = issubclass(container, nn.Module)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def empty(self) -> Any:
        """A container for what it keeps."""
        return blank(self.container) if self.of_modules else self.container()

    def __get__(self, adapter: Any, owner: type | None = None) -> Any:
        if adapter is None:
            return self
        layer = adapter.layer
        if self.container is dict:
            return layer.__dict__[self.name].get(adapter.name)
        return layer._modules[self.name]._modules.get(adapter.name)

    def __set__(self, adapter: Any, value: Any) -> None:
        if self.container is dict and not isinstance(value, nn.Module):
            adapter.layer.__dict__[self.name][adapter.name] = value
        else:
            adapter.layer.put(adapter.name, **{self.name: value})


class input_dropout(setting):
    """Declares the dropout on an adapter's input, to which its probability is assigned: ``drop = input_dropout()``."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleDict)

    def __set_name__(self, owner: Any, name: str) -> None:
        super().__set_name__(owner, name)
        owner.dropout = name

    def __set__(self, adapter: Any, value: float) -> None:
        super().__set__(adapter, nn.Dropout(value) if value else blank(nn.Identity))


class Drops:
    """An adapter that may drop entries of its input: what follows from its :class:`input_dropout`, if it has one.

    Attributes:
        dropout: the name of that.
    """

    __slots__ = ()
    layer: BaseTunerLayer
    dropout: ClassVar[str] = ""

    def drops(self) -> bool:
        """Whether entries are dropped in the next forward."""
        dropout = getattr(self, self.dropout) if self.dropout else None
        return isinstance(dropout, nn.Dropout) and dropout.training

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x with entries dropped; indices stay."""
        if self.layer.kind.lookup or not self.dropout:
            return x
        dropout = getattr(self, self.dropout)
        return x if type(dropout) is nn.Identity else dropout(x)


class shared:
    """Declares tensors that all layers of a model have in common, by adapter: ``vera_A = shared(frozen=True)``.

    They are made by :meth:`Adapter.share` and saved once; if ``frozen``, they do not train.
    """

    def __init__(self, frozen: bool = False) -> None:
        self.frozen = frozen

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, adapter: Any, owner: type | None = None) -> Any:
        if adapter is None:
            return self
        layer, name = adapter.layer, adapter.name
        container = layer.__dict__.get(self.name)
        container = layer._modules[self.name] if container is None else container
        value = container._parameters.get(name) if type(container) is nn.ParameterDict else None
        return container[name] if value is None else value  # some put other tensors in the place of parameters
