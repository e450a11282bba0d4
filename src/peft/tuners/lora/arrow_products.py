"""The products of Arrow's router and its experts: which experts a token goes to, and what they make of it.

Two ways give the same sum. All tokens go through all experts, in two products, weighed by 0 where they did not choose
one; or each expert takes the tokens that chose it. That saves products and moves the numbers of x and y k times, which
takes as long as products of some rank; :func:`is_stack_cheaper` weighs the one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from peft.kernels.autocast import is_autocast
from peft.kernels.decompositions import resized
from peft.kernels.linear import Direct, is_eager


Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]

MOVED = 64
"""Taking a token's x out of the others' and adding its y to them costs as much as products of about this rank."""

STARTED = 2**22
"""The calls for one expert and its tokens cost as much as about so many multiplications of one product for all, and
as a quarter of that where each expert's factors stand by themselves."""


class Stack(NamedTuple):
    """The factors of all experts, turned, by which thin products are up to four times as fast.

    Attributes:
        down: all A^T, ``[experts, in, r]``, lower ranks filled up with zeros. Contiguous, or, where tokens will mostly
            go through all experts, stored as ``[in, experts, r]``: then one product does for all, and an expert's own
            part, whose rows are far apart, takes half as long again.
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
    own = not once and ranks_saved(rank, len(pairs), top_k) > 3 * MOVED * top_k
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
    started = STARTED // 4 if stack.down.is_contiguous() else STARTED
    return tokens * (features + stack.up.shape[2]) * saved <= experts * started


def mixed_by_stack(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: Stack) -> torch.Tensor:
    """:func:`mixed_by_token` by all experts for all tokens, with c = 0 for those that a token did not choose."""
    down, up = stack.down, stack.up
    each = weights.new_zeros(len(x), len(down), 1).scatter(1, chosen[:, :, None], weights[:, :, None])
    if down.is_contiguous():
        hidden = torch.bmm(x.expand(len(down), -1, -1), down).transpose(0, 1)
    else:
        hidden = (x @ down.transpose(0, 1).flatten(1)).unflatten(1, (len(down), -1))  # [tokens, experts, r]
    return (hidden * each).flatten(1) @ up.flatten(0, 1)


def mixed_by_token(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: Stack) -> torch.Tensor:
    """sum_e c_e s_e B_e A_e x ``[tokens, out]``, each expert for the tokens that chose it.

    Args:
        x: ``[tokens, in]``. chosen, c: ``[tokens, k]``.
    """
    given = x, weights, stack.down, stack.up
    if is_autocast(x.device.type):
        given = tuple(t.to(torch.get_autocast_dtype(x.device.type)) for t in given)
    return ByToken.of(*given, chosen)


class ByToken(Direct):
    """:func:`mixed_by_token`. Kept for the backward pass are x, the routes, and A x, ``[tokens * k, r]``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: torch.Tensor, down: torch.Tensor, up: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        flat = chosen.flatten()
        ctx.counts = flat.bincount(minlength=len(down)).tolist()
        order = flat.argsort()  # all tokens of the first expert, of the second, ...
        places = order, order.argsort(), torch.arange(0, len(flat), chosen.shape[1], device=x.device)
        hidden, y = _through(x, weights, down, up, places, ctx.counts)
        ctx.save_for_backward(x, weights, down, up, chosen, hidden, *places)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weights, down, up, chosen, hidden, *places = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # a gradient of the gradient will be asked for
            # views, since the weights depend on x: that part of its gradient is not this function's
            x, weights, down, up = given = [t.view_as(t) for t in (x, weights, down, up)]
            y = mixed_by_stack(x, chosen, weights, Stack(down, up, (), ()))
            asked = [t for t, needed in zip(given, needs) if needed]
            grads = iter(torch.autograd.grad(y, asked, dy, create_graph=True))
            return *(next(grads) if needed else None for needed in needs), None
        dh, dx = _through(dy, weights, up.mT, down.mT, places, ctx.counts)
        d_weights = (hidden * dh).sum(1).index_select(0, places[1]).view_as(weights)
        d_down = d_up = None
        if needs[2] or needs[3]:
            order = places[0]
            tokens, share = order // chosen.shape[1], weights.flatten().index_select(0, order)[:, None]
            d_down = _outer(x.index_select(0, tokens), dh * share, ctx.counts)
            d_up = _outer(hidden * share, dy.index_select(0, tokens), ctx.counts)
        return dx, d_weights, d_down, d_up, None


def _through(
    x: torch.Tensor,
    weights: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    places: Sequence[torch.Tensor],
    counts: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The products of each token with the first and the second factors of its experts, and the weighted sums of these.

    Args:
        x: ``[tokens, f]``. first: ``[experts, f, r]``. second: ``[experts, r, g]``.
        places: the order of the tokens' choices by experts, its inverse, and where each token's choices begin.
        counts: how many tokens chose each expert.

    Returns:
        ``[tokens * k, r]``, in that order, and ``[tokens, g]``.
    """
    order, back, starts = places
    taken = x.index_select(0, order // weights.shape[1])
    hidden, made = x.new_empty(len(order), first.shape[2]), x.new_empty(len(order), second.shape[2])
    parts = (t.split(counts) for t in (taken, hidden, made))
    for own, h, y, a, b in zip(*parts, first.unbind(), second.unbind()):
        if len(own):
            torch.mm(torch.mm(own, a, out=h), b, out=y)
    return hidden, torch.embedding_bag(made, back, starts, False, 0, False, weights.flatten())[0]


def _outer(a: torch.Tensor, b: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """sum over each expert's tokens of a b^T, ``[experts, features of a, features of b]``."""
    return torch.stack([u.t() @ v for u, v in zip(a.split(counts), b.split(counts))])


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
