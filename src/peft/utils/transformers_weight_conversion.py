"""Conversion of adapters for models of transformers, under the names by which the ecosystem imports it."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft._lazy import lazy_module
from peft.tuners.lora.experts import (
    FlattenDims,
    PeftConcatenate,
    PermuteDims,
    build_peft_weight_mapping,
    convert_config_for,
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)


__all__ = [
    "FlattenDims",
    "PeftConcatenate",
    "PermuteDims",
    "build_peft_weight_mapping",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]


def _convert_peft_config_moe(peft_config: Any, model: nn.Module) -> None:
    """:func:`convert_config_for`, as third parties know it (unsloth)."""
    convert_config_for(model, peft_config)


# By the name under which others import it from here.
__getattr__ = lazy_module(__name__, {"transformers.conversion_mapping": ("get_model_conversion_mapping",)})[0]
