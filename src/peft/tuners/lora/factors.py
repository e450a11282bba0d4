"""Where a layer holds the factors of an adapter, for code that stands outside of it."""

from __future__ import annotations

from torch import nn

from peft.tuners.lora.layer import LoraLayer


def factors_of(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter] | None:
    """A ``[r, in, *kernel]`` and B ``[out, r, 1...]`` of an adapter (of a table: ``[r, tokens]`` and ``[out, r]``).

    None where the adapter has none of its own: it is not here, or follows that of a tied layer.
    """
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return None
