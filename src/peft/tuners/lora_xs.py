"""LoRA-XS: dW = s B R A with A and B from the weight's SVD, frozen; only R is trained (arXiv 2405.17604, eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import part, setting
from peft.core.addition import LinearIn
from peft.core.base.kinds import fan
from peft.core.families import LowRank
from peft.core.layer.buffers import BufferDict
from peft.core.model.registry import define_tuner
from peft.kernels.decompositions import svd


@dataclass
class LoraXsConfig(TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Config of LoRA-XS: r x r trained numbers for each layer, whatever its size.

    For very many or very small adapters, such as one for each user. The rank can be high, for the count grows with its
    square only. The two frozen factors are saved as well, since a decomposition is not the same on each machine.
    """

    METHOD: ClassVar[str] = "LORA_XS"

    r: int = option(8, "Rank of the update; at most that of the weight.", minimum=1)
    alpha: float = option(8, "The update is scaled by alpha / r.")


class LoraXs(LowRank):
    """A ``[r, in * kernel]`` is V^T, B ``[out, r]`` is U S of the r largest singular values; R starts at zero."""

    xs_A, xs_B, xs_R, xs_scale = part(BufferDict), part(BufferDict), part(), setting()
    adds = LinearIn("xs_R")

    def create(self, config: LoraXsConfig, key: str) -> None:
        r = min(config.r, *fan(self.shape))
        u, s, v = svd(self.base_weight().detach().flatten(1).float())
        self.xs_A, self.xs_B = v[:r].contiguous(), u[:, :r] * s[:r]
        self.xs_R, self.xs_scale = nn.Parameter(torch.zeros(r, r)), config.alpha / r

    def outer(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.xs_A.to(self.xs_R.dtype), self.xs_B.to(self.xs_R.dtype)

    def core(self) -> torch.Tensor:
        return self.xs_scale * self.xs_R


LoraXsModel = define_tuner(LoraXs, LoraXsConfig)
