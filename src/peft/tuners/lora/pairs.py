"""A and B as matrices, and their change of rank, for every kind of layer.

The update of a layer consists of blocks: the experts of a stack, the groups of a convolution, else one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft.core.adapter import Adapter
from peft.kernels.decompositions import resized


if TYPE_CHECKING:
    from peft.tuners.lora.layer import Lora


def pair_blocks(lora: Adapter) -> tuple[int, int]:
    """How many (experts, groups) the update consists of; one of the two is 1."""
    if lora.kind.lookup or lora.kind.matrix:  # a matrix is one block; asked six times by a swap, for each layer
        return 1, 1
    base = lora.base
    groups = getattr(base, "groups", 1)
    with torch.device("meta"):
        down, _ = lora.kind.factor(base, groups)
    return down.weight.shape[0] // groups, groups


def held_rank(lora: Lora) -> int:
    """The rank that the tensors of an adapter have room for."""
    return lora.held_pair()[0].shape[0] // pair_blocks(lora)[0]


def pair_rank(lora: Lora) -> int:
    """The rank of the pair that the mathematics uses, which may be larger than that of the tensors held."""
    return lora.r if not lora.computes_pair else lora.pair()[0].shape[0] // pair_blocks(lora)[0]


def split_pair(lora: Lora, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair as matrices: (down ``[blocks, r, in]``, up ``[blocks, out, r]``), r by group; dW is ``up @ down``."""
    experts, groups = pair_blocks(lora)
    if experts > 1:
        return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return a.unflatten(0, (groups, -1)).flatten(2), b.flatten(1).unflatten(0, (groups, -1))


def join_pair(lora: Lora, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of :func:`split_pair`, with the trailing axes of the adapter's pair."""
    a, b = lora.held_pair()
    up = up.permute(1, 2, 0).flatten(1) if pair_blocks(lora)[0] > 1 else up.flatten(0, 1)
    return down.flatten(0, 1).reshape(-1, *a.shape[1:]), up.reshape(b.shape[0], -1, *b.shape[2:])


def of_rank(lora: Lora, rank: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A pair for the place of an adapter's, cut, or filled up with zeros, to a rank."""
    down, up = split_pair(lora, a, b)
    inner = rank // pair_blocks(lora)[1]
    return join_pair(lora, resized(down[:, :inner], inner, 1), resized(up[..., :inner], inner, 2))


def without_padding(lora: Lora, saved: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of an adapter without the zeros that fill its pair up to a larger rank than its own.

    Args:
        saved: its name in files, such as ``lora_A.weight``.
    """
    rank = lora.r
    factor = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}.get(saved)
    if factor is None:
        return tensor
    if lora.tied_to is not None:
        return tensor.narrow(factor, 0, rank)
    if held_rank(lora) == rank:
        return tensor
    pair = list(lora.held_pair())
    pair[factor] = tensor
    return of_rank(lora, rank, *pair)[factor]
