"""The variants of LoRA, in the order in which they wrap each other when several are combined: the outermost first."""

from __future__ import annotations

from peft.core.layer.classes import check_names
from peft.tuners.lora.alora import ALora
from peft.tuners.lora.arrow import Arrow
from peft.tuners.lora.bdlora import BdLora
from peft.tuners.lora.dora import Dora
from peft.tuners.lora.gated import Gated
from peft.tuners.lora.kasa import Kasa
from peft.tuners.lora.layer import Lora, LoraLayer
from peft.tuners.lora.mica import Mica
from peft.tuners.lora.monteclora import MonteCLora
from peft.tuners.lora.qalora import QaLora
from peft.tuners.lora.velora import VeLora


VARIANTS: tuple[type[Lora], ...] = (
    ALora,
    Dora,
    Gated,
    Arrow,
    Kasa,
    VeLora,
    MonteCLora,
    BdLora,
    QaLora,
    Mica,
)

for variant in VARIANTS:
    check_names(variant, LoraLayer)
Lora.variants[:] = VARIANTS
