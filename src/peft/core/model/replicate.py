"""A deeper model from the layers of a shallower one: copies share the base weights and have adapters of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from peft.core.model.record import drop_if_empty, known_record, record_of
from peft.errors import OutOfRangeError


class Replication:
    """What a model was before its layers were replicated."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, layer_map: list[list[int]]) -> None:
        self.layers, self.layer_map, self.originals = layers, layer_map, list(layers)
        self.config: Any = model.config
        self.types = getattr(model.config, "layer_types", None)

    @property
    def order(self) -> list[int]:
        """Which of the originals stands, or is copied, at each place."""
        return [i for start, end in self.layer_map for i in range(start, end)]

    def fill(self, stack: list[nn.Module], order: Sequence[int]) -> None:
        """Make these the layers of the model; ``order`` says which of the originals they are made of."""
        self.layers._modules.clear()
        self.layers.extend(stack)
        for i, layer in enumerate(stack):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = i
        self.config.num_hidden_layers = len(stack)
        if self.types:
            self.config.layer_types = [self.types[i] for i in order]


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A deep copy of a module; with ``share_weights`` its parameters and buffers are the very same objects."""
    shared = [*module.parameters(), *module.buffers()] if share_weights else []
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def replicate_layers(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> bool:
    """Rebuild the model's list of transformer layers from ranges of the present ones.

    Args:
        layer_map: ranges ``[start, end)`` into the present layers, put one after another; a layer that occurs a
            second time becomes a copy that shares its weights.

    Returns:
        Whether the model was changed; one that has been rebuilt like this already is left as it is.

    Raises:
        ValueError: if the model has no list of layers, was rebuilt otherwise, or a range reaches beyond it; the
            model is unchanged.
    """
    ranges = [list(pair) for pair in layer_map]
    before = getattr(known_record(model), "replication", None)
    if before is not None:
        if before.layer_map == ranges:
            return False
        raise ValueError(f"layer_replication={ranges} does not fit a model rebuilt by {before.layer_map} already.")
    depth: Any = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(
            f"layer_replication needs a model with one list of transformer layers, as long as config."
            f"num_hidden_layers; {type(model).__name__} has none."
        )
    wrong = [pair for pair in ranges if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= depth]
    if wrong or not ranges:
        raise OutOfRangeError(f"layer_replication has the ranges {wrong}; the model has the layers 0 to {depth - 1}.")
    record = record_of(model).replication = Replication(model, lists[0], ranges)
    order = record.order
    first = {i: place for place, i in reversed(list(enumerate(order)))}  # where it stays itself; later ones are copies
    stack = [
        record.originals[i] if first[i] == place else clone_module(record.originals[i], share_weights=True)
        for place, i in enumerate(order)
    ]
    record.fill(stack, order)
    return True


def _taken(model: nn.Module) -> Replication | None:
    """What there is to undo, which is forgotten with it."""
    record = known_record(model)
    if record is None:
        return None
    replication, record.replication = record.replication, None
    drop_if_empty(model)
    return replication


def restore_layers(model: nn.Module) -> None:
    """Undo :func:`replicate_layers`."""
    record = _taken(model)
    if record is not None:
        record.fill(record.originals, range(len(record.originals)))


def separate_layers(model: nn.Module) -> None:
    """Give each copy weights of its own: the model is then like any other of its depth, and can be saved."""
    record = _taken(model)
    seen: set[int] = set()
    for layer in record.layers if record is not None else ():
        for module in layer.modules():
            for name, p in module._parameters.items():
                if p is not None and id(p) in seen:
                    module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) in seen:
                    module._buffers[name] = buffer.clone()
        seen |= {id(t) for t in [*layer.parameters(), *layer.buffers()]}
