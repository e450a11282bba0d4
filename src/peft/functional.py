"""The operations on adapters that work on any module, with or without a :class:`PeftModel` around it."""

from peft.core.files.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.model.operations import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peft.mapping import inject_adapter_in_model


__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
