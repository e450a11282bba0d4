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
from peft.kernels.linear import is_eager


Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]

MOVED = 64
"""Taking a token's x out of the others' and adding its y to them costs as much as products of about this rank."""

STARTED = 2**22
"""The calls for one expert and its tokens cost as much as about so many multiplications."""


class Stack(NamedTuple):
    """The factors of all experts beside each other, turned, by which thin products are up to four times as fast.

    Attributes:
        down: all A^T, ``[in, sum of r]``. up: all s B^T, ``[sum of r, out]``. owner: the expert of each rank.
        downs, ups: the parts of each expert, views of them.
    """

    down: torch.Tensor
    up: torch.Tensor
    owner: torch.Tensor
    downs: tuple[torch.Tensor, ...]
    ups: tuple[torch.Tensor, ...]


def stacked(pairs: Pairs, scales: Sequence[float], once: bool) -> Stack:
    """The stack of experts with A ``[r, in]``, B ``[out, r]`` and s.

    Args:
        once: for one call. Turning the numbers takes longer than that gains.
    """
    ranks = [len(a) for a, _ in pairs]
    down = torch.cat([a for a, _ in pairs]).t()
    up = torch.cat([b if s == 1 else b * s for (_, b), s in zip(pairs, scales)], 1).t()
    if not once:
        down, up = down.contiguous(), up.contiguous()
    owner = torch.arange(len(pairs)).repeat_interleave(torch.tensor(ranks)).to(down.device)
    return Stack(down, up, owner, down.split(ranks, 1), up.split(ranks))


def mixed(
    x: torch.Tensor, directions: torch.Tensor, top_k: int, temperature: float, pairs: Pairs, stack: Stack
) -> torch.Tensor:
    """What the experts make of x ``[tokens, in]``, ``[tokens, out]``, in the way that takes least.

    Args:
        directions, top_k, temperature: as for :func:`route`. pairs: A and B of each expert. stack: the same in one.
    """
    eager = is_eager(x)  # what is traced may not depend on how many tokens chose an expert
    if eager and len(x) == 1 and not torch.is_grad_enabled() and not is_autocast(x.device.type):
        return mixed_for_one(x, directions, top_k, temperature, pairs, stack.ups)
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


def is_stack_cheaper(tokens: int, stack: Stack, top_k: int) -> bool:
    """Whether all experts take less for all tokens than each its own tokens."""
    experts, ranks = len(stack.downs), len(stack.owner)
    saved = ranks * (1 - top_k / experts) - MOVED * top_k
    return tokens * (len(stack.down) + stack.up.shape[1]) * saved <= experts * STARTED


def mixed_by_stack(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: Stack) -> torch.Tensor:
    """:func:`mixed_by_token` by all experts for all tokens, with c = 0 for those that a token did not choose."""
    each = weights.new_zeros(len(x), len(stack.downs)).scatter(1, chosen, weights)
    return (x @ stack.down * each.index_select(1, stack.owner)) @ stack.up


def mixed_by_token(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: Stack) -> torch.Tensor:
    """sum_e c_e s_e B_e A_e x ``[tokens, out]``, each expert for the tokens that chose it.

    Args:
        x: ``[tokens, in]``. chosen, c: ``[tokens, k]``.
    """
    flat = chosen.flatten()
    order, counts = flat.argsort(), flat.bincount(minlength=len(stack.downs)).tolist()
    tokens, shares = order // chosen.shape[1], weights.flatten().index_select(0, order)[:, None]
    owned = tokens.split(counts)
    # At once where the gradient is put back, into one tensor; else one by one, for the memory.
    taken = x.index_select(0, tokens).split(counts) if x.requires_grad else (x.index_select(0, own) for own in owned)
    y = x.new_zeros(len(x), stack.up.shape[1])
    for down, up, own, mine, share in zip(stack.downs, stack.ups, owned, taken, shares.split(counts)):
        if len(own):
            y = y.index_add_(0, own, ((mine @ down * share) @ up).to(y.dtype))  # narrower under autocast
    return y


def mixed_by_choice(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: Stack) -> torch.Tensor:
    """:func:`mixed_by_token` of one token ``[1, in]``, of which nothing has to be sorted."""
    parts = zip(chosen[0].tolist(), weights[0].unbind())
    return torch.stack([(x @ stack.downs[e] * share) @ stack.ups[e] for e, share in parts]).sum(0)


def mixed_for_one(
    x: torch.Tensor,
    directions: torch.Tensor,
    top_k: int,
    temperature: float,
    pairs: Pairs,
    ups: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The same for one token ``[1, in]``, routed as by :func:`route`, without gradients: as when text is generated.

    A handful of numbers is faster to choose from in Python than by operations on tensors.

    Args:
        ups: s B^T of each expert, ``[r, out]``.
    """
    likeness = torch.mm(x.to(directions.dtype), directions.t()).abs().flatten().tolist()
    chosen = sorted(range(len(likeness)), key=likeness.__getitem__, reverse=True)[:top_k]
    shares = [math.exp((likeness[e] - likeness[chosen[0]]) / temperature) for e in chosen]
    total, y = sum(shares), x.new_zeros(1, ups[0].shape[1])
    for e, share in zip(chosen, shares):
        y.addmm_(torch.mm(x, pairs[e][0].t()), ups[e], alpha=share / total)
    return y
