"""Bottleneck adapters: u(h) = s W_up f(W_down h) after or beside the sub-layers of each transformer block.

Sequential (Pfeiffer et al. 2020, arXiv 2005.00052; Houlsby et al. 2019, arXiv 1902.00751), parallel (He et al. 2022,
arXiv 2110.04366), and Adapter+ (Steitz and Roth 2024, arXiv 2406.06820).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import ModulesToSave, option
from peft.core.adapter import part, setting
from peft.core.blocks.blocks import ATTENTION, CROSS, FEEDFORWARD, width_of
from peft.core.blocks.insertion import Insert, InsertTuner, Joint
from peft.core.model.registry import define_tuner
from peft.tuners.bottleneck_utils import Bottleneck
from peft.utils.error import ConfigError


_COMMON: dict[str, Any] = {
    "mh_adapter": False, "output_adapter": True, "is_parallel": False, "scaling": 1.0, "init_weights": "bert",
    "residual_before_ln": True, "original_ln_before": False, "original_ln_after": True, "stochastic_depth": 0.0,
}  # fmt: skip
_PFEIFFER = {"reduction_factor": 16, "non_linearity": "relu", "original_ln_before": True}
_HOULSBY = {"reduction_factor": 16, "non_linearity": "swish", "mh_adapter": True}
_PARALLEL = {
    "reduction_factor": 2, "non_linearity": "relu", "is_parallel": True, "scaling": 4.0, "init_weights": "mam_adapter",
}  # fmt: skip
_PLUS = {
    "reduction_factor": 96, "non_linearity": "gelu", "scaling": "channel", "init_weights": "houlsby",
    "residual_before_ln": False, "original_ln_before": True, "original_ln_after": False, "stochastic_depth": 0.1,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("pfeiffer", "seq_bn"), _PFEIFFER),
    **dict.fromkeys(("houlsby", "double_seq_bn"), _HOULSBY),
    **dict.fromkeys(("parallel", "par_bn"), _PARALLEL),
    **dict.fromkeys(("scaled_parallel", "scaled_par_bn"), {**_PARALLEL, "scaling": "learned"}),
    **dict.fromkeys(("adapter_plus", "adapter+"), _PLUS),
}
"""Name of a preset -> the fields that it sets; those given besides it win."""


@dataclass
class BottleneckConfig(ModulesToSave):
    """Config of bottleneck adapters. Fields left out have the values of the preset.

    For many tasks on one encoder or translation model, where a non-linear update is wanted; it cannot be merged.
    Pfeiffer's preset is the lightest, Houlsby's has the most capacity; parallel suits generation, Adapter+ vision.
    """

    METHOD: ClassVar[str] = "BOTTLENECK"

    preset: str = option(
        "pfeiffer",
        "Where the other fields start: 'pfeiffer' (sequential, after the feed-forward network), 'houlsby' (after the "
        "attention as well), 'parallel' and 'scaled_parallel' (beside the feed-forward network), 'adapter_plus'. The "
        "names seq_bn, double_seq_bn, par_bn, scaled_par_bn and adapter+ mean the same.",
        choices=PRESETS,
    )
    mh_adapter: bool = option(None, "Put an adapter at the self-attention.")
    output_adapter: bool = option(None, "Put an adapter at the feed-forward network.")
    cross_adapter: bool = option(False, "Put an adapter at the attention of a decoder to its encoder.")
    reduction_factor: Any = option(
        None,
        "Width of the hidden states over width of the bottleneck; below 1 for wider ones. A dict has one for each "
        "numbered block, {'0': 8, 'default': 16}; blocks are counted over the whole model, an encoder's first.",
    )
    non_linearity: str = option(None, "Activation f, by the name that transformers has for it, such as 'gelu'.")
    is_parallel: bool = option(None, "Read the input of the sub-layer (beside it) instead of its output.")
    scaling: float | str = option(
        None, "Factor s: a number, 'learned' for one trained number, or 'channel' for one a feature; trained from 1."
    )
    use_gating: bool = option(
        False, "Multiply by a gate for each sample, the mean over tokens of sigmoid(w h + b): of those of the call."
    )
    dropout: float = option(0.0, "Dropout on the adapter's output.", minimum=0, below=1)
    stochastic_depth: float = option(
        None, "Probability to leave the adapter out for a sample in training.", minimum=0, below=1
    )
    init_weights: str = option(
        None,
        "Start of W_down and W_up: 'bert' (both N(0, 0.02^2)), 'mam_adapter' (Kaiming, and zero: the identity) or "
        "'houlsby' (N(0, 0.01^2) cut off at 0.02). Biases start at zero.",
        choices=("bert", "mam_adapter", "houlsby"),
    )
    ln_before: bool = option(False, "A trained layer norm of the adapter's own before W_down.")
    ln_after: bool = option(False, "A trained layer norm of the adapter's own after W_up.")
    adapter_residual_before_ln: bool = option(False, "With ln_after: add the residual before that norm, not after.")
    original_ln_before: bool = option(
        None,
        "A sequential adapter reads N(h + x), with x the residual stream, h the sub-layer's output, and N the block's "
        "normalisation of the sum where it has one (BERT, BART); otherwise it reads h.",
    )
    original_ln_after: bool = option(
        None, "Add x, and apply N where the block has it, to the sum of h and a sequential adapter's output."
    )
    residual_before_ln: bool | str = option(
        None,
        "What is added to the output of an adapter that reads N(h + x): h (True), h + x ('post_add'), or N(h + x).",
        choices=(True, False, "post_add"),
    )
    leave_out: list[int] = option(list, "Numbers of the blocks that get no adapter.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in {**_COMMON, **PRESETS[self.preset]}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if isinstance(self.scaling, str) and self.scaling not in ("learned", "channel"):
            raise ConfigError(f"BottleneckConfig: scaling is a number, 'learned' or 'channel', not {self.scaling!r}.")
        if not isinstance(self.reduction_factor, dict):
            self.reduction_factor = {"default": self.reduction_factor}
        self.reduction_factor = {str(key): value for key, value in self.reduction_factor.items()}
        if "default" not in self.reduction_factor or min(self.reduction_factor.values()) <= 0:
            raise ConfigError(
                "BottleneckConfig: reduction_factor should be positive, and a dict of them should have a 'default': "
                f"{self.reduction_factor!r}."
            )

    def roles(self) -> list[str]:
        """The kinds of sub-layers that get an adapter."""
        wanted = {ATTENTION: self.mh_adapter, CROSS: self.cross_adapter, FEEDFORWARD: self.output_adapter}
        return [role for role, here in wanted.items() if here]


class Bottlenecks(Insert):
    """One bottleneck for each kind of sub-layer that the config names."""

    bottleneck_attention = part(nn.ModuleDict)
    bottleneck_cross = part(nn.ModuleDict)
    bottleneck_feedforward = part(nn.ModuleDict)
    joints = setting()

    def create(self, config: BottleneckConfig, key: str) -> None:
        residual = {"True": "output", "False": "normed"}.get(str(config.residual_before_ln), "sum")
        self.joints = Joint(config.is_parallel, config.original_ln_before, residual, config.original_ln_after)
        for sublayer in self.block.sublayers:
            if sublayer.role in config.roles():
                made = Bottleneck(config, width_of(self.base), self.block.index)
                setattr(self, f"bottleneck_{sublayer.role}", made)

    def joint(self, role: str) -> Joint | None:
        return None if getattr(self, f"bottleneck_{role}") is None else self.joints

    def change(self, role: str, h: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"bottleneck_{role}")(h, residual)


BottleneckModel = define_tuner(Bottlenecks, BottleneckConfig, base=InsertTuner)
