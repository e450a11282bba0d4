"""Bottleneck adapters: u(h) = s W_up f(W_down h) after or beside the sub-layers of each transformer block.

Sequential (Pfeiffer et al. 2020, arXiv 2005.00052; Houlsby et al. 2019, arXiv 1902.00751), parallel (He et al. 2022,
arXiv 2110.04366), and Adapter+ (Steitz and Roth 2024, arXiv 2406.06820).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from peft.config import option
from peft.core.adapter import part
from peft.core.blocks.insertion import InsertTuner
from peft.core.model.registry import define_tuner
from peft.tuners.bottleneck_config import NetworkFields
from peft.tuners.bottleneck_utils import Bottleneck, Networks


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
class BottleneckConfig(NetworkFields):
    """Config of bottleneck adapters. Fields left out have the values of the preset.

    For many tasks on one encoder or translation model, where a non-linear update is wanted; it cannot be merged.
    Pfeiffer's preset is the lightest, Houlsby's has the most capacity; parallel suits generation, Adapter+ vision.
    """

    METHOD: ClassVar[str] = "BOTTLENECK"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    preset: str = option(
        "pfeiffer",
        "Where the other fields start: 'pfeiffer' (sequential, after the feed-forward network), 'houlsby' (after the "
        "attention as well), 'parallel' and 'scaled_parallel' (beside the feed-forward network), 'adapter_plus'. The "
        "names seq_bn, double_seq_bn, par_bn, scaled_par_bn and adapter+ mean the same.",
        choices=PRESETS,
    )
    init_weights: str = option(
        None,
        "Start of W_down and W_up: 'bert' (both N(0, 0.02^2)), 'mam_adapter' (Kaiming, and zero: the identity) or "
        "'houlsby' (N(0, 0.01^2) cut off at 0.02). Biases start at zero.",
        choices=("bert", "mam_adapter", "houlsby"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = self.init_weights or "bert"


class Bottlenecks(Networks):
    """One bottleneck for each kind of sub-layer that the config names."""

    bottleneck_attention, bottleneck_cross = part(nn.ModuleDict), part(nn.ModuleDict)
    bottleneck_feedforward = part(nn.ModuleDict)
    stem: ClassVar[str] = "bottleneck"
    network: ClassVar[type[Bottleneck]] = Bottleneck


BottleneckModel = define_tuner(Bottlenecks, BottleneckConfig, base=InsertTuner)
