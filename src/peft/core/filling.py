"""Making many layers at once: what a file will overwrite is not drawn first, and no garbage is looked for."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn


class Filling:
    """``skipped``: some layer has left its parts without values."""

    skipped = False


_FILLING: ContextVar[Filling | None] = ContextVar("filling", default=None)


@contextmanager
def filled_later() -> Iterator[Filling]:
    """Within this context, adapters are allocated that get all their values from a file right after."""
    filling = Filling()
    token = _FILLING.set(filling)
    try:
        yield filling
    finally:
        _FILLING.reset(token)


def skip_values() -> bool:
    """Whether a layer may leave the parts that it is allocating without values. Asking means to do so."""
    filling = _FILLING.get()
    if filling is not None:
        filling.skipped = True
    return filling is not None


def is_filled_later() -> bool:
    """Whether the values of what is made now come from a file; asking leaves nothing out."""
    return _FILLING.get() is not None


@contextmanager
def no_collection() -> Iterator[None]:
    """A context without garbage collection, for what makes thousands of objects that all stay.

    Each few hundred would start a search through all objects of the process, which takes longer than to make them.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def blank(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """A module as ``cls(*args, **kwargs)`` makes it, but for its parameters: it has none.

    Copied from the first of its class, with dicts of its own, in a third of the time that constructors of torch take.
    The arguments should be the same each time.
    """
    if cls not in _FIRST:
        first = {k: type(v)() if k == "_parameters" else v for k, v in cls(*args, **kwargs).__dict__.items()}
        held = {k: v.copy if v else type(v) for k, v in first.items() if isinstance(v, dict | set)}
        _FIRST[cls] = [(k, v) for k, v in first.items() if k not in held], list(held.items())
    module: nn.Module = object.__new__(cls)
    _fill(module, cls)
    return module


def make_module(module: nn.Module) -> None:
    """What ``nn.Module.__init__`` does."""
    if nn.Module not in _FIRST:
        blank(nn.Module)
    _fill(module, nn.Module)


def _fill(module: nn.Module, cls: type[nn.Module]) -> None:
    values, own_ones = _FIRST[cls]
    own = module.__dict__
    for key, value in values:  # one by one: then all modules of a class share the table of their keys, half the memory
        own[key] = value
    for key, make in own_ones:
        own[key] = make()


_FIRST: dict[type[nn.Module], tuple[list[tuple[str, Any]], list[tuple[str, Callable[[], Any]]]]] = {}
"""What a module of each class holds, and what gives it its own dicts and sets."""


def unfilled(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """A module of torch with memory for its parameters, in which no initial values are drawn."""
    module = _UNFILLED[cls](*args, **kwargs)
    module.__class__ = cls  # pickles and isinstance should know no other
    return module


_UNFILLED = {
    cls: type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})
    for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
}


def unfilled_linear(inner: int, out: int, bias: bool = False) -> nn.Linear:
    """The same for a linear layer, ``[out, inner]``."""
    module = blank(nn.Linear, 1, 1, device="meta")
    own = module.__dict__
    own["in_features"], own["out_features"] = inner, out
    module._parameters["weight"] = nn.Parameter(torch.empty(out, inner))
    module._parameters["bias"] = nn.Parameter(torch.empty(out)) if bias else None
    return module


def draw_like_linear(weight: torch.Tensor) -> None:
    """Draw a weight ``[out, in, *kernel]`` as torch's layers do: uniform in +-1/sqrt(in * kernel), number by number.

    The same as ``kaiming_uniform_(weight, a=sqrt(5))``, which takes as long to look at the shape as to draw.
    """
    if count := weight.numel():
        bound = math.sqrt(3.0) * (_GAIN / math.sqrt(count // len(weight)))  # rounded as torch rounds it
        weight.detach().uniform_(-bound, bound)


_GAIN = math.sqrt(2 / 6)


def kaiming(*shape: int) -> nn.Parameter:
    """A parameter drawn like the weight of ``nn.Linear``."""
    drawn = torch.empty(shape)
    draw_like_linear(drawn)
    return nn.Parameter(drawn)


def zeros(*shape: int) -> nn.Parameter:
    """A parameter of zeros."""
    return nn.Parameter(torch.zeros(shape))
