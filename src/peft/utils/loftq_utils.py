"""The names of LoftQ at the path at which others import them."""

from peft.tuners.lora.loftq import loftq_init
from peft.tuners.lora.requantised import replace_lora_weights_loftq


__all__ = ["loftq_init", "replace_lora_weights_loftq"]
