"""How the layers may compute: :func:`plain` leaves the kernels out, :func:`strict` forbids the slow fallback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


_PLAIN: list[bool] = []
_STRICT: list[bool] = []


@contextmanager
def plain() -> Iterator[None]:
    """A context in which every layer computes as its method is written, without the kernels: their specification."""
    _PLAIN.append(True)
    try:
        yield
    finally:
        _PLAIN.pop()


def is_plain() -> bool:
    """Whether the call is within :func:`plain`."""
    return bool(_PLAIN)


class DenseUpdateError(RuntimeError):
    """Within :func:`strict`, a forward has built a weight or an update as large as the weight."""


@contextmanager
def strict() -> Iterator[None]:
    """A context in which a forward that builds a dense weight, or an update as large as one, is an error.

    Nobody then pays for the slow way unknowingly:

        with peft.kernels.strict():
            model(**batch)

    Raises:
        DenseUpdateError: by the layer that does so.
    """
    _STRICT.append(True)
    try:
        yield
    finally:
        _STRICT.pop()


def forbid_dense(layer: Any) -> None:
    """Raise DenseUpdateError within :func:`strict`."""
    if _STRICT:
        raise DenseUpdateError(
            f"{type(layer).__module__}.{type(layer).__name__} at {layer.key or 'a layer'} builds a dense weight in "
            "its forward. Merge the adapter, use a method or a setting that has a cheaper way, or leave "
            "peft.kernels.strict()."
        )
