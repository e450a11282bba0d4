"""Compacter: bottleneck adapters whose W_down and W_up are W^T = sum_i R_i (x) (L_i Q_i), sums of Kronecker products.

The R_i, the rule, are small and the same in the whole model; L_i and Q_i, of rank 1 or little more, are of each matrix
(Mahabadi, Henderson and Ruder 2021, arXiv 2106.04647).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import option
from peft.core.adapter import part, shared
from peft.core.blocks.insertion import InsertTuner
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.tuners.bottleneck_config import NetworkFields
from peft.tuners.bottleneck_utils import Bottleneck, Networks, Pair


_COMMON = {"reduction_factor": 32, "non_linearity": "gelu"}
PRESETS: dict[str, dict[str, Any]] = {
    "compacter": {**_COMMON, "mh_adapter": True},
    "compacter++": {**_COMMON, "original_ln_before": True},
}
"""Name of a preset -> the fields that it sets; those given besides it win."""


@dataclass
class CompacterConfig(NetworkFields):
    """Config of Compacter. Fields left out have the values of the preset.

    For small adapters with a non-linear update, on encoders and translation models: a matrix takes as many numbers as
    it has rows and columns together, so BERT's adapters have a thirtieth of Houlsby's parameters. It cannot be merged.
    """

    METHOD: ClassVar[str] = "COMPACTER"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    preset: str = option(
        "compacter",
        "Where the other fields start: 'compacter' (after the attention and after the feed-forward network) or "
        "'compacter++' (after the feed-forward network).",
        choices=PRESETS,
    )
    phm_dim: int = option(
        4,
        "n, the number of Kronecker products in a matrix. It divides the width and that of the bottleneck.",
        minimum=1,
    )
    phm_rank: int = option(1, "Rank k of the second factors L_i Q_i.", minimum=1)
    factorized_phm_W: bool = option(True, "Train L_i and Q_i; otherwise the second factors whole.")
    shared_phm_rule: bool = option(True, "One rule for all matrices of the model; otherwise each has its own.")
    factorized_phm_rule: bool = option(False, "Make each R_i of the rule as a product of a column and a row.")
    phm_bias: bool = option(True, "Train biases.")
    phm_init_range: float = option(
        None,
        "Standard deviation of the rule at its start (of its columns and rows, where it is made of them); by default "
        "0.0001 for a shared one and 0.01 for those of single matrices. The other factors start at Xavier's, from a "
        "normal distribution.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phm_init_range is None:
            self.phm_init_range = 1e-4 if self.shared_phm_rule else 1e-2


def phm_matrix(rule: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """W ``[out, in]``, the transpose of sum_i R_i (x) W_i.

    Args:
        rule: the R_i ``[n, n, n]``. factors: the W_i ``[n, in / n, out / n]``.
    """
    blocks = torch.einsum("iab,ipq->bqap", rule, factors)  # out in n blocks of out / n, in likewise
    return blocks.flatten(2).flatten(0, 1)


def new_rule(config: CompacterConfig) -> nn.ParameterDict:
    """The R_i ``[n, n, n]``, or columns ``[n, n, 1]`` and rows ``[n, 1, n]`` that make them."""
    n = config.phm_dim
    shapes = {"left": (n, n, 1), "right": (n, 1, n)} if config.factorized_phm_rule else {"rule": (n, n, n)}
    drawn = {name: torch.empty(shape).normal_(0, config.phm_init_range) for name, shape in shapes.items()}
    return nn.ParameterDict({name: nn.Parameter(value) for name, value in drawn.items()})


def rule_of(held: nn.ParameterDict) -> torch.Tensor:
    """The R_i, ``[n, n, n]``."""
    return held["left"] @ held["right"] if "left" in held else held["rule"]


class Phm(nn.Module):
    """What a matrix ``[outer, inner]`` is made of: W_i ``[n, inner / n, outer / n]`` or its factors, and its bias."""

    def __init__(self, config: CompacterConfig, inner: int, outer: int) -> None:
        super().__init__()
        n, k = config.phm_dim, config.phm_rank
        if inner % n or outer % n:
            raise ConfigError(
                f"CompacterConfig: phm_dim={n} does not divide both {inner} and {outer}, the widths of the hidden "
                "states and of the bottleneck. Choose another reduction_factor, or a divisor of both."
            )
        sizes = {"W": (n, inner // n, outer // n)}
        if config.factorized_phm_W:
            sizes = {"W_left": (n, inner // n, k), "W_right": (n, k, outer // n)}
        for name, size in sizes.items():
            values = torch.empty(size)
            for each in values:  # each factor is drawn like a matrix of its own
                nn.init.xavier_normal_(each)
            self.register_parameter(name, nn.Parameter(values))
        self.bias = nn.Parameter(torch.zeros(outer)) if config.phm_bias else None
        self.rule = None if config.shared_phm_rule else new_rule(config)

    def matrix(self, common: nn.ParameterDict) -> torch.Tensor:
        """W ``[outer, inner]``; ``common`` holds the rule of the model, if there is one."""
        factors = self.W if "W" in self._parameters else self.W_left @ self.W_right
        return phm_matrix(rule_of(common if self.rule is None else self.rule), factors)


class PhmBottleneck(Bottleneck):
    """A bottleneck whose matrices are made of a rule and factors."""

    def projection(self, inner: int, outer: int) -> nn.Module:
        return Phm(self.config, inner, outer)

    def pair(self, projection: Any, *shared: Any) -> Pair:
        return projection.matrix(*shared), projection.bias


class Compacter(Networks):
    """One bottleneck for each kind of sub-layer that the config names; the rule is ``[n, n, n]``."""

    compacter_attention, compacter_cross = part(nn.ModuleDict), part(nn.ModuleDict)
    compacter_feedforward = part(nn.ModuleDict)
    compacter_rule = shared()
    stem: ClassVar[str] = "compacter"
    network: ClassVar[type[Bottleneck]] = PhmBottleneck

    @classmethod
    def share(cls, config: CompacterConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        """The rule of the model; empty where each matrix has its own."""
        return {"compacter_rule": new_rule(config) if config.shared_phm_rule else nn.ParameterDict()}

    def in_common(self) -> tuple[Any, ...]:
        return (self.compacter_rule,)


CompacterModel = define_tuner(Compacter, CompacterConfig, base=InsertTuner)
