"""What adapters need to know about other libraries: quantised weights, sharded weights, devices, empty initialisation.

No library is imported here for the sake of asking about it: a model that uses one has imported it already, so it is
looked up in ``sys.modules``.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from peft.core.base.storage import storage_of
from peft.core.base.storage.bitsandbytes import BitsAndBytes4bit, of_rows
from peft.meanwhile import having


# ---- Quantised weights ----------------------------------------------------------------------------------------------


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """How bitsandbytes has quantised the parameter, or False if it has not."""
    kinds: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}
    return next((kinds[cls.__name__] for cls in type(param).__mro__ if cls.__name__ in kinds), False)


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """The weight of a module as a dense parameter, in the module's layout; the same object if it is dense already.

    Raises:
        AttributeError: if the module has no weight.
        TypeError: if its weight cannot be read dense.
    """
    storage = storage_of(module, "weight")
    if storage.name is None:
        return cast(nn.Parameter, module.weight)
    if not storage.can_read:
        raise TypeError(f"The weight of {type(module).__name__}, kept by {storage.name}, cannot be read dense")
    return nn.Parameter(storage.read(module, "weight"), requires_grad=False)


def dequantize_bnb_weight(weight: nn.Parameter, state: Any | None = None) -> torch.Tensor:
    """A weight quantised by bitsandbytes as a dense tensor; any other weight as it is.

    Args:
        weight: the parameter.
        state: what holds the row scales ``SCB`` of an 8-bit weight; by default the weight itself.

    Raises:
        TypeError: if ``weight`` is no parameter.
    """
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"The weight must be a torch.nn.Parameter, got {type(weight).__name__}")
    kind = get_bnb_param_type(weight)
    if not kind:
        return weight
    quantized: Any = weight
    if kind == "4bit":
        return BitsAndBytes4bit().of_blocks(quantized.data, quantized.quant_state)
    scales = getattr(state, "SCB", None)
    return of_rows(weight.data, quantized.SCB if scales is None else scales)


# ---- Sharded weights ------------------------------------------------------------------------------------------------


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers runs under DeepSpeed ZeRO-3, which shards every parameter."""
    integration = sys.modules.get("transformers.integrations.deepspeed")
    return integration is not None and integration.is_deepspeed_zero3_enabled()


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Within, parameters sharded by DeepSpeed ZeRO-3 are whole. Without DeepSpeed it does nothing.

    Args:
        param: one or several parameters.
        modifier_rank: whose changes are handed to the other ranks on leaving; None if none are made.
        fwd_module: the module whose forward uses them, if they are shared with others.
    """
    gather: Any = nullcontext()
    if check_deepspeed_zero3_enabled():
        import deepspeed

        gather = deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module)
    with gather:
        yield


@dataclass
class TpInfo:
    """How a base model is split by tensor parallelism.

    Attributes:
        tp_plan: name of a module -> how its weight is split ("colwise", "rowwise", ...).
        device_mesh: a ``torch.distributed.DeviceMesh``. tp_size: over how many ranks.
    """

    tp_plan: dict[str, str]
    device_mesh: Any
    tp_size: int


def dtensor_from_local_like(local_tensor: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor as a ``DTensor`` placed as ``ref`` is; as it is, if ``ref`` is no ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(ref, module.DTensor):
        return local_tensor
    return module.DTensor.from_local(local_tensor, ref.device_mesh, ref.placements, run_check=False)


# ---- Initialisation without memory ----------------------------------------------------------------------------------

# Where new tensors go, and how modules take parameters, outside of `init_empty_weights`; empty outside of it.
_outside: list[tuple[torch.device, Any]] = []


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """accelerate's context of that name: modules get their parameters on the meta device, without memory and values.

    Args:
        include_buffers: also every other tensor. By default what ``ACCELERATE_INIT_INCLUDE_BUFFERS`` says, else no.
    """
    from accelerate import init_empty_weights as empty

    _outside.append((torch.empty(0).device, nn.Module.register_parameter))
    try:
        with empty(include_buffers):
            yield
    finally:
        _outside.pop()


def skip_init_on_device(func: Callable) -> Callable:
    """A function that creates its tensors with memory and values even within :func:`init_empty_weights`."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not _outside:
            return func(*args, **kwargs)
        device, register = _outside[0]
        with torch.device(device), having([nn.Module], register_parameter=register):
            return func(*args, **kwargs)

    return wrapper


# ---- Layers over several devices ------------------------------------------------------------------------------------


def get_layer_device_map(model: Any) -> dict[int, int | str] | None:
    """Index of a layer -> the device that computes it, or None if the model is not spread over devices.

    Read from the ``hf_device_map`` that ``device_map="auto"`` leaves on a model. A layer kept on the CPU or on disk is
    computed on the first device of the map that is neither.

    Raises:
        RuntimeError: if the map has devices for some layers only.
    """
    device_map = getattr(model, "hf_device_map", None)
    if not device_map:
        return None
    main = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
    text_config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    count = text_config.num_hidden_layers
    devices: dict[int, int | str] = {}
    for name, device in device_map.items():
        device = main if device in ("cpu", "disk") else device
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        if name == "":
            devices = dict.fromkeys(range(count), device)
        elif number:
            devices[int(number.group(1))] = device
    for index in range(count):
        if index not in devices:
            raise RuntimeError(f"The device map places no layer {index} of {count}; its keys are {sorted(device_map)}")
    return devices


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Move the keys and values of every layer in a transformers cache to the device that computes the layer.

    Args:
        model: a model of transformers; nothing happens if it is not spread over devices.
        cache: a ``Cache``, changed in place. Of an ``EncoderDecoderCache``, the decoder's own keys and values.
    """
    devices = get_layer_device_map(model)
    if devices is None:
        return
    layers = getattr(cache, "self_attention_cache", cache).layers
    for index, layer in enumerate(layers):
        for name in ("keys", "values"):
            if isinstance(getattr(layer, name, None), torch.Tensor):
                setattr(layer, name, getattr(layer, name).to(devices[index]))
