"""Conveniences around adapted models: scales for a while, signatures as the base model shows them, and checks."""

from __future__ import annotations

import inspect
import json
import math
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any

from torch import nn

from peft._lazy import also_known
from peft.core.files.entries import anatomy
from peft.core.files.io import CONFIG_NAME, locate
from peft.core.layer.weight import taken_out
from peft.core.model.walk import layers_of
from peft.meanwhile import having
from peft.tools.condition_numbers import KappaTuneSelector as KappaTuneSelector
from peft.tools.condition_numbers import find_kappa_target_modules as find_kappa_target_modules
from peft.tuners.lora.model import LoraTuner
from peft.tuners.lora.norm_cache import DoraCaching as DoraCaching
from peft.tuners.lora.surgery import spectral_surgery as spectral_surgery


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """A context in which the adapters act ``multiplier`` times as strongly; afterwards their scales are as before.

    Args:
        model: a :class:`PeftModel`, or any module with adapters of a method that has a scale (LoRA and its relatives).

    Raises:
        TypeError: if ``multiplier`` is no number.
        ValueError: if it is not finite, or the model has no adapters with a scale, or some that are merged (a merged
            adapter's scale is part of the weight).
    """
    if not isinstance(multiplier, Real):
        raise TypeError(f"multiplier should be a number, got {multiplier!r}, a {type(multiplier).__name__}.")
    if not math.isfinite(multiplier):
        raise ValueError(f"multiplier should be finite, got {multiplier!r}.")
    layers = [layer for _, layer in layers_of(anatomy(model)[0]) if "scaling" in layer.adapter_cls.settings]
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no adapters with a scale; only LoRA and its relatives have one."
        )
    if any(layer.merged for layer in layers):
        raise ValueError("adapters are merged into the base weights, scale and all; call unmerge_adapter() first.")
    before = [layer.scaling for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):  # a dict of its own: others may hold the old one
            layer.scaling = {name: value * multiplier for name, value in scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            with taken_out([layer]):  # what was merged meanwhile, by the scale by which it went in
                for name in scaling.keys() - set(layer.adapter_names):  # gone, or come, within the context
                    del scaling[name]
                scaling.update({name: value for name, value in layer.scaling.items() if name not in scaling})
                layer.scaling = scaling


def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> AbstractContextManager[None]:
    """A context in which adapters take their input as it is, instead of in their own dtype.

    For models whose hooks change dtypes by themselves, such as diffusers' layerwise casting.

    Args:
        model: any module with adapters; without any, nothing happens.
        active: False makes the context do nothing.
    """
    layers = [layer for _, layer in layers_of(anatomy(model)[0])] if active else []
    return having(layers, cast_input_dtype_enabled=False)


def update_forward_signature(model: nn.Module) -> None:
    """Let ``model.forward`` show the parameters and docstring of the base model's, if it shows none of its own."""
    _show_base_method(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Let ``model.generate`` show the parameters and docstring of the base model's, if it shows none of its own."""
    _show_base_method(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Let a :class:`PeftModel` show the base model's parameters in ``forward``, ``generate``, or both ("all").

    Raises:
        ValueError: for another method.
    """
    choices = {"forward": ("forward",), "generate": ("generate",), "all": ("forward", "generate")}
    if method not in choices:
        raise ValueError(f"method should be one of {', '.join(map(repr, choices))}, got {method!r}.")
    for name in choices[method]:
        _show_base_method(model, name)


def _show_base_method(model: nn.Module, name: str) -> None:
    shown = getattr(model, name, None)
    origin = getattr(model.get_base_model(), name, None)  # type: ignore[operator]
    if shown is None or origin is None or name not in dir(type(model)):
        return
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.kind not in variadic for p in inspect.signature(shown).parameters.values()):
        return
    method = _stand_in(name)
    signature = inspect.signature(origin)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    rest = [
        p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) if p.kind is inspect.Parameter.POSITIONAL_ONLY else p
        for p in signature.parameters.values()
    ]
    method.__signature__ = signature.replace(parameters=[me, *rest])  # type: ignore[attr-defined]
    method.__doc__, method.__name__ = origin.__doc__, name
    object.__setattr__(model, name, types.MethodType(method, model))


def _stand_in(name: str) -> Callable[..., Any]:
    """A method of one object that calls the method of its class: it carries a signature of its own."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self), name)(self, *args, **kwargs)

    return method


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder, or a repository on the hub, holds an adapter; False also where it cannot be reached."""
    try:
        with open(locate(model_name_or_path, CONFIG_NAME), encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "peft_type" in values


class _PenaltyTrainerMixin:
    """For ``Trainer`` and its subclasses: the loss of a training step gets what the model's adapters add to it."""

    penalty = ""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The trainer's loss; in training, with the penalty of the active adapters.

        Args:
            inputs: a batch. return_outputs: whether the model's outputs are returned beside the loss.
        """
        trainer: Any = super()
        loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            found = [getattr(m, self.penalty)() for m in model.modules() if isinstance(m, LoraTuner)]
            whole = kwargs.get("num_items_in_batch") is not None and getattr(self, "model_accepts_loss_kwargs", False)
            steps = getattr(self, "current_gradient_accumulation_steps", 1) if whole else 1
            loss = loss + sum(found) / steps  # such a loss is that of one part of a step, and the parts are summed
        return (loss, outputs) if return_outputs else loss


class MontecloraTrainerMixin(_PenaltyTrainerMixin):
    """Adds MonteCLoRA's divergence from its priors to the loss (arXiv 2411.04358).

    Example:
        >>> class MyTrainer(MontecloraTrainerMixin, Trainer): ...
    """

    penalty = "_get_monteclora_loss"


class KasaTrainerMixin(_PenaltyTrainerMixin):
    """Adds KaSA's penalty, on large singular values and on factors that are not orthogonal, to the loss
    (arXiv 2412.06071).

    Example:
        >>> class MyTrainer(KasaTrainerMixin, Trainer): ...
    """

    penalty = "_get_kasa_loss"


also_known(__name__)
