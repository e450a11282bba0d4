"""Keys and values that stand before those of the text, in whatever cache a model of transformers uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from peft.core.model.gradient_checkpointing import FUNCTION, switched_on
from peft.core.model.sequence import ARGUMENTS
from peft.meanwhile import having


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


def name_of(model: nn.Module) -> str:
    """What a model calls the cache among its arguments."""
    return str(cache_argument(receiver_of(model).forward))


def new_cache(model: nn.Module, max_cache_len: int | None = None) -> Any:
    """An empty cache, as transformers makes it for this model: one that grows, or of a fixed length."""
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    config = model.config.get_text_config(decoder=True)
    fixed = max_cache_len is not None
    cache = StaticCache(config=config, max_cache_len=max_cache_len) if fixed else DynamicCache(config=config)
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if model.config.is_encoder_decoder else cache


def fill(whole: Any, prefix: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """An empty cache with keys and values ``[batch, heads, tokens, width]`` of each layer put into it."""
    cache = getattr(whole, "self_attention_cache", whole)
    for i, (keys, values) in enumerate(prefix):
        if i >= len(cache.layers) and cache.layer_class_to_replicate is None:
            break  # the last layers of some models reuse the cache of earlier ones
        if i < len(cache.layers) and not hasattr(cache.layers[i], "update"):
            continue  # a layer without attention
        cache.update(keys, values, i)
    return whole


def freeze(cache: Any) -> Any:
    """Let the cache answer with what it holds before the text's keys and values, and keep nothing of them.

    What runs twice, as under gradient checkpointing, then gets the same both times.
    """
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        layer.update = partial(_without_trace, layer)
    if (other := getattr(cache, "cross_attention_cache", None)) is not None:
        other.update = lambda keys, values, *args, **kwargs: (keys, values)
        cache.is_updated = _Forgetful()
    return cache


class _Forgetful(dict):
    """Which layers have put the encoder's keys into the cache: none, ever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _without_trace(layer: Any, *args: Any, **kwargs: Any) -> Any:
    before = dict(vars(layer))
    try:
        return type(layer).update(layer, *args, **kwargs)
    finally:
        vars(layer).clear()
        vars(layer).update(before)


@contextmanager
def kept_by_checkpoints(model: nn.Module) -> Iterator[None]:
    """A context in which checkpointed layers keep the cache that they are given, which transformers takes from them.

    Their own checkpointing is off meanwhile, and their forward is checkpointed here with all of its arguments.
    """
    layers = checkpointed_layers(model)
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    for layer, function in layers.items():
        layer.__dict__["forward"] = partial(_checkpoint, function, layer, layer.forward)
    try:
        with having(switched_on(model), gradient_checkpointing=False):
            yield
    finally:
        for layer, forward in before.items():
            layer.__dict__.pop("forward")
            if forward is not None:
                layer.__dict__["forward"] = forward


def checkpointed_layers(model: nn.Module) -> dict[nn.Module, Callable]:
    """The layers that are run again in the backward pass, with the function that does so.

    A layer checkpoints itself; in older models the stack does so with the layers in its lists.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    switched = {m: getattr(m, FUNCTION) for m in switched_on(model) if m.training and hasattr(m, FUNCTION)}
    layers = {m: function for m, function in switched.items() if isinstance(m, GradientCheckpointingLayer)}
    lists = ((x, function) for m, function in switched.items() for x in m.children() if isinstance(x, nn.ModuleList))
    return layers or {layer: function for several, function in lists for layer in several}


def _checkpoint(function: Any, layer: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if isinstance(function, partial) and function.keywords.get("use_reentrant", True):
        # The reentrant form gives gradients to its positional arguments alone, and a prefix is none of them.
        function = partial(function.func, *function.args, **{**function.keywords, "use_reentrant": False})
    return function(partial(_run, layer, forward, **kwargs), *args)


def _run(layer: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward, all of whose arguments reach the modules in it."""
    with having(switched_on(layer), gradient_checkpointing=False):
        return forward(*args, **kwargs)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether layers will be run again in the backward pass of the next call."""
    return torch.is_grad_enabled() and any(m.training for m in switched_on(model))
