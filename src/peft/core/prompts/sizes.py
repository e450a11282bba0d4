"""How wide virtual tokens are, ``[tokens, width]`` or ``[tokens, 2 layers width]``: as the base model has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft.core.model.walk import embeddings_of
from peft.errors import ConfigError, ConfigTypeError


def settle_sizes(config: Any, model: nn.Module, as_prefix: bool) -> None:
    """Fill in the sizes that the config leaves open, from the model.

    Raises:
        ValueError: if a size is neither given nor found, or given and not that of the model.
    """
    if config.num_virtual_tokens is None:
        raise ConfigTypeError(f"{type(config).__name__} needs num_virtual_tokens, the length of the prompt.")
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    found = sizes_of(model, as_prefix)
    for field, value in found.items():
        given = getattr(config, field)
        binding = as_prefix or field == "token_dim"  # before a text, the width alone matters
        if given is not None and value is not None and given != value and binding:
            raise ConfigError(
                f"the prompt has {field}={given}, but {type(model).__name__} has {value}: it was made for another "
                f"base model{f' ({config.base_model_name_or_path})' if config.base_model_name_or_path else ''}. Load "
                f"that model, or leave {field} out of a new config."
            )
        setattr(config, field, value if given is None else given)
    missing = [field for field in found if getattr(config, field) is None and (as_prefix or field == "token_dim")]
    if missing:
        raise ConfigError(f"{type(model).__name__} does not say its {', '.join(missing)}: set them in the config.")


def sizes_of(model: nn.Module, as_prefix: bool) -> dict[str, int | None]:
    """``num_layers``, ``num_attention_heads`` and ``token_dim``: of the embedding, or of all key heads of a layer.

    Where layers differ it is the largest.
    """
    layers, parts = _layers_of(model)
    if as_prefix:
        sizes = key_sizes(model)
        heads = max((heads for heads, _ in sizes), default=None)
        width = max((heads * each for heads, each in sizes), default=None)
        return {"num_layers": len(sizes) or layers, "num_attention_heads": heads, "token_dim": width}
    heads = max((heads for i, part in enumerate(parts) if (heads := _first(part, ATTENTION[1:], i))), default=None)
    embedding = embeddings_of(model)[0]
    weight = getattr(embedding, "weight", None)
    width = _first(embedding, ("embedding_dim",)) or (None if weight is None else weight.shape[-1])
    return {"num_layers": layers, "num_attention_heads": heads, "token_dim": width}


ATTENTION = ("decoder_attention_heads", "num_attention_heads")


def key_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """For each layer the number of its key heads and the width of one, which may differ; empty if it is not known."""
    sizes = []
    for i, part in enumerate(_layers_of(model, decoder=True)[1]):
        width, heads = _first(part, ("hidden_size",), i), _first(part, ATTENTION, i)
        each = _first(part, ("head_dim", "d_kv"), i) or (width // heads if width and heads else None)
        if not getattr(part, "new_decoder_architecture", False):  # Falcon's, which keeps keys repeated
            one = getattr(part, "multi_query", False)
            heads = 1 if one else _first(part, ("num_key_value_heads", "num_kv_heads"), i) or heads
        if not heads or not each:
            return []
        sizes.append((heads, each))
    return sizes


def _layers_of(model: nn.Module, decoder: bool = False) -> tuple[int | None, list[Any]]:
    """How many layers a model has, and the config of each; of an encoder-decoder's one half or the other."""
    config: Any = getattr(model, "config", None)
    joint = getattr(config, "is_encoder_decoder", False) or not hasattr(config, "get_text_config")
    text = config if joint else config.get_text_config(decoder=True)
    count = _first(text, ("num_hidden_layers", "num_layers"))
    if decoder:
        count = _first(text, ("num_decoder_layers", "decoder_layers")) or count
    parts = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * (count or 0)
    return count, list(parts)


def _first(source: Any, names: Sequence[str], layer: int = 0) -> int | None:
    """The first of these attributes that holds a number, or a number for each layer."""
    for name in names:
        value = getattr(source, name, None)
        if isinstance(value, list | tuple) and layer < len(value):
            value = value[layer]
        if isinstance(value, int):
            return value
    return None
