"""The products of Arrow's router and its experts: which experts a token goes to, and what they make of it.

Sorting tokens by their experts moves each x and y several times. With two of eight experts of rank 16 that costs more
than the products that it saves, so all tokens go through all experts then, weighed by 0 where they were not chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
Stack = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

GATHER = 64
"""Taking a token's x out of the others' and adding its y to them costs as much as products of about this rank."""


def route(
    x: torch.Tensor, directions: torch.Tensor, top_k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their weights, both ``[tokens, k]``: softmax(|x v| / T) of the k largest |x v|.

    Args:
        x: ``[tokens, in]``. directions: v of each expert, ``[experts, in]``.
    """
    return best(x.to(directions.dtype) @ directions.T, top_k, temperature)


def best(products: torch.Tensor, top_k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from the products x v, ``[tokens, experts]``."""
    likeness, chosen = products.abs().topk(min(top_k, products.shape[-1]), -1)
    return chosen, (likeness / temperature).softmax(-1)


def stacked(pairs: Pairs, directions: torch.Tensor) -> Stack | None:
    """What the experts of a layer that do not train are multiplied by at once; None where their dtypes differ.

    Returns:
        The directions and all A below each other, ``[experts + sum of r, in]``, all B side by side,
        ``[out, sum of r]``, and which expert each of their columns is of.
    """
    if any(t.dtype != directions.dtype for pair in pairs for t in pair):
        return None
    owner = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(a) for a, _ in pairs]))
    down, up = torch.cat([directions, *(a for a, _ in pairs)]), torch.cat([b for _, b in pairs], 1)
    return down, up, owner.to(directions.device)


def is_stack_cheaper(pairs: Pairs, top_k: int) -> bool:
    """Whether all experts take less for all tokens than to sort out which tokens chose which."""
    return sum(len(a) for a, _ in pairs) * (1 / top_k - 1 / len(pairs)) <= GATHER


def mixed_by_stack(
    x: torch.Tensor,
    stack: Stack,
    top_k: int,
    temperature: float,
    scales: Sequence[float],
) -> torch.Tensor:
    """:func:`mixed_by_token` with 0 for all experts that a token did not choose: two products for routing and all."""
    down, up, owner = stack
    experts = len(scales)
    both = F.linear(x, down)
    chosen, weights = best(both[:, :experts], top_k, temperature)
    each = both.new_zeros(len(x), experts).scatter_(1, chosen, weights).mul_(both.new_tensor(scales))
    return F.linear(both[:, experts:].mul_(each.index_select(1, owner)), up)


def mixed_by_token(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    pairs: Pairs,
    scales: Sequence[float],
) -> torch.Tensor:
    """sum_e c_e s_e B_e A_e x ``[tokens, out]``; an expert that no token chose is not computed.

    One that some chose computes these tokens, or all of them with c = 0 where that takes less than to sort them out.

    Args:
        x: ``[tokens, in]``. chosen, weights: ``[tokens, k]``. pairs: A_e ``[r, in]``, B_e ``[out, r]``. scales: s_e.
    """
    tokens, experts = len(x), len(pairs)
    each = x.new_zeros(tokens, experts).scatter(1, chosen, weights.to(x.dtype))
    counts = torch.bincount(chosen.flatten(), minlength=experts).tolist()
    y = x.new_zeros(tokens, len(pairs[0][1]))
    for e, ((a, b), count) in enumerate(zip(pairs, counts)):
        if (tokens - count) * len(a) <= GATHER * count:
            y = torch.addmm(y, each[:, e, None] * F.linear(x, a), b.t(), alpha=scales[e])
        elif count:
            rows = (chosen == e).any(1).nonzero().squeeze(1)
            y = y.index_add(0, rows, F.linear(each[rows, e, None] * F.linear(x[rows], a), b), alpha=scales[e])
    return y


def mixed_for_one(
    x: torch.Tensor,
    directions: torch.Tensor,
    top_k: int,
    temperature: float,
    pairs: Pairs,
    scales: Sequence[float],
) -> torch.Tensor:
    """The same for one token ``[1, in]``, routed as by :func:`route`, without gradients: as when text is generated.

    A handful of numbers is faster to choose from in Python than by operations on tensors.
    """
    likeness = F.linear(x.to(directions.dtype), directions).abs().flatten().tolist()
    chosen = sorted(range(len(likeness)), key=likeness.__getitem__, reverse=True)[:top_k]
    shares = [math.exp((likeness[e] - likeness[chosen[0]]) / temperature) for e in chosen]
    y = x.new_zeros(1, len(pairs[0][1]))
    for e, share in zip(chosen, shares):
        a, b = pairs[e]
        y = torch.addmm(y, F.linear(x, a), b.t(), alpha=share / sum(shares) * scales[e])
    return y
