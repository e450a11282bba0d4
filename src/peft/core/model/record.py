"""What belongs to one adapted model and to no layer alone, kept with the model: one record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peft.core.base.storage import keep_differentiable
from peft.core.layer.buffers import BufferDict
from peft.core.model.context import Context, Known


class Record:
    """Attributes, each None (or empty) while there is none:

    context: what the current call says to all adapted layers, by hooks of the model.
    extents: list of blocks -> what its calls tell of where texts begin and end in it, by such hooks too.
    shared: the tensors that all layers of a method have in common.
    biases: the biases of the base model that adapters train in place.
    replication: what the model was before its layers were replicated.
    checkpointing: what watches gradient checkpointing, and its hooks.
    savings: what makes its training steps take less memory (:mod:`peft.tools.savings`).
    differentiable: its weights were asked to let gradients through; done before the first call that keeps a graph.
    """

    def __init__(self) -> None:
        self.context: Context | None = None
        self.hooks: tuple[Any, ...] = ()
        self.extents: dict[str, Any] = {}
        self.shared = SharedParts()
        self.biases: Any = None
        self.replication: Any = None
        self.checkpointing: Any = None
        self.savings: Any = None
        self.differentiable = False


class SharedParts:
    """Tensors that all layers of a method have in common: one dict for each name, keyed by adapter."""

    def __init__(self) -> None:
        self.containers: dict[str, Any] = {}

    def container(self, attribute: str, value: Any, persistent: bool) -> Any:
        """The dict called ``attribute``; a new one is of the kind that holds such a value.

        Args:
            value: a module, a Parameter (which trains) or a tensor (frozen). persistent: frozen ones are saved.
        """
        if attribute not in self.containers:
            if isinstance(value, nn.Module):
                self.containers[attribute] = nn.ModuleDict()
            elif isinstance(value, nn.Parameter):
                self.containers[attribute] = nn.ParameterDict()
            else:
                self.containers[attribute] = BufferDict(None, persistent)
        return self.containers[attribute]

    def put(self, attribute: str, name: str, value: Any, holders: Iterable[nn.Module]) -> None:
        """Store an adapter's value, or the equal one of another adapter where it is frozen; all holders know it."""
        container = self.containers[attribute]
        if isinstance(container, BufferDict):
            held = (t for t in container.values() if t.shape == value.shape and torch.equal(t.cpu(), value.cpu()))
            value = next(held, value)
        container[name] = value
        for holder in holders:  # frozen tensors are no part of each layer's state
            (holder.__dict__ if isinstance(container, BufferDict) else holder._modules)[attribute] = container

    def drop(self, name: str, attributes: Iterable[str]) -> None:
        """Forget an adapter's values."""
        for attribute in attributes:
            if name in self.containers.get(attribute, ()):
                del self.containers[attribute][name]


def record_of(model: nn.Module) -> Record:
    """The record of a model, made when it is first asked for."""
    record = model.__dict__.get("_peft_record")
    if record is None:
        record = model.__dict__["_peft_record"] = Record()
    return record


def known_record(model: nn.Module) -> Record | None:
    """The record of a model, None where it has none."""
    return model.__dict__.get("_peft_record")


def context_of(model: nn.Module) -> Context:
    """The object through which all adapted layers of a model learn about the current call."""
    record = record_of(model)
    if record.context is None:
        context = record.context = Context(Known())
        record.hooks = (
            model.register_forward_pre_hook(_let_gradients_through),
            model.register_forward_pre_hook(context.forget, with_kwargs=True),
            model.register_forward_hook(context.note, with_kwargs=True),
        )
    return record.context


def _let_gradients_through(model: nn.Module, args: tuple) -> None:
    """Hook of an adapted model: a library may have made weights ready for inference, which ends gradients in them."""
    record = record_of(model)
    if not record.differentiable and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        keep_differentiable(model)
        record.differentiable = True


def behind(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The adapters of a model that act where these do: themselves, and those that they are made of."""
    record = known_record(model)
    return list(names) if record is None or record.context is None else record.context.behind(names)


def drop_compositions(model: nn.Module) -> None:
    """Forget what adapters of a model are made of others: it has none any more."""
    record = known_record(model)
    if record is not None and record.context is not None:
        record.context.compositions.clear()


def drop_record(model: nn.Module) -> None:
    """Take the record and its hooks away from a model that has no adapters any more."""
    record = known_record(model)
    if record is None:
        return
    for hook in record.hooks:
        hook.remove()
    record.context, record.hooks, record.extents = None, (), {}
    drop_if_empty(model)


def drop_if_empty(model: nn.Module) -> None:
    """Take the record away once nothing is noted in it."""
    record = known_record(model)
    if record is None:
        return
    noted = (record.context, record.biases, record.replication, record.checkpointing, record.savings)
    if all(value is None for value in noted):
        del model.__dict__["_peft_record"]
