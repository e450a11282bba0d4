"""The two orders in which the rows of q and k are kept for rotary positions: halves, and pairs.

transformers rotates row i of a head with row i + half; LLaMA's own weights, torchtune and llama.cpp rotate neighbours.
"""

from __future__ import annotations

import torch


def as_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows ``[heads * size, ...]`` from halves (transformers) to pairs (LLaMA, torchtune, llama.cpp)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def as_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`as_pairs`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
