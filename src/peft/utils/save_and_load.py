"""State dicts of adapters, under the names by which the ecosystem imports them."""

from peft._lazy import also_known
from peft.compat.helpers import _find_mismatched_keys as _find_mismatched_keys
from peft.compat.helpers import _insert_adapter_name_into_state_dict as _insert_adapter_name_into_state_dict
from peft.compat.helpers import _maybe_shard_state_dict_for_tp as _maybe_shard_state_dict_for_tp
from peft.compat.helpers import get_embedding_layer_name, has_valid_embedding_base_layer
from peft.core.files.io import load_peft_weights, torch_load
from peft.core.files.state_dict import LoadResult, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tools.base_state import get_base_model_state_dict, set_base_model_state_dict


__all__ = [
    "LoadResult",
    "get_base_model_state_dict",
    "get_embedding_layer_name",
    "get_peft_model_state_dict",
    "has_valid_embedding_base_layer",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "torch_load",
]


also_known(__name__)
