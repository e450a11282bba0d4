"""From a config to its method: the registry's mappings, and injection of adapters into plain models."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import peft.tuners  # noqa: F401  registers the methods
from peft._lazy import also_known
from peft.config import PeftConfig
from peft.core.model.record import record_of
from peft.core.model.tuner import BaseTuner
from peft.errors import NotSupportedYetError, UnknownMethodError
from peft.options import value_of
from peft.peft_types import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    listed,
)
from peft.tuners.lora.experts import convert_config_for


__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "inject_adapter_in_model",
]


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that a dict of fields describes; its ``"peft_type"`` names the class.

    Raises:
        TypeError: if it is no dict.
        ValueError: if ``"peft_type"`` is missing or unknown, or a field has a bad value.

    Examples:
        >>> get_peft_config({"peft_type": "IA3", "target_modules": ["v_proj"]}).target_modules
        {'v_proj'}
    """
    if not isinstance(config_dict, dict):
        raise TypeError(f"get_peft_config takes a dict of config fields, got {type(config_dict).__name__}.")
    if config_dict.get("peft_type") is None:
        raise UnknownMethodError(
            f"the dict has no 'peft_type', which says what it configures; it can be one of "
            f"{listed(PEFT_TYPE_TO_TUNER_MAPPING)}."
        )
    return PeftConfig.from_peft_type(**config_dict)


def check_config(peft_config: Any) -> None:
    """Make sure that this is a config, of a method that there is.

    Raises:
        TypeError: if it is something else, such as a dict.
        ValueError: if its method is not registered, in which case the message lists those that are, or is not that of
            its class.
    """
    if isinstance(peft_config, dict):
        raise TypeError(
            "peft_config should be a PeftConfig such as LoraConfig, got a dict. Turn it into one with "
            "get_peft_config(config_dict)."
        )
    if not isinstance(peft_config, PeftConfig):
        got = peft_config.__name__ + ", a class" if isinstance(peft_config, type) else type(peft_config).__name__
        raise TypeError(f"peft_config should be an instance of a PeftConfig such as LoraConfig(...), got {got}.")
    method = peft_config.peft_type
    named = str(value_of(method))
    if method is None or method not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise NotSupportedYetError(
            f"{type(peft_config).__name__}: this version has no method for peft_type {named!r} yet. "
            f"There are {listed(PEFT_TYPE_TO_TUNER_MAPPING)}; register_peft_method adds others."
        )
    wanted = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    if not isinstance(peft_config, wanted):
        raise ValueError(
            f"{type(peft_config).__name__} has peft_type {named!r}, whose config is {wanted.__name__}: make one of "
            "those, and leave peft_type to it."
        )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Put an adapter into a model and return that model, without a :class:`PeftModel` around it.

    The model is changed in place; ``model.peft_config[adapter_name]`` is the config, with its targets settled. The
    adapter is in the dtype of the weights that it adapts: :func:`cast_adapter_dtype` widens 16 bits for training. It
    takes the place of one that has its name, with a warning.

    Args:
        low_cpu_mem_usage: leave the adapter on the meta device until a checkpoint is loaded.
        state_dict: adapt the modules for which this checkpoint has tensors, whatever the config targets. The tensors
            themselves are loaded with :func:`set_peft_model_state_dict`.
        kwargs: arguments of newer callers, which are ignored with a warning.

    Raises:
        TypeError: if ``peft_config`` is no config.
        ValueError: if the config does not fit the model, or belongs to a method that cannot be injected; the model
            is then unchanged, but that ``model.peft_config``, if there is one, has the config.

    Examples:
        >>> net = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    """
    check_config(peft_config)
    if prompt := next((member for member in peft_config.members if member.is_prompt_learning), None):
        raise ValueError(
            f"{type(prompt).__name__} cannot be injected: prompt learning changes what goes into a model, not "
            "its modules. Use get_peft_model."
        )
    if kwargs:
        warnings.warn(f"inject_adapter_in_model does not know {sorted(kwargs)}; ignored.")
    if isinstance(tuner := getattr(model, "base_model", model), BaseTuner):
        convert_config_for(tuner.model, peft_config)
        tuner.inject_further(peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        return model
    convert_config_for(model, peft_config)
    try:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type](
            model,
            peft_config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
            autocast_adapter_dtype=False,
        )
    except BaseException:
        if "peft_config" in model.__dict__:  # what clients such as diffusers look for, and remove, when they clean up
            model.peft_config.setdefault(adapter_name, peft_config)
        raise
    for attribute in record_of(tuner.model).shared.containers:
        container = tuner._modules.get(attribute)
        if container is not None:  # the tuner is gone after this: what layers share lives in the model
            tuner.model.add_module(attribute, container)
    return tuner.model


also_known(__name__)
