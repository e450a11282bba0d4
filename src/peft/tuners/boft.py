"""BOFT: a butterfly of block rotations of the input, W' = diag(s) W (B_m ... B_1)^T (arXiv 2311.06243)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import part, setting
from peft.core.families import Rotation
from peft.core.families.rotation import block_rotated, held_still
from peft.core.layer.weight import wide
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.kernels.made_again import made_again, reading
from peft.peft_types import PeftType
from peft.tuners.cayley import cayley


@dataclass
class BOFTConfig(TargetModules, ExcludeModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of BOFT: an orthogonal map of the input out of few sparse factors, and a scale for each output.

    To keep the angles between neurons, as OFT does, with fewer parameters than one large block for the same reach:
    ``m`` factors of block size ``b`` mix ``b 2^(m-1)`` features. Fine-tuning of diffusion and vision models.
    """

    METHOD: ClassVar[PeftType] = PeftType.BOFT
    OWN_BIAS: ClassVar[str] = "boft_only"

    boft_block_size: int = option(4, "Size of the blocks; give either this or boft_block_num.", minimum=0)
    boft_block_num: int = option(0, "Number of blocks; give either this or boft_block_size.", minimum=0)
    boft_n_butterfly_factor: int = option(
        1,
        "Number of factors m. More than 1 needs blocks of even size, and features that are a multiple of "
        "block size * 2^(m-1).",
        minimum=1,
    )
    boft_dropout: float = option(0.0, "Share of the blocks that stand still in a training step.", minimum=0, below=1)
    init_weights: bool = option(True, "Start at the identity, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ConfigError(
                "BOFTConfig: give either boft_block_size or boft_block_num and set the other to 0, got "
                f"boft_block_size={self.boft_block_size} and boft_block_num={self.boft_block_num}."
            )


def boft_blocks(q: torch.Tensor) -> torch.Tensor:
    """The Cayley transforms (I - S)(I + S)^-1 of the skew parts S = (Q - Q^T) / 2, for Q ``[..., b, b]``.

    This is the convention of exact OFT, and the transpose of (I + S)(I - S)^-1, which others use.
    """
    exact = wide(q)
    return cayley((exact.mT - exact) / 2).to(q.dtype)


def butterfly(x: torch.Tensor, factors: torch.Tensor, back: bool = False) -> torch.Tensor:
    """x R along the last axis with R = B_m ... B_1, or x R^T with ``back``.

    Factor i is block-diagonal for features in another order: it pairs half-blocks that are 2^(i-1) half-blocks apart.

    Args:
        x: ``[..., features]``. factors: the blocks ``[m, blocks, b, b]``, with ``blocks * b`` features.
    """
    size = factors.shape[-1]
    for i in range(len(factors)) if back else reversed(range(len(factors))):
        blocks, shape = factors[i].mT if back else factors[i], x.shape
        if i:  # [..., n, 2, 2^i, b / 2]: halves that belong together stand 2^i apart
            x = x.unflatten(-1, (-1, 2, 2**i, size // 2)).transpose(-3, -2)
        x = block_rotated(x.reshape(shape), blocks)
        if i:
            x = x.unflatten(-1, (-1, 2**i, 2, size // 2)).transpose(-3, -2).reshape(shape)
    return x


class BOFT(Rotation):
    """W' = diag(s) W R^T with R = B_m ... B_1. The bias is not scaled. Embeddings rotate their output.

    ``boft_R`` is ``[m, blocks, b, b]``: any square matrices, which :func:`boft_blocks` makes rotations of.
    """

    boft_R, boft_s = part(), part()
    boft_dropout = setting()
    reversible = False  # a scale may be zero
    last_comes_first = True
    spares_input = True

    def create(self, config: BOFTConfig, key: str) -> None:
        blocks, size = cut(self.rotated_features, config, key or type(self.base).__name__)
        q = torch.zeros(config.boft_n_butterfly_factor, blocks, size, size)
        s = torch.ones((1, self.shape[0]) if len(self.shape) > 2 else (self.shape[0], 1))
        if not config.init_weights:
            nn.init.normal_(q, mean=0.0, std=0.1)
            nn.init.normal_(s, mean=1.0, std=0.1)
        self.boft_R, self.boft_s, self.boft_dropout = nn.Parameter(q), nn.Parameter(s), config.boft_dropout
        if config.boft_dropout and self.only_folds():
            warnings.warn("boft_dropout does nothing on convolutions: there the blocks turn the weight itself.")

    def takes(self, saved: str, shape: torch.Size) -> bool:
        """Files may have fewer factors than their config says."""
        held = self.boft_R.shape
        return saved == "boft_R" and len(shape) == 4 and shape[1:] == held[1:] and 0 < shape[0] <= held[0]

    def rotate(self, x: torch.Tensor, back: bool = False, drawn: bool = False) -> torch.Tensor:
        blocks = boft_blocks(self.boft_R)
        if drawn and self.draws():
            blocks = held_still(blocks, self.boft_dropout)
        blocks, turned = blocks.to(x.dtype), partial(butterfly, back=back)
        with reading(x):  # nor is what is between factors kept
            return turned(x, blocks) if len(blocks) == 1 else made_again(turned, x, blocks, entries=x.numel())

    def draws(self) -> bool:
        return bool(self.boft_dropout) and self.training

    def scale_out(self) -> torch.Tensor:
        return self.boft_s.flatten()

    def keeps_base(self) -> bool:
        return True


def cut(features: int, config: BOFTConfig, where: str) -> tuple[int, int]:
    """Number and size of the blocks that a config means for so many features.

    Raises:
        ConfigError: they cannot be cut so.
    """
    factors = config.boft_n_butterfly_factor
    blocks = config.boft_block_num or features // config.boft_block_size
    size = config.boft_block_size or features // blocks
    wide = 2 ** (factors - 1)
    if size and blocks * size == features and (factors == 1 or (size % 2 == 0 and blocks % wide == 0)):
        return blocks, size
    sizes = [b for b in range(1, features + 1) if features % (b * wide) == 0 and (factors == 1 or b % 2 == 0)]
    raise ConfigError(
        f"BOFT cannot cut the {features} features of {where!r} into blocks of size "
        f"{config.boft_block_size or features / blocks:g} with boft_n_butterfly_factor={factors}. "
        + (f"boft_block_size may be one of {sizes}." if sizes else f"Features must be a multiple of {2 * wide}.")
    )


BOFTModel = define_tuner(BOFT, BOFTConfig)
