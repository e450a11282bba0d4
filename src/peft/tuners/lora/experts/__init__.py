"""Adapters of mixture-of-experts models whose experts became one parameter.

Since version 5, transformers keeps the experts of a layer in stacked parameters (``experts.gate_up_proj``
[experts, 2 * width, in]) where earlier versions had a module each (``experts.0.w1``, ``experts.0.w3``). Its weight
conversions say which modules went where; from them follows what a LoRA made for the modules is for the parameter:

- the pairs of all experts are stacked, and those of modules that were concatenated become one pair of the summed
  rank, A = [A1; A3], B = diag(B1, B3), so that B A = [B1 A1; B3 A3];
- the scale must stay what it was, so alpha grows with the rank.
"""

from __future__ import annotations

from peft.tuners.lora.experts.configs import convert_config_for, convert_peft_config_for_transformers
from peft.tuners.lora.experts.files import build_peft_weight_mapping, convert_peft_adapter_state_dict_for_transformers
from peft.tuners.lora.experts.operations import FlattenDims, PeftConcatenate, PermuteDims


__all__ = [
    "FlattenDims",
    "PeftConcatenate",
    "PermuteDims",
    "build_peft_weight_mapping",
    "convert_config_for",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]
