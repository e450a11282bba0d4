"""Biases that merging gives to layers without one: a saved model keeps those that its architecture declares."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from peft.core.layer import weight as weights
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.walk import layers_of, locate, walk
from peft.errors import UndeclaredBiasError, some


def new_biases(model: nn.Module, adapter_names: list[str] | None) -> set[str]:
    """Names of the layers that have no bias, and will have one once these adapters are merged."""
    return {
        layer.key
        for _, layer in layers_of(model)
        if not layer.adapter_cls.any_module and weights.base_bias(layer) is None and _shifted(layer, adapter_names)
    }


@torch.no_grad()
def _shifted(layer: BaseTunerLayer, adapter_names: list[str] | None) -> bool:
    names = [*layer.merged_adapters, *layer.to_merge(adapter_names)]
    adapters = [layer.adapters[name] for name in names]
    return bool(names) and weights.folded_bias(layer, adapters) is not None


def declare_biases(model: nn.Module, keys: set[str]) -> dict[str, bool]:
    """The switches of a transformers config (``attention_bias``, say) that give these layers a bias; none for others.

    Raises:
        ValueError: if the model is saved by its config and no switch of that declares the bias of all these layers:
            the saved model would be loaded without.
    """
    config: Any = getattr(model, "config", None)
    if not keys or not hasattr(model, "save_pretrained") or not hasattr(config, "to_dict"):
        return {}
    chosen, left = {}, set(keys)
    for name in [name for name, value in vars(config).items() if value is False and "bias" in name]:
        if found := left & _with_bias(model, {name: True}):
            chosen[name] = True
            left -= found
    if left:
        raise UndeclaredBiasError(
            f"merging gives {some(left, 3)} a bias that the "
            f"architecture of {type(model).__name__} does not have, so the merged model would be loaded without it "
            "once it is saved. Keep the adapter beside the model (merge_adapter() merges in memory), or pass "
            "undeclared_biases=True to merge all the same."
        )
    return chosen


def _with_bias(model: nn.Module, switches: dict[str, bool]) -> set[str]:
    """Names of the layers that have a bias in a model of this class with these switches in its config."""
    config = copy.deepcopy(model.config)
    for name, value in switches.items():
        setattr(config, name, value)
    try:
        with torch.device("meta"):
            twin = type(model)(config)
    except Exception:  # a switch that this model does not work with
        return set()
    return {site.key for site in walk(twin) if site.module._parameters.get("bias") is not None}


@torch.no_grad()
def set_declared(model: nn.Module, switches: dict[str, bool]) -> None:
    """Turn the switches on; layers that have a bias by them, and got none, have one of zeros."""
    config: Any = getattr(model, "config", None)
    for key in _with_bias(model, switches) if switches else ():
        module = locate(model, key).module
        if module._parameters.get("bias") is None and isinstance(
            weight := module._parameters.get("weight"), nn.Parameter
        ):
            module.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
    for name, value in switches.items():
        setattr(config, name, value)
