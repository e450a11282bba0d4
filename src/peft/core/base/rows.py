"""The one split and join of a batch whose rows use different adapters: for layers, copies, blocks and prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rows_of(x: torch.Tensor, rows: torch.Tensor | None, axis: int = 0) -> torch.Tensor:
    """Some rows of a batch, which are along ``axis``; None: all of them."""
    return x if rows is None else x.index_select(axis, rows)


def joined(parts: Sequence[torch.Tensor], order: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """The parts of a batch together again: ``order`` says where each of its rows stands in them, one after another."""
    return torch.cat(list(parts), axis).index_select(axis, order)


def with_rows_added(x: torch.Tensor, new: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """A batch with what was made of :func:`rows_of` it added to them."""
    return x + new if rows is None else x.index_add(0, rows, new)
