"""Modules that compute with the weight of a layer in them instead of calling it, as fused kernels want it.

transformers' Mamba blocks hand ``self.out_proj.weight`` and ``self.conv1d.weight`` to kernels, torch's
``TransformerEncoderLayer`` does so for all its layers. Such a layer has to show the adapted weight to its reader. The
code of the reader's class tells which layers these are, so that it holds for models that nobody has listed.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

from peft.core.base.kinds import Kind


_LOOKED_AT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_meta", "requires_grad", "element_size"}


def reads_weight_of(parent: nn.Module, name: str, kind: Kind | None = None) -> bool:
    """Whether the code of ``parent`` computes with ``parent.<name>.weight``, a layer of this kind.

    A table is no such layer: where a head computes with the weight of an embedding, the two are tied in the base
    model, and an adapter of the one is none of the other.
    """
    if kind is not None and kind.lookup:
        return False
    cls: Any = type(parent)
    return isinstance(parent, nn.TransformerEncoderLayer) or name in _weights_read(cls)  # the former reads in C++


@functools.cache
def _weights_read(cls: Any) -> frozenset[str]:
    """The names x of which the methods of a class read ``x.weight``, for more than its dtype or shape."""
    found: set[str] = set()
    for owner in cls.__mro__:
        # Those of torch are known: MultiheadAttention has a kind for what it reads, TransformerEncoderLayer is asked
        # above.
        if owner.__module__.partition(".")[0] != "torch":
            for name, function in vars(owner).items():
                code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
                if isinstance(code, CodeType) and name != "__init__":  # which fills or ties weights
                    found.update(_reads(code))
    return frozenset(found)


def _reads(code: CodeType) -> Iterator[str]:
    before: list[Any] = [None, None]  # the attributes just read, None for anything else
    for step in dis.get_instructions(code):
        attribute = step.argval if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
        if before[1] == "weight" and before[0] is not None and attribute not in _LOOKED_AT:
            yield before[0]
        before = [before[1], attribute]
    for constant in code.co_consts:  # inner functions, comprehensions
        if isinstance(constant, CodeType):
            yield from _reads(constant)


class NoWeight(torch.Tensor):
    """The weight of a layer whose adapters equal no weight: it can be looked at, and computing with it is an error.

    torch's own fused kernels leave it alone and call the layer.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Of a property it is the getter that arrives here; what it gets is the name of its owner.
        name = getattr(func, "__name__", "")
        looked_at = getattr(getattr(func, "__self__", None), "__name__", name) in _LOOKED_AT
        if looked_at or name in _LOOKED_AT:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise ValueError(
            "a module computes with the weight of an adapted layer instead of calling it, and no one weight equals "
            "what this adapter does. Leave the layer out of target_modules, or use a method that can be merged."
        )
