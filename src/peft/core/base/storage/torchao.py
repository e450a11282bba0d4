"""torchao: a tensor subclass in an ordinary ``nn.Linear`` holds W = scale * (q - zero)."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import nn

from peft.core.base.storage.quantized import Quantized, is_from


_ROUNDED_INPUTS = ("act_quant_kwargs", "activation_quantization")
"""Attributes of torchao's tensor classes that are set where inputs are quantised too."""


class TorchAO(Quantized):
    """Any weight that is a tensor class of torchao and has ``dequantize``."""

    name = "torchao"
    fresh_output = True

    def matches(self, m: nn.Module, attribute: str) -> bool:
        weight = getattr(m, attribute, None)
        return isinstance(weight, torch.Tensor) and is_from(weight, "torchao") and hasattr(weight, "dequantize")

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        return getattr(m, attribute).detach().dequantize()

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        new = self._quantize(getattr(m, attribute), value.contiguous())
        setattr(m, attribute, nn.Parameter(new, requires_grad=False))

    def compute_dtype(self, m: nn.Module, attribute: str) -> torch.dtype | None:
        return getattr(m, attribute).dtype

    def keep_differentiable(self, m: nn.Module) -> None:
        """Nothing can be undone here: a product with rounded inputs has no gradient, and torchao does not say so."""
        weight: Any = m.weight
        if any(getattr(weight, name, None) for name in _ROUNDED_INPUTS):
            warnings.warn(
                f"torchao multiplies weights kept as {type(weight).__name__} with inputs that it rounds in each call, "
                "and passes no gradient through that product: adapters below such a layer get none of what comes "
                "through it. To train, quantise the weights alone (Int8WeightOnlyConfig, IntxWeightOnlyConfig ...).",
                stacklevel=2,
            )

    def _quantize(self, old: Any, value: torch.Tensor) -> torch.Tensor:
        """The value in the format of the old weight, whose class makes it (``from_hp``) from the same options."""
        make = getattr(type(old), "from_hp", None)
        options: dict[str, Any] = {}
        # All but the first, which is the value.
        for name, parameter in list(inspect.signature(make).parameters.items())[1:] if make else ():
            if name == "granularity":
                granularity = self.library("torchao.quantization.granularity")
                whole = list(old.block_size) == list(old.shape)
                options[name] = granularity.PerTensor() if whole else granularity.PerRow()
            elif name == "mapping_type":
                kinds = self.library("torchao.quantization.quant_primitives").MappingType
                symmetric = old.zero_point is None or not bool(old.zero_point.any())
                options[name] = kinds.SYMMETRIC if symmetric else kinds.ASYMMETRIC
            elif name in _attributes(type(old)):
                options[name] = getattr(old, name)
            elif parameter.default is parameter.empty:
                make = None
                break
        if make is None:
            raise ValueError(
                f"torchao cannot quantise a weight anew as {type(old).__name__}, so nothing can be merged into it. "
                "Call merge_and_unload(dequantize=True) for a dense merged layer."
            )
        return make(value.to(old.dtype), **options)


def _attributes(cls: Any) -> list[str]:
    """The options of a tensor class, without the tensors (scales ...) that follow from the value."""
    lists = (getattr(cls, name, None) for name in ("tensor_attribute_names", "optional_tensor_attribute_names"))
    return [name for names in lists for name in names or ()]
