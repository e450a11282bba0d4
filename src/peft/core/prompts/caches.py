"""Keys and values that stand before those of the text, in whatever cache a model of transformers uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


ARGUMENTS = ("cache", "past_key_values", "past_key_value")
"""What releases of transformers call the cache among the arguments of a forward."""


def cache_argument(function: Callable) -> str | None:
    """The name of the argument by which a forward takes a cache; None if it takes none."""
    parameters = inspect.signature(function).parameters
    return next((name for name in ARGUMENTS if name in parameters), None)


def receiver_of(model: nn.Module) -> nn.Module:
    """The module that takes the cache: the model, or the stack of layers under a task's head.

    Raises:
        ValueError: if there is none.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for module in (model, getattr(model, prefix, None) if prefix else None):
        if isinstance(module, nn.Module) and cache_argument(module.forward):
            return module
    raise ValueError(
        f"{type(model).__name__} takes no cache of keys and values, so its attention layers cannot be given a prefix. "
        "Use a method that puts virtual tokens before the text, or a method that adapts weights."
    )


def new_cache(model: nn.Module, max_cache_len: int | None = None) -> Any:
    """An empty cache, as transformers makes it for this model: one that grows, or of a fixed length."""
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    config = model.config.get_text_config(decoder=True)
    fixed = max_cache_len is not None
    cache = StaticCache(config=config, max_cache_len=max_cache_len) if fixed else DynamicCache(config=config)
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if model.config.is_encoder_decoder else cache


def fill(cache: Any, prefix: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put keys and values ``[batch, heads, tokens, width]`` of each layer into an empty cache."""
    cache = getattr(cache, "self_attention_cache", cache)
    for i, (keys, values) in enumerate(prefix):
        if i >= len(cache.layers) and cache.layer_class_to_replicate is None:
            break  # the last layers of some models reuse the cache of earlier ones
        if i < len(cache.layers) and not hasattr(cache.layers[i], "update"):
            continue  # a layer without attention
        cache.update(keys, values, i)


def length_of(cache: Any) -> int:
    """How many tokens a cache holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def freeze(cache: Any) -> Any:
    """Let the cache answer with what it holds before the text's keys and values, and keep nothing of them.

    What runs twice, as under gradient checkpointing, then gets the same both times.
    """
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        layer.update = partial(_without_trace, layer)
    return cache


def _without_trace(layer: Any, *args: Any, **kwargs: Any) -> Any:
    before = dict(vars(layer))
    try:
        return type(layer).update(layer, *args, **kwargs)
    finally:
        vars(layer).clear()
        vars(layer).update(before)


def self_attentions(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that read the cache of one layer; of an encoder-decoder, those of the decoder."""
    found = []
    stack = model.get_decoder() if model.config.is_encoder_decoder else model
    for module in stack.modules():
        if hasattr(module, "layer_idx") and cache_argument(module.forward):
            inner = [m for m in module.modules() if m is not module and hasattr(m, "layer_idx")]
            if not any(cache_argument(m.forward) for m in inner):
                found.append(module)
    return found


class Checkpointed:
    """Brings a cache past gradient checkpointing, which takes it from the layers, to the attention modules in them.

    Each checkpointed piece carries the cache of its own call, in the forward as in the recomputation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.cache: Any = None
        self.hooks = [
            m.register_forward_pre_hook(self.give, with_kwargs=True)
            for m in self_attentions(model)
            if not getattr(m, "is_cross_attention", False)
        ]

    def give(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hook of an attention module: hand it the cache, unless it attends to another sequence."""
        crossing = any(kwargs.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))
        if self.cache is None or crossing:
            return args, kwargs
        name = str(cache_argument(module.forward))
        bound = inspect.signature(module.forward).bind_partial(*args)
        if name in bound.arguments:
            bound.arguments[name] = self.cache
            return bound.args, {**kwargs, **bound.kwargs}
        return args, {**kwargs, name: self.cache}

    @contextmanager
    def carrying(self, cache: Any) -> Iterator[None]:
        """A context in which attention modules get this cache."""
        before, self.cache = self.cache, cache
        try:
            yield
        finally:
            self.cache = before

    def run(self, cache: Any, piece: Callable, *args: Any) -> Any:
        """A checkpointed piece of the forward, with its cache."""
        with self.carrying(cache):
            return piece(*args)

    @contextmanager
    def call(self, model: nn.Module, cache: Any) -> Iterator[None]:
        """A context in which the checkpointed layers of a model take a cache along."""
        switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and _function(m)]
        before = [_function(m) for m in switched]
        for module, function in zip(switched, before, strict=True):
            module._gradient_checkpointing_func = partial(self._checkpoint, function, cache)
        try:
            yield
        finally:
            for module, function in zip(switched, before, strict=True):
                module._gradient_checkpointing_func = function

    def _checkpoint(self, function: Callable, cache: Any, piece: Callable, *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "keywords", {}).get("use_reentrant", True) and isinstance(function, partial):
            # The reentrant form gives gradients to its positional arguments alone, and a prefix is none of them.
            function = partial(function.func, *function.args, **{**function.keywords, "use_reentrant": False})
        return function(partial(self.run, cache, piece), *args, **kwargs)

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()


def _function(module: nn.Module) -> Any:
    return getattr(module, "_gradient_checkpointing_func", None)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether layers will be run again in the backward pass of the next call."""
    return torch.is_grad_enabled() and any(
        getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules()
    )
