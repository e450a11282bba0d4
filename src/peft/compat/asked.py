"""Attributes that are computed, and that others may set."""

from __future__ import annotations

from types import FunctionType
from typing import Any


class Asked:
    """An attribute that is computed from the object or class unless somebody has set it."""

    def __init__(self, compute: Any) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.compute(owner if instance is None else instance)


def is_theirs(method: Any) -> bool:
    """Whether what a class has under a name was put there by somebody else: it is no function of this package."""
    function = getattr(method, "__func__", method)
    ours = isinstance(function, FunctionType) and function.__globals__.get("__name__", "").startswith("peft.")
    return callable(function) and not ours


def is_replaced(cls: type, name: str) -> bool:
    """Whether somebody outside this package has put a method of this name into a class, or into one below it."""
    below: list[type] = cls.__subclasses__()
    return is_theirs(vars(cls).get(name)) or any(is_replaced(one, name) for one in below)
