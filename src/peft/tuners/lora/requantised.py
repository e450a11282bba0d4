"""LoftQ after quantisation: LoRA takes up what the codes of its base have lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from peft.core.base.storage.quantized import Quantized
from peft.core.layer.classes import is_own
from peft.core.layer.weight import unmerged_weight
from peft.core.model.operations import require_adapters
from peft.core.model.walk import layers_of
from peft.errors import MissingFileError
from peft.kernels.decompositions import halves, svd
from peft.tools.shards import SINGLE, Shards
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraTuner


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Fit the LoRA of a model with a quantised base to what quantisation has taken from its weights, layer by layer.

    Args:
        peft_model: a :class:`PeftModel` with LoRA on quantised linear layers whose weights can be read.
        model_path: the unquantised model's safetensors file, its folder, or its name on the hub; by default the
            folder or name that the base was loaded from.
        adapter_name: which adapter.
        callback: called as ``callback(model, module_name)`` after each layer; what it returns false for is put back.

    Raises:
        ValueError: if the model is no LoRA model, or has no such layer with this adapter. An adapter that is not there
            is a KeyError as well.
        FileNotFoundError: if the unquantised weights are not found as safetensors.
        KeyError: if they lack a layer's weight.
    """
    tuner: Any = getattr(peft_model, "base_model", None)
    if not isinstance(tuner, LoraTuner):
        raise ValueError(f"LoftQ fits LoRA, and this is {type(tuner or peft_model).__name__} without it.")
    require_adapters(tuner.model, [adapter_name])
    source = model_path or getattr(getattr(tuner.model, "config", None), "_name_or_path", None)
    if not source:
        raise ValueError("the base does not say where it was loaded from: give the unquantised weights as model_path.")
    shards = _shards(source)
    layers = [(name, layer) for name, layer in layers_of(tuner.model) if _has_lost(layer) and adapter_name in layer]
    if not layers:
        raise ValueError(
            f"no quantised linear layer whose weight can be read has an adapter {adapter_name!r}. Load the base "
            "quantised, such as with BitsAndBytesConfig(load_in_4bit=True), or use init_lora_weights='loftq' on a "
            "dense one."
        )
    prefix = getattr(tuner.model, "base_model_prefix", "")
    for name, layer in layers:
        full = _dense(shards, f"{name}.weight", prefix).to(layer.lora_A[adapter_name].weight.device).float()
        lora: Any = layer.adapters[adapter_name]
        pair = lora.held_pair()
        before = [t.detach().clone() for t in pair]
        lost = full - unmerged_weight(layer).float()  # by quantisation
        fitted = halves(*svd(lost), layer.r[adapter_name])
        for old, new, factor in zip(pair, fitted, (1.0, 1 / layer.scaling[adapter_name])):
            old.copy_(new * factor)
        if callback is not None and not callback(peft_model, name):
            for tensor, value in zip(pair, before):
                tensor.copy_(value)
            logging.getLogger(__name__).info("LoftQ: the callback kept %s as it was", name)


def _has_lost(layer: Any) -> bool:
    """Whether LoRA adapts a linear layer whose quantised weight can be read."""
    matrix = is_own(layer, LoraLayer) and layer.kind.matrix
    return matrix and isinstance(layer.storage, Quantized) and layer.storage.can_read


def _shards(source: str) -> Shards:
    """The model's files in a folder, or on the hub."""
    if not Path(source).exists():
        try:
            source = cached_file(source, SINGLE, _raise_exceptions_for_missing_entries=False) or source
        except OSError as error:
            raise MissingFileError(f"the unquantised weights {source!r} were not found: {error}") from error
    return Shards(source)


def _dense(shards: Shards, name: str, prefix: str) -> torch.Tensor:
    """A weight by its name in the model, with or without the prefix of its inner model."""
    for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if key in shards.entries:
            return shards[key]
    files = ", ".join(dict.fromkeys(entry.file for entry in shards.entries.values()))
    raise KeyError(f"{name} is not among the tensors of {files}")
