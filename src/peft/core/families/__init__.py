"""The families of weight methods: what a method gives, and what follows from it for every operation."""

from peft.core.families.delta import (
    Delta,
    LowRank,
    Scaled,
    ScaledBy,
    Sparse,
    by_number,
    kernel_weight,
    padded,
    weight_to_add_to,
)
from peft.core.families.fold import Fold, Shift
from peft.core.families.output import Output, Scale
from peft.core.families.rotation import Rotation
from peft.core.families.sample import Sample
from peft.core.families.whole import Copy, Rows


__all__ = [
    "Copy",
    "Delta",
    "Fold",
    "LowRank",
    "Output",
    "Rotation",
    "Rows",
    "Sample",
    "Scale",
    "Scaled",
    "ScaledBy",
    "Shift",
    "Sparse",
    "by_number",
    "kernel_weight",
    "padded",
    "weight_to_add_to",
]
