"""The variants of LoRA, in the order in which they wrap each other when several are combined: the outermost first."""

from __future__ import annotations

from peft.core.layer.classes import check_names
from peft.tuners.lora.alora import ALora
from peft.tuners.lora.arrow import Arrow
from peft.tuners.lora.dora import Dora
from peft.tuners.lora.layer import Lora, LoraLayer


VARIANTS: tuple[type[Lora], ...] = (ALora, Dora, Arrow)

for variant in VARIANTS:
    check_names(variant, LoraLayer)
Lora.variants[:] = VARIANTS
