"""State dicts of adapters, under the names by which the ecosystem imports them."""

from peft.core.files.checkpoint import (
    LoadResult,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
    torch_load,
)
from peft.utils.base_state import get_base_model_state_dict, set_base_model_state_dict


__all__ = [
    "LoadResult",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "torch_load",
]
