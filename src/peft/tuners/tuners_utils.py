"""The names by which the ecosystem imports the core."""

from __future__ import annotations

import torch
from torch import nn

from peft.core.layer.layer import BaseTunerLayer, check_adapters_to_merge
from peft.core.model.operations import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peft.core.model.replicate import clone_module, replicate_layers
from peft.core.model.targeting import selected as check_target_module_exists
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import walk
from peft.core.prompts import VirtualTokens as BasePromptEncoder


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """Which modules the adapter's config means: ``{"matched": names, "unmatched": names}`` of the unadapted model."""
    config = tuner.peft_config[adapter_name]
    names: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for site in walk(tuner.model):
        matched = bool(config.target_modules) and check_target_module_exists(config, site.key)
        names["matched" if matched else "unmatched"].append(site.key)
    return names


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The name under which ``model`` holds a module; "" if it does not."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> dict[str, torch.device]:
    """The devices of a model's parameters: ``{"": device}`` if there is one, else one entry for each module."""
    found = {
        name: next(module.parameters(recurse=False)).device
        for name, module in model.named_modules()
        if module._parameters and any(p is not None for p in module._parameters.values())
    }
    devices = set(found.values())
    return {"": devices.pop()} if len(devices) == 1 else found


__all__ = [
    "BasePromptEncoder",
    "BaseTuner",
    "BaseTunerLayer",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "clone_module",
    "delete_adapter",
    "find_parameter_name_by_module",
    "get_device_map",
    "inspect_matched_modules",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
]
