"""Uni-LoRA: every entry of every A and B is one of a few trained numbers, by a random projection (2506.00799)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.families.families import LowRankLayer, input_dropout
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


@dataclass
class UniLoraConfig(TargetModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of Uni-LoRA: one short trained vector for the whole model, spread over all A and B by a fixed projection.

    For when the number of trained parameters itself has to be chosen, below what any rank of LoRA gives. A fresh
    adapter is not the identity: A and B start as random numbers, both.
    """

    METHOD: ClassVar[PeftType] = PeftType.UNILORA
    OWN_BIAS: ClassVar[str] = "unilora_only"

    r: int = option(4, "Rank of B A.", minimum=1)
    proj_seed: int = option(42, "Seed of the projection: which entry is which of the trained numbers.")
    theta_d_length: int = option(256, "How many numbers are trained, for the whole model.", minimum=1)
    unilora_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_theta_d_bound: float = option(0.02, "The trained numbers start uniform in +- this bound.", minimum=0)
    init_weights: bool = option(True, "Start as said; False starts them at 0, where their gradient is 0 as well.")
    save_indices: bool = option(
        False, "Write the projection into the file. Without, it is drawn again from proj_seed when it is loaded."
    )


class UniLoraLayer(LowRankLayer):
    """dW = B A with A and B = theta[indices] * scales, scales = 1 / sqrt(how often the number is used)."""

    weights: ClassVar[dict[str, type]] = {
        "unilora_indices_A": BufferDict,
        "unilora_indices_B": BufferDict,
        "unilora_scales_A": BufferDict,
        "unilora_scales_B": BufferDict,
    }
    settings: ClassVar[dict[str, type]] = {"r": dict, "save_indices": dict, "unilora_dropout": nn.ModuleDict}
    shared: ClassVar[tuple[str, ...]] = ("unilora_theta_d",)
    dropout: ClassVar[str] = "unilora_dropout"

    @classmethod
    def share(cls, config: UniLoraConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        """The trained numbers ``[theta_d_length]``, and the projection: each is used equally often, but for one."""
        length, bound = config.theta_d_length, config.init_theta_d_bound if config.init_weights else 0.0
        shapes = [((config.r, columns), (rows, config.r)) for rows, columns in (fan(x.shape) for x in layers)]
        sizes = [a * b for pair in shapes for a, b in pair]
        often, left = divmod(sum(sizes), length)
        random = np.random.default_rng(config.proj_seed)
        extra = random.choice(length, left, replace=False)
        chosen = np.concatenate((np.repeat(np.arange(length), often), extra))
        random.shuffle(chosen)
        indices = torch.from_numpy(chosen)
        scales = indices.bincount(minlength=length).clamp(min=1).float().rsqrt()
        pieces = list(indices.split(sizes))
        a = [piece.view(shape) for piece, (shape, _) in zip(pieces[0::2], shapes)]
        b = [piece.view(shape) for piece, (_, shape) in zip(pieces[1::2], shapes)]
        return {
            "unilora_theta_d": nn.Parameter(torch.empty(length).uniform_(-bound, bound)),
            "unilora_indices_A": a,
            "unilora_indices_B": b,
            "unilora_scales_A": [scales[index] for index in a],
            "unilora_scales_B": [scales[index] for index in b],
        }

    def update_layer(self, name: str, config: UniLoraConfig, key: str) -> None:
        self.put(name, r=config.r, save_indices=config.save_indices)
        self.put(name, unilora_dropout=input_dropout(config.unilora_dropout))

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        theta = self.unilora_theta_d[name]

        def spread(indices: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            return theta.index_select(0, indices.flatten()).view_as(indices) * scales.to(theta.dtype)

        a = spread(self.unilora_indices_A[name], self.unilora_scales_A[name])
        return a, spread(self.unilora_indices_B[name], self.unilora_scales_B[name])

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        return super().adapter_state(name) if self.save_indices.get(name) else iter(())


UniLoraModel = define_tuner(
    "UniLoraModel",
    UniLoraLayer,
    UniLoraConfig,
    prefix="unilora_",
    targets=TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING,
)
