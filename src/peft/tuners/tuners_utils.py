"""The names by which the ecosystem imports the core."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft._lazy import also_known
from peft.core.base.kinds import kind_of
from peft.core.layer.layer import BaseTunerLayer, check_adapters_to_merge
from peft.core.model.operations import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peft.core.model.replicate import clone_module, replicate_layers
from peft.core.model.targeting import all_linear, matches, means_all_linear
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


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """A context in which what accelerate has offloaded of an adapted layer is on the device that computes it.

    What is changed in the base layer meanwhile, by merging say, is kept when it goes back. Layers that are not
    offloaded are left alone.
    """
    hooks = [
        (module, hook)
        for module in layer.modules()
        for hook in _align_hooks(getattr(module, "_hf_hook", None))
        if hook.offload
    ]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            for name, value in module.state_dict().items() if hook.weights_map is not None else ():
                _put_back(hook.weights_map, name, value)
            hook.post_forward(module, torch.tensor([]))


def _align_hooks(hook: Any) -> list[Any]:
    """accelerate's hooks that move weights, out of one hook or a sequence of them."""
    found = getattr(hook, "hooks", [hook])
    return [h for h in found if type(h).__name__ == "AlignDevicesHook"]


def _put_back(weights_map: Any, name: str, value: torch.Tensor) -> None:
    """Store a changed tensor where accelerate takes it from."""
    prefix, dataset = getattr(weights_map, "prefix", ""), getattr(weights_map, "dataset", weights_map)
    if f"{prefix}{name}" not in dataset or value.is_meta:
        return
    store = getattr(dataset, "state_dict", dataset)  # what comes from a disk is looked up in memory first
    store[f"{prefix}{name}"] = value.detach().cpu()
    keys = getattr(dataset, "all_keys", None)
    if keys is not None and f"{prefix}{name}" not in keys:
        keys.append(f"{prefix}{name}")


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """A config with ``target_modules="all-linear"`` names the linear layers of the model."""
    if means_all_linear(peft_config.target_modules):
        peft_config.target_modules = all_linear(model, peft_config.task_type)
    return peft_config


def _find_minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """Ends of names, as short as they can be, that mean the targets and none of the others. diffusers' tools call it.

    Raises:
        ValueError: if there is no target, or one is empty.
    """
    targets, others = sorted(target_modules), list(other_module_names)
    if not targets or isinstance(target_modules, str):
        raise ValueError("target_modules should be a list or set of names, with one at least.")
    if "" in targets:
        raise ValueError("target_modules should not have an empty name.")
    found: set[str] = set()
    for target in targets:
        parts = target.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        if not any(matches([end], target) for end in found):
            found.add(next((e for e in ends if not any(matches([e], o) for o in others)), target))
    return found


def _get_in_out_features(module: nn.Module) -> tuple[int, int] | tuple[None, None]:
    """Features of a layer's input and output, ``(None, None)`` for what is no layer."""
    kind = kind_of(module)
    return (None, None) if kind is None else kind.sizes(module)


class _ExcludedModule:
    """What says that a module is excluded by its config: false in a test."""

    def __bool__(self) -> bool:
        return False


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
    "onload_layer",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
]


also_known(__name__)
