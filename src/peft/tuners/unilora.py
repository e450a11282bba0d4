"""Uni-LoRA: every entry of every A and B is one of a few trained numbers, by a random projection (2506.00799)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import input_dropout, part, setting, shared
from peft.core.base.kinds import fan
from peft.core.families import LowRank
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType


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
    init_theta_d_bound: float = option(0.02, "The trained numbers start uniform in +- this bound.", above=0)
    init_weights: bool = option(True, "Start as said; False draws them from the standard normal distribution.")
    save_indices: bool = option(
        False, "Write the projection into the file. Without, it is drawn again from proj_seed when it is loaded."
    )


def unilora_spread(theta: torch.Tensor, indices: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """theta[indices] * scales: a matrix that a projection makes of the trained numbers.

    Args:
        theta: ``[theta_d_length]``. indices, scales: of the matrix's shape, ``[r, in * kernel]`` or ``[out, r]``; the
            scale of a number is 1 / sqrt(how often it is used).
    """
    return theta.index_select(0, indices.flatten()).view_as(indices) * scales.to(theta.dtype)


class UniLora(LowRank):
    """dW = B A with A and B = theta[indices] * scales, scales = 1 / sqrt(how often the number is used)."""

    unilora_indices_A, unilora_indices_B, unilora_scales_A, unilora_scales_B = (
        part(BufferDict, saved_by="save_indices") for _ in range(4)
    )
    unilora_theta_d = shared()
    r, save_indices, unilora_dropout = setting(), setting(), input_dropout()

    @classmethod
    def share(cls, config: UniLoraConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        """The trained numbers ``[theta_d_length]``, and the projection: each is used equally often, but for one."""
        length, bound = config.theta_d_length, config.init_theta_d_bound
        shapes = [((config.r, columns), (rows, config.r)) for rows, columns in (fan(x.shape) for x in layers)]
        sizes = [a * b for pair in shapes for a, b in pair]
        indices = generate_index(sum(sizes), length, config.proj_seed)
        scales = indices.bincount(minlength=length).clamp(min=1).float().rsqrt()  # a number may be used nowhere
        pieces = list(indices.split(sizes))
        a = [piece.view(shape) for piece, (shape, _) in zip(pieces[0::2], shapes)]
        b = [piece.view(shape) for piece, (_, shape) in zip(pieces[1::2], shapes)]
        return {
            "unilora_theta_d": nn.Parameter(
                torch.empty(length).uniform_(-bound, bound) if config.init_weights else torch.randn(length)
            ),
            "unilora_indices_A": a,
            "unilora_indices_B": b,
            "unilora_scales_A": [scales[index] for index in a],
            "unilora_scales_B": [scales[index] for index in b],
        }

    def create(self, config: UniLoraConfig, key: str) -> None:
        self.r, self.save_indices = config.r, config.save_indices
        self.unilora_dropout = config.unilora_dropout

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        theta = self.unilora_theta_d
        a = unilora_spread(theta, self.unilora_indices_A, self.unilora_scales_A)
        return a, unilora_spread(theta, self.unilora_indices_B, self.unilora_scales_B)


def generate_index(lora_param_count: int, theta_d_length: int, proj_seed: int) -> torch.Tensor:
    """Which of ``theta_d_length`` numbers each entry is, ``[lora_param_count]``: all equally often, but for one."""
    often, left = divmod(lora_param_count, theta_d_length)
    random = np.random.default_rng(proj_seed)
    extra = random.choice(theta_d_length, left, replace=False)
    chosen = np.concatenate((np.repeat(np.arange(theta_d_length), often), extra))
    random.shuffle(chosen)
    return torch.from_numpy(chosen)


UniLoraModel = define_tuner(UniLora, UniLoraConfig, generate_index=staticmethod(generate_index))
