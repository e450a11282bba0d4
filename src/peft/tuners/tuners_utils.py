"""The names by which the ecosystem imports the core."""

from peft.core.layer import BaseTunerLayer, check_adapters_to_merge
from peft.core.operations import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peft.core.replicate import clone_module, replicate_layers
from peft.core.targeting import selected as check_target_module_exists
from peft.core.tuner import BaseTuner


__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "clone_module",
    "delete_adapter",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
]
