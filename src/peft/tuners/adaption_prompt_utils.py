"""Reaching into an attention: the queries, keys and values as the model makes them, positions and groups included."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from threading import RLock
from typing import Any

import torch
from torch import nn

from peft.core.blocks.blocks import signature_of


_EXCHANGING = RLock()  # one thread at a time: all of them see the config that is exchanged for a call
REGISTERED = "peft|watched"  # the name under which transformers finds `_watched`

# What an attention function is called with, and what it gives: outputs [batch, tokens, heads, features], weights.
AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def _source(module: nn.Module) -> Callable:
    return _unwrapped(type(module).forward)


_unwrapped = functools.cache(inspect.unwrap)  # asked several times in each call


def can_watch(module: nn.Module) -> bool:
    """Whether an attention computes by the functions that transformers lets one exchange (eager, sdpa, ...)."""
    names = _source(module).__globals__  # the file of the model imports the table so
    return "ALL_ATTENTION_FUNCTIONS" in names and hasattr(module, "config")


class _Watched:
    """The config of an attention for one call: as it is, but for the name of the attention function."""

    def __init__(self, config: Any, attend: AttentionFunction) -> None:
        self._config, self._attend = config, attend
        self._attn_implementation = REGISTERED

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _watched(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return module.config._attend(module, *args, **kwargs)


@functools.cache
def _register() -> None:
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(REGISTERED, _watched)


def watched(module: nn.Module, around: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """``module(*args, **kwargs)`` with ``around(attend, module, query, key, value, mask, **options)`` in the place of
    the model's attention function, which is handed over as ``attend``.

    Queries ``[batch, heads, tokens, features]`` have their positions, keys and values come from the cache.
    """
    _register()
    with nullcontext() if torch.compiler.is_compiling() else _EXCHANGING:
        config, names = module.config, _source(module).__globals__
        attend = names["ALL_ATTENTION_FUNCTIONS"].get(
            config._attn_implementation, names.get("eager_attention_forward")
        )

        def call(*given: Any, **options: Any) -> Any:
            return around(attend, *given, **options)

        module.config = _Watched(config, call)
        try:
            return module(*args, **kwargs)
        finally:
            module.config = config


def keys_and_values(
    module: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[batch, groups, tokens, features]`` that an attention makes of ``x``, at no position.

    Args:
        x: ``[batch, tokens, width]``, in the place of the hidden states.
        args, kwargs: a call of the attention, which tells what a rotation looks like.
    """
    found: list[torch.Tensor] = []

    def keep(
        attend: AttentionFunction, owner: nn.Module, query: Any, key: Any, value: Any, *rest: Any, **options: Any
    ):
        found.extend((key, value))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None  # of that shape

    signature = signature_of(_source(module))
    given = signature.bind_partial(module, *args, **kwargs).arguments
    call = {name: _neutral(name, value, x) for name, value in given.items()}
    names = list(signature.parameters)
    rest = given.get("kwargs") or {}
    # Without `self` and the catch-all, of which only the positions matter.
    call = {name: value for name, value in call.items() if name not in (names[0], "kwargs")}
    call |= {name: _neutral(name, value, x) for name, value in rest.items() if name.startswith("position")}
    watched(module, keep, (), call | {names[1]: x})
    return found[0], found[1]


def _neutral(name: str, value: Any, x: torch.Tensor) -> Any:
    """An argument of an attention for tokens ``x`` that stand nowhere: no rotation, no mask, no cache."""
    if name == "position_embeddings" and isinstance(value, tuple):
        cos, sin = (v[:1, :1].expand(1, x.shape[1], *v.shape[2:]) for v in value)
        return torch.ones_like(cos), torch.zeros_like(sin)
    if name == "position_embeddings" and isinstance(value, torch.Tensor):  # complex numbers
        return torch.ones_like(value[:1, :1].expand(1, x.shape[1], *value.shape[2:]))
    if name == "position_ids" and isinstance(value, torch.Tensor):
        return torch.zeros(1, x.shape[1], dtype=value.dtype, device=value.device)
    # Flags (`use_cache`, `output_attentions`) are off; masks and caches are left out.
    return value if isinstance(value, str) else False if isinstance(value, bool) else None
