"""Conversion of adapters for models of transformers, under the names by which the ecosystem imports it."""

from __future__ import annotations

from peft._lazy import lazy_module
from peft.tuners.lora.experts import (
    FlattenDims,
    PeftConcatenate,
    PermuteDims,
    build_peft_weight_mapping,
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from peft.tuners.lora.experts.configs import _convert_peft_config_moe as _convert_peft_config_moe


__all__ = [
    "FlattenDims",
    "PeftConcatenate",
    "PermuteDims",
    "build_peft_weight_mapping",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]


# By the name under which others import it from here.
__getattr__ = lazy_module(__name__, {"transformers.conversion_mapping": ("get_model_conversion_mapping",)})[0]
