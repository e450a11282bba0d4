"""LoftQ after quantisation: LoRA takes up what the codes of its base have lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from peft.core.base.storage.quantized import Quantized
from peft.core.layer.weight import unmerged_weight
from peft.core.model.walk import layers_of
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loftq import low_rank
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
        ValueError: if the model is no LoRA model, or has no such layer with this adapter.
        FileNotFoundError: if the unquantised weights are not found as safetensors.
        KeyError: if they lack a layer's weight.
    """
    tuner: Any = getattr(peft_model, "base_model", None)
    if not isinstance(tuner, LoraTuner):
        raise ValueError(f"LoftQ fits LoRA, and this is {type(tuner or peft_model).__name__} without it.")
    layers = [(name, layer) for name, layer in layers_of(tuner.model) if _has_lost(layer) and adapter_name in layer]
    if not layers:
        raise ValueError(
            f"no quantised linear layer whose weight can be read has an adapter {adapter_name!r}. Load the base "
            "quantised, such as with BitsAndBytesConfig(load_in_4bit=True), or use init_lora_weights='loftq' on a "
            "dense one."
        )
    prefix = getattr(tuner.model, "base_model_prefix", "")
    with _Weights(model_path or tuner.model.config._name_or_path) as weights:
        for name, layer in layers:
            full = weights.get(f"{name}.weight", prefix).to(layer.lora_A[adapter_name].weight.device).float()
            lora: Any = layer.adapters[adapter_name]
            pair = lora.held_pair()
            before = [t.detach().clone() for t in pair]
            fitted = low_rank(full - unmerged_weight(layer).float(), layer.r[adapter_name])
            for old, new, factor in zip(pair, fitted, (1.0, 1 / layer.scaling[adapter_name])):
                old.copy_(new * factor)
            if callback is not None and not callback(peft_model, name):
                for tensor, value in zip(pair, before):
                    tensor.copy_(value)
                logging.getLogger(__name__).info("LoftQ: the callback kept %s as it was", name)


def _has_lost(layer: Any) -> bool:
    """Whether LoRA adapts a linear layer whose quantised weight can be read."""
    matrix = isinstance(layer, LoraLayer) and layer.kind.matrix
    return matrix and isinstance(layer.storage, Quantized) and layer.storage.can_read


class _Weights:
    """Tensors of a model's safetensors files by name, each read when it is asked for."""

    def __init__(self, source: str) -> None:
        self.paths = _files(source)
        self._open: list[Any] = []

    def __enter__(self) -> _Weights:
        self._open = [safe_open(path, framework="pt") for path in self.paths]
        self._of = {key: file for file in self._open for key in file.keys()}  # noqa: SIM118
        return self

    def __exit__(self, *args: object) -> None:
        self._of, self._open = {}, []

    def get(self, name: str, prefix: str) -> torch.Tensor:
        for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if key in self._of:
                return self._of[key].get_tensor(key)
        raise KeyError(f"{name} is not among the tensors of {', '.join(map(str, self.paths))}")


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
    else:
        one = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        found = [Path(one)] if one else []
    if not found:
        raise FileNotFoundError(
            f"no safetensors of the unquantised model in {source!r}; give its file or folder as model_path."
        )
    return found
