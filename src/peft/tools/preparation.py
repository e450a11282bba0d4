"""Helpers around models: preparing a base for training, finding modules, devices and dtypes, sharding policies."""

from __future__ import annotations

import difflib
import inspect
import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peft.compat.integrations import get_bnb_param_type
from peft.core.model.walk import layers_of
from peft.errors import PeftWarning
from peft.options import value_of


# ---- Preparing a base model -----------------------------------------------------------------------------------------


def _quantization_method(model: nn.Module) -> str | None:
    """The library that has quantised the model (`"bitsandbytes"`, `"gptq"`, ...), or None."""
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        return "bitsandbytes"
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(value_of(method))


def get_quantization_config(model: nn.Module, method: str) -> Any | None:
    """``model.config.quantization_config`` if ``method`` has quantised the model, else None."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def _has_input_grad_hook(model: nn.Module) -> bool:
    """Whether transformers' ``enable_input_require_grads`` is in effect (some versions call it by themselves)."""
    handles = getattr(model, "_require_grads_hooks", None) or ()
    return any(handle.id in (handle.hooks_dict_ref() or ()) for handle in handles)


def _enable_input_grads(model: nn.Module) -> None:
    """Let the embeddings' output require gradients: a reentrant checkpoint gives none to what is in it otherwise."""
    if hasattr(model, "enable_input_require_grads"):
        if not _has_input_grad_hook(model):
            model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def _enable_checkpointing(model: nn.Module, kwargs: dict[str, Any] | None) -> None:
    # transformers 5 has renamed the method; models of other origin have the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    if enable is None:
        raise TypeError(
            f"{type(model).__name__} has no gradient_checkpointing_enable(); pass use_gradient_checkpointing=False"
        )
    if not kwargs:
        enable()
    elif inspect.signature(enable).parameters:
        enable(kwargs)
    else:
        warnings.warn(
            f"gradient_checkpointing_kwargs are ignored: {type(model).__name__}.{enable.__name__}() takes none",
            PeftWarning,
            stacklevel=3,
        )
        enable()


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a quantised base ready to carry adapters that are trained, as QLoRA does (arXiv 2305.14314).

    Freezes all parameters. Those kept in 16 bits (norms, embeddings, head) become float32, unless a library other than
    bitsandbytes has quantised the model, whose kernels expect their inputs as they are. For a quantised model,
    gradient checkpointing is switched on. Call it before adapters are added.

    Args:
        model: the base, changed in place. A base that is not quantised is frozen and cast only.
        use_gradient_checkpointing: whether to checkpoint a quantised base.
        gradient_checkpointing_kwargs: handed to ``torch.utils.checkpoint``. Checkpoints are taken as reentrant unless
            this says ``use_reentrant=False``; for reentrant ones the model's inputs are made to require gradients.
        auto_clear_cache: hand the accelerator's memory that the cast has set free back to the device.

    Returns:
        ``model``.

    Raises:
        TypeError: if checkpointing is asked for and the model has no method to switch it on.

    Examples:
        >>> base = prepare_model_for_kbit_training(base)  # loaded with BitsAndBytesConfig(load_in_4bit=True)
        >>> model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    """
    method = _quantization_method(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if method in (None, "bitsandbytes"):
        for parameter in model.parameters():
            # A 4-bit weight may be stored as a 16-bit one, and is none.
            if parameter.dtype in (torch.float16, torch.bfloat16) and not get_bnb_param_type(parameter):
                parameter.data = parameter.data.float()
        if auto_clear_cache:
            _clear_device_cache()
    if method is not None and use_gradient_checkpointing:
        _enable_checkpointing(model, gradient_checkpointing_kwargs)
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
            _enable_input_grads(model)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to ``dtype`` and trainable ones to float32, in place.

    For training in mixed precision, where gradients are scaled and their parameters must be float32. Quantised
    parameters, which are of no floating dtype, are left alone.

    Examples:
        >>> cast_mixed_precision_params(model, torch.bfloat16)
        >>> {p.dtype for p in model.parameters() if not p.requires_grad}
        {torch.bfloat16}
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not get_bnb_param_type(parameter):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


# ---- Finding modules ------------------------------------------------------------------------------------------------


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module at the dotted path ``key``, the module, and its name within the parent.

    Raises:
        AttributeError: if there is no such module; it names the part of the path that is missing.
    """
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether the dotted path ``key`` is ``target_key``, or ends with it on a dot."""
    return key == target_key or key.endswith("." + target_key)


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The dotted path of ``model.get_input_embeddings()``, or ``default`` if the model has none."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return default
    return next((name for name, module in model.named_modules() if module is embeddings), default)


# ---- Tensors and devices --------------------------------------------------------------------------------------------


def _get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    """The number of rows of whichever input is given; ``input_ids`` if both are.

    Raises:
        ValueError: if neither is.
    """
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ValueError("Either input_ids or inputs_embeds must be given")
    return given.shape[0]


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The weight ``[out, in]`` of a layer that keeps it ``[in, out]`` (``fan_in_fan_out``), and the other way round.

    A parameter stays a parameter, on the same memory.
    """
    if not fan_in_fan_out:
        return weight
    if isinstance(weight, nn.Parameter):
        return nn.Parameter(weight.data.T, requires_grad=weight.requires_grad)
    return weight.T


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """Device, identity and size in bytes of the memory behind a tensor; equal for tensors that share it."""
    storage = tensor.untyped_storage()
    # All memory on the meta device is at address 0; there the storage object itself tells them apart.
    return tensor.device, storage._cdata if tensor.is_meta else storage.data_ptr(), storage.nbytes()


def infer_device() -> str:
    """The accelerator that torch can use here, one of `"cuda"`, `"mps"`, `"xpu"`, `"npu"`, `"mlu"`; else `"cpu"`."""
    if torch.backends.mps.is_available():
        return "mps"
    for name in ("cuda", "xpu", "npu", "mlu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            return name
    return "cpu"


def _clear_device_cache() -> None:
    empty_cache = getattr(getattr(torch, infer_device(), None), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


# ---- Sharding -------------------------------------------------------------------------------------------------------


def _transformer_layer_classes(model: nn.Module) -> set[type[nn.Module]]:
    """The classes to shard as units: from ``FSDP_TRANSFORMER_CLS_TO_WRAP``, else what the model says not to split."""
    present = {type(module).__name__: type(module) for module in model.modules()}
    asked = [name.strip() for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name.strip()]
    unknown = [name for name in asked if name not in present]
    if unknown:
        close = difflib.get_close_matches(unknown[0], present, n=3, cutoff=0.5)
        raise ValueError(
            f"FSDP_TRANSFORMER_CLS_TO_WRAP names {unknown[0]!r}, but no module of the model is of such a class. "
            f"Close matches: {', '.join(close) or 'none'}"
        )
    if not asked:
        asked = [name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()]
    return {present[name] for name in asked if name in present}


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """An ``auto_wrap_policy`` of FSDP for a model with adapters.

    FSDP flattens the parameters of a unit into one tensor, which is trained whole or not at all
    (``use_orig_params=False``). So besides the transformer layers, every leaf module that is frozen beside adapters is
    a unit of its own, which leaves the adapters, and nothing else, in the unit of their transformer layer: they are
    read and not called, and FSDP gathers a unit only when it is called. Other leaf modules with a trainable weight
    are units.

    Args:
        model: the model with its adapters. The classes of transformer layers are the ``_no_split_modules`` of the
            model and its parts, or those that the environment variable ``FSDP_TRANSFORMER_CLS_TO_WRAP`` lists, with
            commas between them.

    Raises:
        ValueError: if the environment variable names a class that the model does not have.
    """
    layer_classes = tuple(_transformer_layer_classes(model))
    adapted = [layer for _, layer in layers_of(model)]
    within = {id(m) for layer in adapted for m in layer.modules() if layer.adapters}
    shared = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        if recurse:
            return True
        if isinstance(module, layer_classes):
            return True
        own = [p for p in module._parameters.values() if p is not None]
        if next(module.children(), None) is not None or not own:
            return False
        if not any(p.requires_grad for p in own):
            return bool(adapted) and all(shared[id(p)] == 1 for p in own)
        return id(module) not in within and own[0] is getattr(module, "weight", None)

    return policy
