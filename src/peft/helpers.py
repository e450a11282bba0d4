"""Small tools around adapted models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import MethodType
from typing import Any

from torch import nn

from peft.core.walk import layers_of


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder, or a repository on the hub, holds an adapter."""
    from peft.config import PeftConfig

    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """A context in which the scales of all adapters are multiplied; they are what they were after it.

    Raises:
        TypeError: if the multiplier is no number.
        ValueError: if the model has no layers with a scale.
    """
    if not isinstance(multiplier, int | float):
        raise TypeError(f"multiplier should be a number, got {type(multiplier).__name__}.")
    layers = [layer for _, layer in layers_of(model) if isinstance(getattr(layer, "scaling", None), dict)]
    if not layers:
        raise ValueError("the model has no adapter layers with a scale, such as LoRA's.")
    before = [(layer, dict(layer.scaling)) for layer in layers]
    try:
        for layer, scaling in before:
            for name, scale in scaling.items():
                layer.scaling[name] = scale * multiplier
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """A context in which adapters take their inputs in whatever dtype they come, as layerwise casting needs."""
    layers = [layer for _, layer in layers_of(model)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.cast_input_dtype_enabled = enabled


def _take_over(model: Any, name: str, source: Callable) -> None:
    """Give a method of the model the signature and docstring of the base model's."""
    current = getattr(model, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return current(*args, **kwargs)

    method.__doc__, method.__name__ = source.__doc__, name
    parameters = list(inspect.signature(source).parameters.values())
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = inspect.Signature([own, *deepcopy(parameters)])  # type: ignore[attr-defined]
    setattr(model, name, MethodType(method, model))


def update_forward_signature(model: Any) -> None:
    """Let the model's ``forward`` show the base model's signature, as some libraries inspect it."""
    _take_over(model, "forward", model.get_base_model().forward)


def update_generate_signature(model: Any) -> None:
    """Let the model's ``generate`` show the base model's signature."""
    _take_over(model, "generate", model.get_base_model().generate)


def update_signature(model: Any, method: str = "all") -> None:
    """Let ``forward``, ``generate`` or both ("all") show the base model's signatures.

    Raises:
        ValueError: for another method.
    """
    if method not in ("all", "forward", "generate"):
        raise ValueError(f"method {method!r} is not supported; choose 'all', 'forward' or 'generate'.")
    if method in ("all", "forward"):
        update_forward_signature(model)
    if method in ("all", "generate"):
        update_generate_signature(model)
