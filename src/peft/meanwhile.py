"""What is otherwise within a context, and as before after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def having(objects: Iterable[Any], **values: Any) -> Iterator[None]:
    """A context in which objects have other values of attributes; afterwards each has its own again.

    Examples:
        >>> with having(model.parameters(), requires_grad=False):
        ...     loss = model(**batch).loss
    """
    before = [(each, {name: getattr(each, name) for name in values}) for each in objects]
    try:
        for each, _ in before:
            for name, value in values.items():
                setattr(each, name, value)
        yield
    finally:
        for each, own in before:
            for name, value in own.items():
                setattr(each, name, value)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """A context in which a module and all in it train, or are evaluated; afterwards each is as it was by itself."""
    modes = [(each, each.training) for each in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for each, mode in modes:
            each.training = mode
