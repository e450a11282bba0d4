"""An adapter takes the name of another one, which comes back if that fails."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft.core.layer.rewritten import follow, keep_merged
from peft.core.model.operations import adapters_of, remove, unmerge
from peft.core.model.record import record_of
from peft.core.model.replicate import restore_layers
from peft.core.model.walk import layers_of


@contextmanager
def replacing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """A context in which another adapter takes a name; the one that has it goes, and comes back if that fails."""
    if adapter_name not in adapters_of(model):
        yield
        return
    warnings.warn(
        f"the model has an adapter called {adapter_name!r} in it already, which the new one replaces. To keep both, "
        "give the new one another name; to start from the plain model, call unload() on its PeftModel first.",
        stacklevel=5,
    )
    if any(adapter_name in layer.merged_adapters for _, layer in layers_of(model)):
        unmerge(model)
    for _, layer in layers_of(model):
        keep_merged(layer)  # what the start of the one that goes has made of weights is out of them, and kept
    starts = [(layer, layer.rewritten.copy()) for _, layer in layers_of(model) if layer.rewritten is not None]
    record = record_of(model)
    biases, replication, applied = record.biases, record.replication, None
    if biases:
        applied = biases.applied
        biases.apply(None)
    # with what layers share, which they hold by name but not as a part of them
    held = (value for module in model.modules() for value in (module, *vars(module).values()))
    before = [(m, _state(m)) for m in dict.fromkeys(value for value in held if isinstance(value, nn.Module))]
    kept = {**vars(record), "biases": copy.copy(biases)}
    remove(model, adapter_name)
    if not adapters_of(model):
        restore_layers(model)
    try:
        yield
        for _, layer in layers_of(model):
            follow(layer)
    except BaseException:
        for module, state in before:
            _put_back(module, state)
        vars(record).update(kept)
        for layer, start in starts:
            layer.rewritten = start
            follow(layer)
        if replication:
            replication.fill(list(replication.layers), replication.order)
        if record.biases:
            record.biases.apply(applied)
        raise


def _state(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module holds: each value, and what is in it where it is a container."""
    return {k: (v, v.copy() if isinstance(v, dict | list | set) else None) for k, v in vars(module).items()}


def _put_back(module: nn.Module, state: dict[str, tuple[Any, Any]]) -> None:
    vars(module).clear()
    for key, (value, content) in state.items():
        if content is not None:  # filled, not replaced: the handles of hooks know the dict that they are in
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        vars(module)[key] = value
