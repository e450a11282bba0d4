"""Compositions of a model: added under a name, as adapters of the layers that hold their members, and taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from peft.composition.config import CompositionConfig
from peft.composition.expressions import Fuse, Split
from peft.composition.layers import check_members
from peft.core.blocks.blocks import CROSS, find_blocks
from peft.core.blocks.extent import extent_of
from peft.core.composition import Composition
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model import operations
from peft.core.model.auxiliary import TrainableTokensWrapper
from peft.core.model.beside import add_auxiliary
from peft.core.model.context import BASE
from peft.core.model.record import context_of
from peft.core.model.walk import wrappers_of
from peft.errors import nearest


def with_names(expression: Composition, name_of: Callable[[Fuse], str], known: dict[str, Composition]) -> Composition:
    """An expression in which each fusion is named, as its tensors are, and compositions that split rows are not."""
    members: list[str | Composition] = []
    for member in expression.members:
        if isinstance(member, str):
            named = known.get(member)
            members.append(named if named is not None and named.splits_rows else member)
            continue
        member = with_names(member, name_of, known)
        members.append(name_of(member) if isinstance(member, Fuse) else member)
    return expression.with_members(members)


def add(
    model: nn.Module,
    name: str,
    config: CompositionConfig,
    known: list[str],
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> None:
    """Give the layers that hold a member the composition, inactive and frozen.

    Args:
        config: whose expression has names where it had fusions. known: the other adapters of the model.

    Raises:
        ValueError: if a member is unknown, or has no meaning there; the model is unchanged.
    """
    context, expression = context_of(model), config.expression
    _check_members(name, expression, known)
    context.compositions[name] = expression
    try:
        layers = [layer for layer in _layers(model) if layer.present([expression])]
        for layer in layers:
            check_members(layer, name)
        if any(isinstance(part, Split) for part in parts_of(expression, context.compositions)):
            count_tokens(model, layers)
        with torch.device("meta") if low_cpu_mem_usage else nullcontext():
            for layer in layers:
                layer.add_adapter(name, config, layer.key)
            add_auxiliary(model, name, config)
    except BaseException:
        operations.remove(model, name)
        del context.compositions[name]
        raise
    operations.settle(model, name, autocast_adapter_dtype)


def parts_of(expression: Composition, known: dict[str, Composition]) -> Iterator[Composition]:
    """The expressions that an expression is made of, itself included."""
    yield expression
    for member in expression.members:
        part = known.get(member) if isinstance(member, str) else member
        if part is not None:
            yield from parts_of(part, known)


def count_tokens(model: nn.Module, layers: list[Any]) -> None:
    """Let layers know where the texts of a call begin.

    Raises:
        ValueError: for a layer outside of transformer blocks, or one that reads the tokens of an encoder.
    """
    blocks = find_blocks(model)
    for layer in layers:
        block = next((b for b in blocks if f"{layer.key}.".startswith(f"{b.key}.")), None)
        crosses = block is not None and any(
            part.role == CROSS and layer.key.startswith(f"{block.key}.{part.core}.") for part in block.sublayers
        )
        if block is None or crosses:
            what = "reads the tokens of the encoder too" if crosses else "is in no transformer block"
            raise ValueError(
                f"Split counts the tokens of a text, and {layer.key!r} {what}. Use adapters that leave that module "
                "out (exclude_modules)."
            )
        layer.__dict__["extent"] = extent_of(model, block.key.rpartition(".")[0])


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers of a model in which adapters of methods are, those of trained tokens included."""
    for _, wrapper in wrappers_of(model):
        layer = wrapper.token_adapter if isinstance(wrapper, TrainableTokensWrapper) else wrapper
        if isinstance(layer, BaseTunerLayer):
            yield layer


def _check_members(name: str, expression: Composition, known: list[str]) -> None:
    for member in expression.names():
        if member != BASE and member not in known:
            raise ValueError(
                f"composition {name!r} is made of {member!r}, which is no adapter of the model."
                f"{nearest(member, known)} Adapters: {', '.join(map(repr, known)) or 'none'}. Add or load it first."
            )


def check_unused(model: nn.Module, name: str) -> None:
    """Raise ValueError if a composition is made of an adapter."""
    users = [other for other, expression in context_of(model).compositions.items() if name in expression.names()]
    if users:
        raise ValueError(
            f"adapter {name!r} is a part of the composition {users[0]!r}, so it cannot be deleted: call "
            f"delete_adapter({users[0]!r}) first."
        )
