"""LoRA with a gate for each sample: y' = y + g(x) B A drop(x) (UniPELT, arXiv 2110.07577)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from peft.core.adapter import part
from peft.core.base.kinds import Kind
from peft.core.gates import Gate
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.initialize import rewrites
from peft.tuners.lora.layer import Lora


class Gated(Lora):
    """y' = y + g(x) B A drop(x) with g(x) of the sample from :class:`Gate`, in the place of s = lora_alpha / r.

    ``set_scale`` multiplies by a factor besides, which is 1 at first.
    """

    option: ClassVar[str] = "use_gating"
    lora_gate = part(nn.ModuleDict)
    ties: ClassVar[bool] = False
    excludes: ClassVar[dict[str, str]] = {
        "Dora": "DoRA divides by the norm of one adapted weight, and with a gate each sample has another one",
        "Arrow": "an Arrow router weighs its experts, and has no update of its own that a gate could weigh",
        "ALora": "a gate is a mean over all tokens of a row, and before its invocation aLoRA is the base model",
    }

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if kind.lookup:
            return "a gate (use_gating) reads features, and an embedding's input is indices"
        if kind.read_elsewhere:
            return (
                "its weight is read by another computation, and a gate (use_gating) depends on the sample, so there "
                "is no weight to give"
            )
        if rewrites(config.init_lora_weights):
            return (
                f"a gate (use_gating) weighs B A, so what init_lora_weights={config.init_lora_weights!r} takes out of "
                "the weight would not come back"
            )
        return None

    def create(self, config: LoraConfig, key: str) -> None:
        super().create(config, key)
        self.lora_gate = Gate(self.in_features)

    def initial_scaling(self) -> float:
        return 1.0

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return y + self.lora_gate.apply_to(self.delta(x), self.kind.channels_last(x), self.context)

    def unmergeable(self) -> str | None:
        return "its gate depends on the sample, so no one weight equals it. Keep the adapter unmerged."
