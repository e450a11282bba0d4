"""Which name an embedding has in a model, and whether it wears an adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft.core.layer.layer import BaseTunerLayer


def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Whether a layer is an adapted one around an embedding or an output head."""
    return isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), nn.Linear | nn.Embedding)


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """The path in the model of an embedding that is saved whole, or None if it is not in the model.

    Args:
        layer: the embedding or output head, adapted or not.
        is_embedding_in_target_modules: whether the adapter has tensors there; then it is the base layer that is meant,
            and None if nothing is around one.
    """
    if is_embedding_in_target_modules:
        if not has_valid_embedding_base_layer(layer):
            return None
        layer = layer.get_base_layer()
    return next((name for name, module in model.named_modules() if module is layer), None)
