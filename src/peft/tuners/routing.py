"""Which experts take a token, by a softmax over them: for methods that mix experts by the input."""

from __future__ import annotations

import torch


def top_weights(chances: torch.Tensor, k: int | None) -> torch.Tensor:
    """The weights of the experts: those of the ``k`` most likely ones, made to add up to 1, and 0 for the others.

    Args:
        chances: probabilities ``[..., experts]``. k: all of them, if None.
    """
    if k is None or k >= chances.shape[-1]:
        return chances
    best, index = chances.topk(k, -1)
    return torch.zeros_like(chances).scatter(-1, index, best / best.sum(-1, keepdim=True))


def imbalance(chances: torch.Tensor, weights: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """E sum_e F_e P_e, 1 where all experts are used alike (Switch, arXiv 2101.03961, equations 4 to 6).

    F_e is the part of the chosen experts that are e, which has no gradient, and P_e the mean probability of e.

    Args:
        chances: probabilities ``[..., experts]``. weights: those of :func:`top_weights`.
        counted: 1 for the tokens that count, 0 for padding, ``[...]``; all of them, if None.
    """
    counted = chances.new_ones(chances.shape[:-1]) if counted is None else counted.to(chances)
    tokens = counted.sum().clamp(min=1)
    chosen = ((weights > 0).to(chances) * counted.unsqueeze(-1)).flatten(0, -2).sum(0)
    mean = (chances * counted.unsqueeze(-1)).flatten(0, -2).sum(0) / tokens
    return chances.shape[-1] * (chosen / chosen.sum().clamp(min=1) * mean).sum()
