"""A call whose rows are divided by the active composition: what each row gets, and inputs repeated where need be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft.composition.expressions import copies, rows_of
from peft.core.composition import Composition


NOT_OF_ROWS = ("cache_position", "logits_to_keep", "past_key_values")
"""Arguments of models whose first axis is not the batch, whatever its size; a cache has the rows of its own call."""


def divided(
    expression: Composition, batch: int, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any], tuple[str | Composition, ...]]:
    """A call's arguments, repeated for each member of a Parallel, and what acts on each of their rows.

    Raises:
        ValueError: if the batch is not one that the expression is for.
    """
    rows, times = tuple(rows_of(expression, batch)), copies(expression)
    if times == 1:
        return args, kwargs, rows
    args = tuple(_repeated(value, batch, times) for value in args)
    kwargs = {k: v if k in NOT_OF_ROWS else _repeated(v, batch, times) for k, v in kwargs.items()}
    return args, kwargs, rows


def _repeated(value: Any, batch: int, times: int) -> Any:
    """Tensors with a row for each sample, also those within tuples and dicts, ``times`` one after another."""
    if isinstance(value, torch.Tensor):
        return value.repeat(times, *[1] * (value.dim() - 1)) if value.dim() and len(value) == batch else value
    if isinstance(value, Mapping):
        return type(value)({k: _repeated(v, batch, times) for k, v in value.items()})  # type: ignore[call-arg]
    if type(value) in (tuple, list):
        return type(value)(_repeated(v, batch, times) for v in value)
    return value
