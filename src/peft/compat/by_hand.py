"""Layers that others make by hand: ``lora.Linear(base, "default", config, r=8, lora_alpha=16)``."""

from __future__ import annotations

import dataclasses
from typing import Any


# What constructors of 0.21 take behind the config, in their order, by method.
BEHIND_CONFIG = {
    "adalora": ("r", "lora_alpha"),
    "c3a": ("block_size",),
    "deft": ("r",),
    "delora": ("r", "delora_lambda"),
    "fourierft": ("n_frequency",),
    "hira": ("r",),
    "hra": ("r",),
    "ia3": ("is_feedforward",),
    "loha": ("r", "alpha"),
    "lora": ("r", "lora_alpha"),
    "miss": ("r",),
    "oft": ("r",),
    "osf": ("effective_rank",),
    "waveft": ("n_frequency",),
}


def with_given(layer_cls: type, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A config with the values that stand beside it where a layer is made by hand; those that are no fields are left.

    Raises:
        TypeError: there is no config, or more values than the method's layers take.
    """
    if isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise TypeError(f"{layer_cls.__name__} takes a config after the adapter's name, got {config!r}.")
    method = layer_cls.__module__.partition("peft.tuners.")[2].partition(".")[0]
    names = BEHIND_CONFIG.get(method, ())
    if len(args) > len(names):
        raise TypeError(f"{layer_cls.__name__} takes ({', '.join(names)}) after the config, got {args!r}.")
    given = {**dict(zip(names, args)), **kwargs}
    if method == "adalora" and "r" in given:
        given["init_r"] = given.pop("r")
    if (feedforward := given.pop("is_feedforward", None)) is not None:
        given["feedforward_modules"] = ".*" if feedforward else []
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    changes = {name: value for name, value in given.items() if name in fields}
    patterns = {"r": "rank_pattern", "lora_alpha": "alpha_pattern", "alpha": "alpha_pattern"}
    changes |= {patterns[name]: {} for name in patterns if name in changes and patterns[name] in fields}
    known: Any = config
    return dataclasses.replace(known, **changes) if changes else config
