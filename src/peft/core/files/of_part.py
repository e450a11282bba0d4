"""State dicts of a part of a model: verl gathers one block at a time, and asks for the adapter's tensors in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft.core.base.storage.sharded import whole
from peft.core.files.entries import Entry
from peft.core.files.io import separate
from peft.core.model.walk import plain


def of_part(model: nn.Module, own: list[Entry], state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The adapter's tensors in the state dict of a part of the model, by their names there as files have them.

    Args:
        own: the adapter's tensors in the whole model.

    Returns:
        None where it is not the state dict of one part, with all of the adapter that the part holds.
    """
    given = {plain(name): value for name, value in state_dict.items()}
    if (path := _path(own, given)) is None:
        return None
    within = f"{path}."
    here = [entry for entry in own if entry.memory.startswith(within)]
    names = {plain(name) for name in model.get_submodule(path).state_dict()} if _has(model, path) else given.keys()
    if not given.keys() <= names or any(entry.memory.removeprefix(within) not in given for entry in here):
        return None
    found: dict[str, Any] = {}
    for entry in here:
        parts = entry.named(whole(given[entry.memory.removeprefix(within)]))
        found.update({name.removeprefix(within): part for name, part in parts.items()})
    return separate(found)


def _path(own: list[Entry], given: dict[str, Any]) -> str | None:
    """Where in the model a tensor of the adapter has one of the given names."""
    for entry in own:
        steps = entry.memory.split(".")
        for first in range(1, len(steps)):
            if ".".join(steps[first:]) in given:
                return ".".join(steps[:first])
    return None


def _has(model: nn.Module, path: str) -> bool:
    """Whether a module stands there; wrappers such as FSDP's put others between."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
