"""How wide virtual tokens are, ``[tokens, width]`` or ``[tokens, 2 layers width]``: as the base model has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft.core.model.walk import embeddings_of
from peft.utils.error import ConfigError


def settle_sizes(config: Any, model: nn.Module, as_prefix: bool) -> None:
    """Fill in the sizes that the config leaves open, from the model.

    Raises:
        ValueError: if a size is neither given nor found, or given and not that of the model.
    """
    if config.num_virtual_tokens is None:
        raise ConfigError(f"{type(config).__name__} needs num_virtual_tokens, the length of the prompt.")
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    found = sizes_of(model, as_prefix)
    for field, value in found.items():
        given = getattr(config, field)
        binding = as_prefix or field == "token_dim"
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
    """``num_layers``, ``num_attention_heads`` and ``token_dim``: of the embedding, or of all key heads of a layer."""
    config = getattr(model, "config", None)
    joint = getattr(config, "is_encoder_decoder", False) or not hasattr(config, "get_text_config")
    text = config if joint else config.get_text_config(decoder=True)
    layers, heads = (_first(text, names) for names in (("num_hidden_layers", "num_layers"), ("num_attention_heads",)))
    if as_prefix:
        layers = _first(text, ("num_decoder_layers", "decoder_layers")) or layers
        width, heads = _first(text, ("hidden_size",)), _first(text, ("decoder_attention_heads",)) or heads
        each = _first(text, ("head_dim", "d_kv")) or (width // heads if width and heads else None)
        if getattr(text, "multi_query", False):
            heads = 1
        heads = _first(text, ("num_key_value_heads", "num_kv_heads")) or heads
        width = each * heads if each and heads else None
        return {"num_layers": layers, "num_attention_heads": heads, "token_dim": width}
    weight = getattr(embeddings_of(model)[0], "weight", None)
    width = _first(embeddings_of(model)[0], ("embedding_dim",)) or (None if weight is None else weight.shape[-1])
    return {"num_layers": layers, "num_attention_heads": heads, "token_dim": width}


def _first(source: Any, names: Sequence[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(source, name, None), int)), None)
