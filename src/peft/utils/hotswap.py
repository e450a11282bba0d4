"""Hot-swapping, under the names by which the ecosystem imports it."""

from peft._lazy import also_known
from peft.tuners.lora.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]


also_known(__name__)
