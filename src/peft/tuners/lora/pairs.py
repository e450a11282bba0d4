"""A and B as matrices, and their change of rank, for every kind of layer.

The update of a layer consists of blocks: the experts of a stack, the groups of a convolution, else one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft.core.combine.combined import resized


if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer


def pair_blocks(layer: LoraLayer) -> tuple[int, int]:
    """How many (experts, groups) the update consists of; one of the two is 1."""
    if layer.kind.lookup:
        return 1, 1
    base = layer.get_base_layer()
    groups = getattr(base, "groups", 1)
    with torch.device("meta"):
        down, _ = layer.kind.factor(base, groups)
    return down.weight.shape[0] // groups, groups


def held_rank(layer: LoraLayer, name: str) -> int:
    """The rank that the tensors of an adapter have room for."""
    return layer.pair(name)[0].shape[0] // pair_blocks(layer)[0]


def split_pair(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair as matrices: (down ``[blocks, r, in]``, up ``[blocks, out, r]``), r by group; dW is ``up @ down``."""
    experts, groups = pair_blocks(layer)
    if experts > 1:
        return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return a.unflatten(0, (groups, -1)).flatten(2), b.flatten(1).unflatten(0, (groups, -1))


def join_pair(layer: LoraLayer, down: torch.Tensor, up: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of :func:`split_pair`, with the trailing axes of the pair of adapter ``name``."""
    a, b = layer.pair(name)
    up = up.permute(1, 2, 0).flatten(1) if pair_blocks(layer)[0] > 1 else up.flatten(0, 1)
    return down.flatten(0, 1).reshape(-1, *a.shape[1:]), up.reshape(b.shape[0], -1, *b.shape[2:])


def of_rank(layer: LoraLayer, name: str, rank: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A pair for the place of adapter ``name``, cut, or filled up with zeros, to a rank."""
    down, up = split_pair(layer, a, b)
    inner = rank // pair_blocks(layer)[1]
    return join_pair(layer, resized(down[:, :inner], inner, 1), resized(up[..., :inner], inner, 2), name)


def without_padding(layer: LoraLayer, name: str, saved: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of an adapter without the zeros that fill its pair up to a larger rank than its own.

    Args:
        saved: its name in files, such as ``lora_A.weight``.
    """
    rank, part = layer.r[name], saved.partition(".")[0]
    factor = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}.get(part)
    if factor is None or saved.endswith(".bias"):
        return tensor
    if name in layer.tied_to:
        return tensor.narrow(factor, 0, rank)
    if held_rank(layer, name) == rank:
        return tensor
    pair = list(layer.pair(name))
    pair[factor] = tensor
    return of_rank(layer, name, rank, *pair)[factor]
