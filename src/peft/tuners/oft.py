"""OFT: block-diagonal orthogonal rotation of the input (arXiv 2306.07280, and its second version 2506.19847)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import part, setting
from peft.core.families import Rotation
from peft.core.families.rotation import block_rotated, held_still
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.kernels.made_again import reading
from peft.peft_types import PeftType
from peft.tuners.cayley import cayley, cayley_series


@dataclass
class OFTConfig(TargetModules, ExcludeModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of OFT: y = W (x R) with R block-diagonal and orthogonal.

    For keeping what the model knows: a rotation leaves the angles between neurons as they are. Fine-tuning of
    diffusion models, and of language models as an alternative to LoRA; merged, it costs nothing.
    """

    METHOD: ClassVar[PeftType] = PeftType.OFT
    OWN_BIAS: ClassVar[str] = "oft_only"

    r: int = option(0, "Number of blocks; give either this or oft_block_size.", minimum=0)
    oft_block_size: int = option(32, "Size of the blocks; give either this or r.", minimum=0)
    module_dropout: float = option(0.0, "Share of the blocks that stand still in a training step.", minimum=0, below=1)
    init_weights: bool = option(True, "Start at R = I, so that nothing changes; otherwise at a random rotation.")
    coft: bool = option(False, "Constrained OFT: keep each block near the identity, within eps.")
    eps: float = option(6e-5, "How far constrained OFT may rotate.", minimum=0, needs="coft")
    block_share: bool = option(False, "All blocks of a layer are the same one.")
    use_cayley_neumann: bool = option(True, "Approximate the Cayley transform by a Neumann series: faster, not exact.")
    num_cayley_neumann_terms: int = option(5, "Terms of that series.", minimum=1, needs="use_cayley_neumann")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"OFTConfig: give either r or oft_block_size and set the other to 0, got r={self.r} and "
                f"oft_block_size={self.oft_block_size}."
            )


class OFTRotation(nn.Module):
    """Rotations of ``[blocks]`` subspaces; the weight holds the upper triangles of skew-symmetric matrices Q.

    Args:
        blocks, size: number and size of the blocks.
        terms: terms of the Neumann series of the Cayley transform; None: the exact transform.
        radius: constrained OFT scales a Q of larger Frobenius norm down to it.
    """

    def __init__(self, blocks: int, size: int, terms: int | None, radius: float | None, dropout: float) -> None:
        super().__init__()
        self.size, self.terms, self.radius, self.dropout = size, terms, radius, dropout
        self.weight = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))

    def skew(self) -> torch.Tensor:
        """Q, ``[blocks, size, size]``."""
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.weight.device)
        q = self.weight.new_zeros(len(self.weight), self.size**2).index_add(1, rows * self.size + columns, self.weight)
        q = q.unflatten(1, (self.size, self.size))
        q = q - q.mT
        if self.radius is not None:
            norm = q.detach().flatten(1).norm(dim=1)[:, None, None]
            q = q * (self.radius / norm.clamp_min(1e-30)).clamp(max=1)
        return q

    def forward(self, drawn: bool = False) -> torch.Tensor:
        """R, ``[blocks, size, size]``; with ``drawn`` those that a training step draws stand still.

        The series is I + 2 (Q + ... + Q^(t-2)) + Q^(t-1) and approximates (I + Q)(I - Q)^-1; what the file format
        calls exact is the transpose of that, so flipping the switch on a trained adapter inverts its rotation.
        """
        q = self.skew()
        # Kept: made again, the series would take more time than its memory is worth.
        rotation = cayley(-q) if self.terms is None else cayley_series(q, self.terms)
        return held_still(rotation, self.dropout) if drawn and self.dropout and self.training else rotation


class OFT(Rotation):
    """W' = W R^T with R = blockdiag(R_1, ..., R_D). Embeddings rotate their output."""

    oft_R = part(nn.ModuleDict, table="oft_embedding_R")
    r, oft_block_size = setting(), setting()
    spares_input = True

    def create(self, config: OFTConfig, key: str) -> None:
        features = self.rotated_features
        size = nearest_divisor(features, config.oft_block_size, "oft_block_size") if config.oft_block_size else 0
        self.r = features // size if size else nearest_divisor(features, config.r, "r")
        self.oft_block_size = size = features // self.r
        held = 1 if config.block_share else self.r
        radius = config.eps / math.sqrt(held) if config.coft else None
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        rotation = OFTRotation(held, size, terms, radius, config.module_dropout)
        if not config.init_weights:
            nn.init.normal_(rotation.weight, std=0.1)
        self.oft_R = rotation

    def rotate(self, x: torch.Tensor, back: bool = False, drawn: bool = False) -> torch.Tensor:
        blocks = self.oft_R(drawn).expand(self.r, -1, -1).to(x.dtype)
        with reading(x):
            return block_rotated(x, blocks.mT if back else blocks)


def nearest_divisor(features: int, wanted: int, field: str) -> int:
    """The divisor of ``features`` closest to ``wanted``, the smaller of two; warns if it is another number."""
    divisors = [d for d in range(1, features + 1) if features % d == 0]
    best = min(divisors, key=lambda d: (abs(d - wanted), d))
    if best != wanted:
        warnings.warn(f"{field}={wanted} does not divide {features} features; {field}={best} is used for such layers.")
    return best


OFTModel = define_tuner(OFT, OFTConfig)
