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


def rotated(keys: torch.Tensor, by: int, theta: float) -> torch.Tensor:
    """Keys ``[..., size]``, in halves, turned as those that stand ``by`` positions later (arXiv 2104.09864)."""
    half = keys.shape[-1] // 2
    angles = by * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = keys.double().split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(keys.dtype)
