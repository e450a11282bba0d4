"""LN tuning: trained copies of the normalisation layers (Zhao et al. 2023, arXiv 2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from peft.config import ExcludeModules, ModulesToSave, TargetModules
from peft.core.adapter import part
from peft.core.families import Copy
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType


@dataclass
class LNTuningConfig(TargetModules, ExcludeModules, ModulesToSave):
    """Config of LN tuning: the target modules, of any type, are trained as copies.

    For a cheap first attempt, and beside other methods: norms hold few numbers, but act on all features.
    """

    METHOD: ClassVar[PeftType] = PeftType.LN_TUNING


class LNTuning(Copy):
    """A trained copy stands in for the module."""

    ln_tuning_layers = part(nn.ModuleDict)


LNTuningModel = define_tuner(LNTuning, LNTuningConfig, default_roles=("norm",))
