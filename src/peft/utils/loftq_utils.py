"""The names of LoftQ at the path at which others import them."""

from peft._lazy import also_known
from peft.compat.helpers import _loftq_init_new as _loftq_init_new
from peft.tuners.lora.loftq import loftq_init
from peft.tuners.lora.requantised import replace_lora_weights_loftq


__all__ = ["loftq_init", "replace_lora_weights_loftq"]


also_known(__name__)
