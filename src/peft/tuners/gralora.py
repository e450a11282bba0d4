"""GraLoRA: dW of k x k blocks, each a low-rank product of its own [+ one LoRA over all] (arXiv 2505.20355)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.families import ScaledBy, padded
from peft.core.filling import draw_like_linear
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.kernels.made_again import reading
from peft.peft_types import PeftType


@dataclass
class GraloraConfig(TargetModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of GraLoRA: the weight is cut into k x k blocks, and each gets a low-rank update of rank r / k.

    Use it where a LoRA of high rank overfits or is upset by outliers among the inputs: with the same number of
    parameters and operations, the update has rank up to k times as high.
    """

    METHOD: ClassVar[PeftType] = PeftType.GRALORA
    OWN_BIAS: ClassVar[str] = "gralora_only"

    r: int = option(32, "Rank of the blocks together: as many parameters as a LoRA of that rank.", minimum=1)
    hybrid_r: int = option(0, "Rank of a plain LoRA over the whole weight, besides the blocks.", minimum=0)
    alpha: int = option(64, "The update is scaled by alpha / (r + hybrid_r).", stuck=0)
    gralora_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    gralora_k: int = option(2, "Blocks in each direction; it divides r.", minimum=1)
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            raise ConfigError(f"GraloraConfig: r={self.r} must be a multiple of gralora_k={self.gralora_k}.")


def gralora(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """h_n = x_n A_n for the k chunks of x; piece j of each h_n goes to chunk j of the output: y_j = s [h_nj]_n B_j.

    Args:
        x: ``[..., in]``; a: ``[k, in / k, r]``; b: ``[k, r, out / k]``; in / k and out / k are rounded up where k does
            not divide, and x is filled up with zeros. scale: s.

    Returns:
        ``[..., k * (out / k)]``.
    """
    k, width, r = a.shape
    rows = math.prod(x.shape[:-1])
    chunks = padded(x, k * width).reshape(rows, k, width).transpose(0, 1)  # [n, row of x, in / k]
    with reading(x):
        pieces = (chunks @ a).unflatten(2, (k, r // k))  # [n, row of x, j, r / k]
    y = (pieces.permute(2, 1, 0, 3).flatten(2) * scale) @ b  # [j, row of x, out / k]
    return y.transpose(0, 1).flatten(1).unflatten(0, x.shape[:-1])


def gralora_weight(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The matrix of :func:`gralora`, ``[k * (out / k), k * (in / k)]``."""
    pieces_a, pieces_b = a.unflatten(2, (len(a), -1)), b.unflatten(1, (len(a), -1))
    return torch.einsum("nijp,jnpo->joni", pieces_a, pieces_b).flatten(2).flatten(0, 1)


class Gralora(ScaledBy):
    """dW of k x k blocks, see :func:`gralora`, and of a LoRA over all where ``hybrid_r`` is given.

    A ``[k, in / k, r]`` and B ``[k, r, out / k]``, rounded up where k does not divide.
    """

    spares_input = True
    gralora_A, gralora_B = part(), part()
    gralora_A_general, gralora_B_general = part(nn.ModuleDict), part(nn.ModuleDict)
    alpha, gralora_dropout = setting(), input_dropout()

    def create(self, config: GraloraConfig, key: str) -> None:
        k, r, (rows, columns) = config.gralora_k, config.r, fan(self.shape)
        a, b = torch.empty(k, r, -(-columns // k)), torch.zeros(k, -(-rows // k), r)
        for n in range(k):  # each chunk is drawn like a linear layer of its own
            draw_like_linear(a[n])
            if not config.init_weights:
                draw_like_linear(b[n])
        self.gralora_A, self.gralora_B = nn.Parameter(a.mT.contiguous()), nn.Parameter(b.mT.contiguous())
        self.alpha, self.gralora_dropout = config.alpha, config.gralora_dropout
        self.scale_by(config.alpha / (r + config.hybrid_r))
        if config.hybrid_r:
            down, up = nn.Linear(columns, config.hybrid_r, bias=False), nn.Linear(config.hybrid_r, rows, bias=False)
            draw_like_linear(down.weight)
            if config.init_weights:
                nn.init.zeros_(up.weight)
            self.gralora_A_general, self.gralora_B_general = down, up

    def delta_weight(self) -> torch.Tensor:
        rows, columns = fan(self.shape)
        weight = gralora_weight(self.gralora_A, self.gralora_B)[:rows, :columns]
        if self.gralora_A_general is not None:
            weight = weight + self.gralora_B_general.weight @ self.gralora_A_general.weight
        return (weight * self.scaling).view(self.shape)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.kind.lookup else self.gralora_dropout(x)
        if not self.kind.matrix:
            return super().delta(x)
        y = gralora(x, self.gralora_A, self.gralora_B, self.scaling)[..., : self.shape[0]]
        if self.gralora_A_general is not None:
            y = y + self.gralora_B_general(self.gralora_A_general(x)) * self.scaling
        return y


GraloraModel = define_tuner(Gralora, GraloraConfig)
