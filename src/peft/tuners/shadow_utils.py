"""The shadow network itself: a small transformer of the base's architecture, and how it stands alone."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import PeftConfig, option
from peft.core.base.rows import rows_of
from peft.core.blocks.blocks import find_blocks, first_output
from peft.core.model.walk import embeddings_of


@dataclass
class Network(PeftConfig):
    """What the shadow network is."""

    shadow_model: str = option(
        "mirror", "The shadow network: 'mirror' is a small one of the base's architecture; else a model to load."
    )
    shadow_num_hidden_layers: int = option(None, "Layers of a mirrored shadow network; 1 if left out.", minimum=1)
    shadow_hidden_size: int = option(None, "Its width; the base's if left out.", minimum=1)
    shadow_num_attention_heads: int = option(None, "Its attention heads; as many as the base if left out.", minimum=1)
    shadow_intermediate_size: int = option(None, "Its feed-forward width; the base's if left out.", minimum=1)
    share_embeddings: bool = option(
        True, "A mirrored shadow network of the base's width reads the base's embeddings instead of its own."
    )


def mirrored(config: Any, **fields: int | None) -> Any:
    """The config of a small model of the same architecture.

    Args:
        config: of the base.
        fields: what is otherwise; None keeps the base's.
    """
    small = copy.deepcopy(config)
    for name, value in fields.items():
        if value is not None:
            setattr(small, name, value)
    heads, groups = small.num_attention_heads, getattr(small, "num_key_value_heads", None)
    if groups is not None and heads % groups:  # of the base, too many for fewer heads
        small.num_key_value_heads = heads
    kinds = getattr(small, "layer_types", None)
    if kinds is not None:
        small.layer_types = list(kinds)[: small.num_hidden_layers]  # transformers wants one for each layer
    return small


def network_for(config: Any, stack: nn.Module, width: int) -> nn.Module:
    """The network that a Shadow config means beside a transformer: a small one of its kind, or one that is loaded."""
    if config.shadow_model != "mirror":
        from transformers import AutoModel

        return AutoModel.from_pretrained(config.shadow_model)
    fields = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    given = {field: getattr(config, f"shadow_{field}") for field in fields}
    small = mirrored(stack.config, **{**given, "num_hidden_layers": config.shadow_num_hidden_layers or 1})
    network = type(stack)(small)
    if config.share_embeddings and small.hidden_size == width:
        network.set_input_embeddings(None)  # it is given the base's embeddings
    return network


class Call:
    """One call of a transformer, and the same for rows of it by another network.

    Attributes:
        kwargs: all arguments by name. embeds: the input embeddings ``[batch, tokens, width]``. cache: where the call
            keeps keys and values, or None; one is made where the transformer would make it itself.
    """

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(inspect.unwrap(type(module).forward))
        given = dict(signature.bind_partial(module, *args, **kwargs).arguments)
        given.pop(next(iter(signature.parameters)))
        self.kwargs: dict[str, Any] = {**given, **given.pop("kwargs", {})}
        self.cache_name = "cache" if "cache" in signature.parameters else "past_key_values"
        embeds, embedding = self.kwargs.get("inputs_embeds"), embeddings_of(module)[0]
        self.embeds: Any = embedding(self.kwargs["input_ids"]) if embeds is None and embedding is not None else embeds
        self.config = module.config
        # Transformers then keeps no cache.
        checkpointed = module.training and getattr(module, "gradient_checkpointing", False)
        wanted = self.kwargs.get("use_cache")
        self.caches = (module.config.use_cache if wanted is None else wanted) and not checkpointed

    def run(self, name: str, network: nn.Module, rows: torch.Tensor | None) -> torch.Tensor:
        """What another network makes of rows of the input (None: of all), ``[rows, tokens, its width]``."""
        from transformers import DynamicCache

        own = {key: self.kwargs.get(key) for key in ("attention_mask", "position_ids")}
        if embeddings_of(network)[0] is None:
            own["inputs_embeds"] = self.embeds.to(next(network.parameters()).dtype)
        elif isinstance(self.kwargs.get("input_ids"), torch.Tensor):
            own["input_ids"] = self.kwargs["input_ids"]
        else:
            raise ValueError("a shadow network with embeddings of its own needs input_ids, not inputs_embeds.")
        tensors = {key: value for key, value in own.items() if isinstance(value, torch.Tensor)}
        tensors = {key: v if len(v) == 1 else rows_of(v, rows) for key, v in tensors.items()}
        if self.caches and self.kwargs.get(self.cache_name) is None:
            self.kwargs[self.cache_name] = DynamicCache(config=self.config)
        cache = self.kwargs.get(self.cache_name)
        if cache is not None:
            tensors[self.cache_name] = beside(cache, name, network.config)
        return first_output(network(**tensors, use_cache=cache is not None))


def stack_of(model: nn.Module) -> str:
    """The name of the transformer that holds a model's blocks."""
    return find_blocks(model)[0].key.rpartition(".")[0].rpartition(".")[0]


def loss_of(logits: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Cross entropy of a language model (labels ``[batch, tokens]``) or of a classifier's last token (``[batch]``)."""
    if labels.dim() > 1:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    return F.cross_entropy(last_of(logits, attention_mask).float(), labels)


def last_of(values: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Of ``[batch, tokens, n]`` the last token of each row that is no padding, ``[batch, n]``."""
    mask = torch.ones(values.shape[:2], device=values.device) if attention_mask is None else attention_mask
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
    return values[torch.arange(len(values), device=values.device), last]


# --- its cache, kept with that of the base model ------------------------------------------------------------------

FOLLOWED = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
"""What generation does to a cache, and so to those beside it."""


def beside(cache: Any, name: str, config: Any) -> Any:
    """The cache that belongs to ``name``, kept with ``cache``; an empty one at first.

    Args:
        config: of the network that fills it.

    Raises:
        ValueError: if ``cache`` was filled while there was none for ``name``.
    """
    from transformers import DynamicCache

    others = cache.__dict__.setdefault("_beside", {})
    if name not in others:
        if cache.get_seq_length() > 0:
            raise ValueError(f"the cache was filled without adapter {name!r}; start with an empty one.")
        for method in FOLLOWED:
            own = getattr(cache, method, None)
            if own is not None and not others:  # the first one wraps them for all
                setattr(cache, method, partial(_all, own, others, method))
        others[name] = DynamicCache(config=config)
    return others[name]


def _all(own: Any, others: dict[str, Any], method: str, *args: Any, **kwargs: Any) -> Any:
    for other in others.values():
        getattr(other, method)(*args, **kwargs)
    return own(*args, **kwargs)
