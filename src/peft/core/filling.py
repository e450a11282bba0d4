"""Making many layers at once: what a file will overwrite is not drawn first, and no garbage is looked for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


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
