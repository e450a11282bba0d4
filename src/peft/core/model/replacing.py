"""What fails leaves a model as it was, also where an adapter takes the name of another one."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft.core.layer.rewritten import follow, give_back_unmerged, keep_merged
from peft.core.model.operations import adapters_of, remove, unmerge
from peft.core.model.record import known_record
from peft.core.model.replicate import restore_layers
from peft.core.model.walk import layers_of, wrappers_of


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """A context whose errors leave a model, and all adapters in it, as they were."""
    put_back = _snapshot(model)
    try:
        yield
    except BaseException:
        unmerge(model)
        for _, layer in layers_of(model):
            give_back_unmerged(layer)
        put_back()
        raise


@contextmanager
def replacing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """A context in which another adapter takes a name; the one that has it goes, and comes back if that fails."""
    if not any(adapter_name in wrapper for _, wrapper in wrappers_of(model)):
        yield
        return
    warnings.warn(
        f"the model has an adapter called {adapter_name!r} in it already, which the new one replaces. To keep both, "
        "give the new one another name; to start from the plain model, call unload() on its PeftModel first.",
        stacklevel=5,
    )
    if any(adapter_name in layer.merged_adapters for _, layer in layers_of(model)):
        unmerge(model)
    with restoring(model):
        remove(model, adapter_name)
        if not adapters_of(model):
            restore_layers(model)
        yield
        for _, layer in layers_of(model):
            follow(layer)


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """What brings back the present state of a model in which nothing is merged."""
    layers = [layer for _, layer in layers_of(model)]
    merged = [(layer, list(layer.merged_adapters)) for layer in layers if layer.merged]
    trains = [(p, p.requires_grad) for p in model.parameters()]
    record = known_record(model)
    applied = record.biases.applied if record is not None and record.biases else None
    # Weights are noted as they are without any adapter: those change in place.
    unmerge(model)
    for layer in layers:
        keep_merged(layer)
    if applied is not None:
        record.biases.apply(None)  # type: ignore[union-attr]
    before = {module: _state(module) for module in model.modules()}
    # with what layers share, which they hold by name but not as a part of them
    shared = {v for layer in layers for v in vars(layer).values() if isinstance(v, nn.Module)}
    before.update({module: _state(module) for module in shared - before.keys()})
    starts = [(layer, layer.rewritten.copy()) for layer in layers if layer.rewritten is not None]
    kept = {} if record is None else {**vars(record), "biases": copy.copy(record.biases)}

    def act() -> None:
        for layer in layers:
            follow(layer)
        if applied is not None:
            record.biases.apply(applied)  # type: ignore[union-attr]
        for layer, names in merged:
            layer.merge(adapter_names=names)
        for p, trained in trains:
            p.requires_grad_(trained)

    def put_back() -> None:
        for module, state in before.items():
            _put_back(module, *state)
        for layer, start in starts:
            layer.rewritten = start
        if record is not None:
            vars(record).update(kept)
            if record.replication is not None:
                record.replication.fill(list(record.replication.layers), record.replication.order)
        act()

    act()
    return put_back


def _state(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """What a module holds, and its containers with what is in them."""
    held = vars(module).copy()
    # most are empty, in thousands of modules
    return held, [(value, value.copy() if value else ()) for value in held.values() if _changes(value.__class__)]


@functools.cache
def _changes(cls: type) -> bool:
    """Whether such containers may change; diffusers keeps configs in dicts that refuse to."""
    setters = (dict.__setitem__, OrderedDict.__setitem__)
    return issubclass(cls, list | set) or (issubclass(cls, dict) and cls.__setitem__ in setters)


def _put_back(module: nn.Module, held: dict[str, Any], containers: list[tuple[Any, Any]]) -> None:
    for value, content in containers:  # filled, not replaced: the handles of hooks know the dict that they are in
        value.clear()
        value.extend(content) if isinstance(value, list) else value.update(content)
    vars(module).clear()
    vars(module).update(held)
