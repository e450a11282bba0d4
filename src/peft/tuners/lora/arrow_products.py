"""The products of Arrow's router and its experts: which experts a token goes to, and what they make of it.

Two ways give the same sum. All tokens go through all experts, in two products, weighed by 0 where they did not choose
one; or each expert takes the tokens that chose it. That saves products and moves the numbers of x and y k times, which
takes as long as products of some rank; :func:`is_stack_cheaper` weighs the one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from peft.kernels.autocast import is_autocast
from peft.kernels.decompositions import resized
from peft.kernels.linear import is_eager


Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]

MOVED = 64
"""Taking a token's x out of the others' and adding its y to them costs as much as products of about this rank."""

STARTED = 2**19
"""The calls for one expert and its tokens cost as much as about so many multiplications of one product for all."""


class Stack(NamedTuple):
    """The factors of all experts, turned, by which thin products are up to four times as fast.

    Attributes:
        down: all A^T, ``[experts, in, r]``, lower ranks filled up with zeros. Contiguous, or, where tokens will
            always go through all experts, stored as ``[in, experts, r]``: then one product does for all, and an
            expert's own part, whose rows are far apart, takes half as long again.
        up: all s B^T, ``[experts, r, out]``. downs, ups: the parts of each expert, views of them.
    """

    down: torch.Tensor
    up: torch.Tensor
    downs: tuple[torch.Tensor, ...]
    ups: tuple[torch.Tensor, ...]


def stacked(pairs: Pairs, scales: Sequence[float], top_k: int, once: bool) -> Stack:
    """The stack of experts with A ``[r, in]``, B ``[out, r]`` and s, of which each token chooses ``top_k``.

    Args:
        once: for one call. Turning the numbers takes longer than that gains.
    """
    rank = max(len(a) for a, _ in pairs)
    down = torch.cat([resized(a, rank, 0) for a, _ in pairs]).t()
    up = torch.cat([resized(b if s == 1 else b * s, rank, 1) for (_, b), s in zip(pairs, scales)], 1).t()
    own = not once and ranks_saved(rank, len(pairs), top_k) > 0
    if not once:
        down, up = down if own else down.contiguous(), up.contiguous()
    down, up = down.unflatten(1, (-1, rank)).transpose(0, 1), up.unflatten(0, (-1, rank))
    down = down.contiguous() if own else down
    return Stack(down, up, down.unbind(), up.unbind())


def mixed(x: torch.Tensor, directions: torch.Tensor, top_k: int, temperature: float, stack: Stack) -> torch.Tensor:
    """What the experts make of x ``[tokens, in]``, ``[tokens, out]``, in the way that takes least.

    Args:
        directions, top_k, temperature: as for :func:`route`.
    """
    eager = is_eager(x)  # what is traced may not depend on how many tokens chose an expert
    if eager and len(x) == 1 and not torch.is_grad_enabled() and not is_autocast(x.device.type):
        return mixed_for_one(x, directions, top_k, temperature, stack)
    chosen, weights = route(x, directions, top_k, temperature)
    way = mixed_by_stack
    if eager and len(x) == 1:
        way = mixed_by_choice
    elif eager and not is_stack_cheaper(len(x), stack, top_k):
        way = mixed_by_token
    return way(x, chosen, weights.to(x.dtype), stack)


def route(
    x: torch.Tensor, directions: torch.Tensor, top_k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their weights, both ``[tokens, k]``: softmax(|x v| / T) of the k largest |x v|.

    Args:
        x: ``[tokens, in]``. directions: v of each expert, ``[experts, in]``.
    """
    likeness, chosen = (x.to(directions.dtype) @ directions.T).abs().topk(min(top_k, len(directions)), -1)
    return chosen, (likeness / temperature).softmax(-1)


def ranks_saved(rank: int, experts: int, top_k: int) -> float:
    """By how much of a rank the products for a token shrink if it goes through its own experts alone."""
    return rank * (experts - top_k) - MOVED * top_k


def is_stack_cheaper(tokens: int, stack: Stack, top_k: int) -> bool:
    """Whether all experts take less for all tokens than each its own tokens."""
    experts, features, rank = stack.down.shape
    saved = ranks_saved(rank, experts, top_k)
    return tokens * (features + stack.up.shape[2]) * saved <= experts * STARTED


def mixed_by_stack(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: Stack) -> torch.Tensor:
    """:func:`mixed_by_token` by all experts for all tokens, with c = 0 for those that a token did not choose."""
    down, up = stack.down, stack.up
    each = weights.new_zeros(len(x), len(down)).scatter(1, chosen, weights)[:, :, None]
    if down.is_contiguous():
        hidden = torch.bmm(x.expand(len(down), -1, -1), down).transpose(0, 1)
    else:
        hidden = (x @ down.transpose(0, 1).flatten(1)).unflatten(1, (len(down), -1))  # [tokens, experts, r]
    return (hidden * each).flatten(1) @ up.flatten(0, 1)


def mixed_by_token(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: Stack) -> torch.Tensor:
    """sum_e c_e s_e B_e A_e x ``[tokens, out]``, each expert for the tokens that chose it.

    All experts get as many rows as the one that most tokens chose, by one product of batches for all, where that
    computes less in vain than a product for each takes to call.

    Args:
        x: ``[tokens, in]``. chosen, c: ``[tokens, k]``.
    """
    experts, features, rank = stack.down.shape
    counts = chosen.flatten().bincount(minlength=experts).tolist()
    most = max(counts)
    each = weights.new_zeros(len(x), experts).scatter(1, chosen, weights)
    shares, tokens = each.t().topk(most)  # each expert's tokens, and after them others, with c = 0
    in_vain = (experts * most - chosen.numel()) * (features + stack.up.shape[2]) * rank
    if in_vain <= 4 * experts * STARTED:
        rows = tokens.flatten()
        hidden = torch.bmm(x.index_select(0, rows).unflatten(0, (experts, most)), stack.down)
        made = torch.bmm(hidden * shares[:, :, None], stack.up).flatten(0, 1)
    else:
        rows, share = (torch.cat([own[:count] for own, count in zip(t, counts)]) for t in (tokens, shares))
        hidden = _each(x.index_select(0, rows), stack.down, counts)
        made = _each(hidden * share[:, None], stack.up, counts)
    return made.new_zeros(len(x), made.shape[1]).index_add_(0, rows, made)


def _each(rows: torch.Tensor, factors: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The rows ``[rows, f]`` of each expert by its own of the factors ``[experts, f, g]``."""
    return torch.cat([own @ factor for own, factor in zip(rows.split(counts), factors.unbind())])


def mixed_by_choice(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: Stack) -> torch.Tensor:
    """:func:`mixed_by_token` of one token ``[1, in]``, of which nothing has to be sorted."""
    parts = zip(chosen[0].tolist(), weights[0].unbind())
    return torch.stack([(x @ stack.downs[e] * share) @ stack.ups[e] for e, share in parts]).sum(0)


def mixed_for_one(
    x: torch.Tensor, directions: torch.Tensor, top_k: int, temperature: float, stack: Stack
) -> torch.Tensor:
    """The same for one token ``[1, in]``, routed as by :func:`route`, without gradients: as when text is generated.

    A handful of numbers is faster to choose from in Python than by operations on tensors.
    """
    likeness = torch.mm(x.to(directions.dtype), directions.t()).abs().flatten().tolist()
    chosen = sorted(range(len(likeness)), key=likeness.__getitem__, reverse=True)[:top_k]
    shares = [math.exp((likeness[e] - likeness[chosen[0]]) / temperature) for e in chosen]
    total, y = sum(shares), x.new_zeros(1, stack.up.shape[2])
    for e, share in zip(chosen, shares):
        y.addmm_(torch.mm(x, stack.downs[e]), stack.ups[e], alpha=share / total)
    return y
