"""The low-rank pairs of a model, found by walking its layers, and the r x r matrices that precondition them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from peft.core.files.entries import anatomy
from peft.core.layer.classes import is_own
from peft.core.layer.weight import wide
from peft.core.model.walk import layers_of
from peft.tuners.lora.factors import factors_of
from peft.tuners.lora.layer import LoraLayer


class Pair(NamedTuple):
    """The factors of one active LoRA adapter at one layer: A ``[r, in, *kernel]`` and B ``[out, r, 1...]``.

    Attributes:
        layer, name: where they are.
        lookup: an embedding's table; there A ``[r, tokens]`` starts at zero, and B is drawn.
    """

    layer: LoraLayer
    name: str
    a: nn.Parameter
    b: nn.Parameter
    lookup: bool


def pairs_of(model: nn.Module) -> Iterator[Pair]:
    """The pairs of the active LoRA adapters of a model; one that several layers hold is given once."""
    seen: set[int] = set()
    for _, layer in layers_of(anatomy(model)[0]):
        if not is_own(layer, LoraLayer):
            continue
        for name in layer.active_adapters:
            factors = factors_of(layer, name)
            if factors is not None and id(factors[0]) not in seen:
                seen.add(id(factors[0]))
                yield Pair(layer, name, *factors, lookup=name in layer.lora_embedding_A)


def damped_inverses(factors: list[torch.Tensor], damping: float) -> list[torch.Tensor]:
    """``(F F^T + damping I)^+`` ``[..., r, r]`` of each factor F ``[..., r, n]``, in float32 or F's dtype, if wider.

    Those of one size are inverted together: a step over many layers costs one call for each rank, not for each layer.
    """
    grams = []
    for factor in factors:
        f = wide(factor.detach())
        grams.append(f @ f.mT + damping * torch.eye(f.shape[-2], dtype=f.dtype, device=f.device))
    groups: dict[tuple, list[int]] = {}
    for index, gram in enumerate(grams):
        groups.setdefault((gram.shape, gram.dtype, gram.device), []).append(index)
    for indices in groups.values():
        inverses = torch.linalg.pinv(torch.stack([grams[i] for i in indices]), hermitian=True)
        for index, inverse in zip(indices, inverses):
            grams[index] = inverse
    return grams


def require_whole(matrix: torch.Tensor, what: str) -> None:
    """Refuse a factor whose rows or columns are on other devices: its r x r matrix would be of a part of it.

    Raises:
        ValueError: if the parameter is empty here (ZeRO-3), flattened (FSDP), or a ``DTensor``.
    """
    if matrix.dim() < 2 or matrix.numel() == 0 or hasattr(matrix, "placements"):
        raise ValueError(
            f"{what} needs whole factors of LoRA, and one of shape {tuple(matrix.shape)} is sharded. Keep the adapter "
            "unsharded (it is small), or use create_loraplus_optimizer, which computes with no factor."
        )
