"""The variants of LoRA, in the order in which they wrap each other when several are combined: the outermost first."""

from __future__ import annotations

from peft.core.layer.classes import check_names
from peft.tuners.lora.dora import Dora
from peft.tuners.lora.kasa import Kasa
from peft.tuners.lora.layer import Lora, LoraLayer
from peft.tuners.lora.mica import Mica


VARIANTS: tuple[type[Lora], ...] = (Dora, Kasa, Mica)

for variant in VARIANTS:
    check_names(variant, LoraLayer)
Lora.variants[:] = VARIANTS
