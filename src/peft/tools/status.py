"""What state a model's adapters are in: one record for each layer, one for the model, and counts of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from peft.core.files.entries import anatomy, configs_of, tuner_of
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.auxiliary import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from peft.core.model.walk import join, wrappers_of
from peft.errors import NoAdaptedLayersError


IRREGULAR: Literal["irregular"] = "irregular"


@dataclass
class TunerLayerStatus:
    """One adapted layer.

    Attributes:
        name: its path in the model (``model.`` in front where a tuner is around it).
        module_type: method and class, ``"lora.Linear"``, as a printed model has it.
        enabled: whether its adapters are switched on.
        active_adapters: those that are switched on in the layer, some of which may have no parts here.
        merged_adapters: those that are in the base weight now.
        requires_grad: adapter -> whether all its tensors here train; "irregular" where only some do.
        available_adapters: all adapters with parts here, sorted.
        devices: adapter -> the devices of its tensors, sorted.
        quantization_backend: the library that keeps the base weight quantised, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All adapters of a model; a field on which its layers differ is "irregular".

    Attributes:
        base_model_type: class of the base model; "other" where no tuner is around it and it is not of transformers.
        adapter_model_type: class of the tuner, or "None".
        peft_types: adapter -> method.
        trainable_params: parameters that train now. total_params: all of them.
        num_adapter_layers: number of adapted layers and auxiliary wrappers.

    The other fields are those of :class:`TunerLayerStatus`.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None | Literal["irregular"]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a model, shared ones once.

    Packed and sharded parameters count with the number of weights that they stand for.
    """
    trainable = total = 0
    for p in model.parameters():
        count = weights_of(p)
        total += count
        trainable += count if p.requires_grad else 0
    return trainable, total


def weights_of(p: torch.Tensor) -> int:
    """How many weights a parameter stands for: bitsandbytes packs two in a 4-bit byte, DeepSpeed keeps a shard."""
    sharded = getattr(p, "ds_numel", None)
    count = p.numel() or sharded or 0  # DeepSpeed leaves nothing in a sharded one
    if type(p).__name__ != "Params4bit":
        return count
    stored = getattr(p, "quant_storage", None) or p.dtype
    return count * 2 * stored.itemsize  # two weights in a byte


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """One record for each adapted layer and each auxiliary wrapper of a model, in the order of ``named_modules``.

    Args:
        model: a :class:`PeftModel`, or any module with adapters.

    Raises:
        NoAdaptedLayersError: if it holds no adapters; a ValueError and a TypeError.

    Examples:
        >>> first = get_layer_status(model)[0]
        >>> first.name, first.module_type, first.active_adapters
        ('model.model.layers.0.self_attn.q_proj', 'lora.Linear', ['default'])
    """
    return [_layer_status(name, layer) for name, layer in _adapted(model)]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """One record for all adapters of a model; fields on which its layers differ are "irregular".

    A layer counts for an adapter only where it holds parts of it.

    Raises:
        NoAdaptedLayersError: if the model holds no adapters; a ValueError and a TypeError.

    Examples:
        >>> status = get_model_status(model)
        >>> status.enabled, status.peft_types, status.num_adapter_layers
        (True, {'default': 'LORA'}, 4)
    """
    tuner = tuner_of(model)
    layers = [layer for _, layer in _adapted(model)]
    statuses = [_layer_status("", layer) for layer in layers]
    names = sorted({name for status in statuses for name in status.available_adapters})
    trainable, total = count_parameters(model)
    named = tuner or hasattr(model, "_hf_peft_config_loaded")  # transformers' models manage adapters by themselves
    merged = sorted({name for status in statuses for name in status.merged_adapters})
    evenly_merged = all(
        set(layer.merged_adapters) == {name for name in merged if name in layer}
        for layer in layers
        if isinstance(layer, BaseTunerLayer)
    )
    return TunerModelStatus(
        base_model_type=type(tuner.model if tuner else model).__name__ if named else "other",
        adapter_model_type=type(tuner).__name__ if tuner else "None",
        peft_types={name: c.method_name for name, c in tuner.peft_config.items()} if tuner else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(status.enabled for status in statuses),
        active_adapters=_common(list(layer._active_adapter) for layer in layers),
        merged_adapters=merged if evenly_merged else IRREGULAR,
        requires_grad={
            name: _common(status.requires_grad[name] for status in statuses if name in status.requires_grad)
            for name in names
        },
        available_adapters=names,
        devices={name: sorted({d for status in statuses for d in status.devices.get(name, ())}) for name in names},
        quantization_backend=_common(
            status.quantization_backend
            for layer, status in zip(layers, statuses, strict=True)
            if isinstance(layer, BaseTunerLayer) or len(layers) == 1
        ),
    )


def _adapted(model: nn.Module) -> list[tuple[str, BaseTunerLayer | AuxiliaryTrainingWrapper]]:
    """The modules that hold adapters, with their paths; of a wrapper of tokens, the layer in it."""
    prefix = "model" if tuner_of(model) else ""
    found = []
    for path, wrapper in wrappers_of(anatomy(model)[0]):
        if isinstance(wrapper, TrainableTokensWrapper):
            path, wrapper = join(path, "token_adapter"), wrapper.token_adapter
        found.append((f"{prefix}.{path}" if prefix and path else prefix or path, wrapper))
    if not found:
        config = next(iter(configs_of(model).values()), None)
        reason = " Prompt learning adapts no layers." if getattr(config, "is_prompt_learning", False) else ""
        raise NoAdaptedLayersError(
            f"No adapter layers found in this {type(model).__name__}.{reason} Give it adapters with get_peft_model or "
            "inject_adapter_in_model."
        )
    return found


def _layer_status(name: str, layer: BaseTunerLayer | AuxiliaryTrainingWrapper) -> TunerLayerStatus:
    names = sorted(layer.adapter_names)
    tensors = {adapter: list(layer.adapter_parameters(adapter)) for adapter in names}
    tuner_layer = isinstance(layer, BaseTunerLayer)
    return TunerLayerStatus(
        name=name,
        module_type=layer._get_name(),
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=list(layer.merged_adapters) if tuner_layer else [],
        requires_grad={adapter: _common((p.requires_grad for p in tensors[adapter]), False) for adapter in names},
        available_adapters=names,
        devices={adapter: sorted({str(p.device) for p in tensors[adapter]}) for adapter in names},
        quantization_backend=layer.storage.name if tuner_layer and not layer.kind.whole else None,
    )


def _common(values: Iterable[Any], empty: Any = None) -> Any:
    """The value that all have, "irregular" if they differ, ``empty`` if there are none."""
    found: Iterator[Any] = iter(values)
    first = next(found, empty)
    return first if all(value == first for value in found) else IRREGULAR
