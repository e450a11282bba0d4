"""BOFT: a butterfly of block rotations of the input, W' = diag(s) W (B_m ... B_1)^T (arXiv 2311.06243)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.families.families import RotationLayer
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


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


class BOFTLayer(RotationLayer):
    """W' = diag(s) W R^T with R = B_m ... B_1. The bias is not scaled. Embeddings rotate their output.

    ``boft_R`` is ``[m, blocks, b, b]``: any square matrices Q, whose skew part S = (Q - Q^T) / 2 makes the blocks by
    the Cayley transform (I - S)(I + S)^-1: the convention of exact OFT, and the transpose of (I + S)(I - S)^-1, which
    others use. Factor i pairs half-blocks that are 2^(i-1) half-blocks apart.
    """

    weights: ClassVar[dict[str, type]] = {"boft_R": nn.ParameterDict, "boft_s": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {"boft_dropout": dict}
    reversible = False  # a scale may be zero

    def update_layer(self, name: str, config: BOFTConfig, key: str) -> None:
        features, factors = self.rotated_features, config.boft_n_butterfly_factor
        blocks = config.boft_block_num or features // config.boft_block_size
        size = config.boft_block_size or features // blocks
        wide = 2 ** (factors - 1)
        if not size or blocks * size != features or (factors > 1 and (size % 2 or blocks % wide)):
            step = wide if factors == 1 else 2 * wide
            sizes = [b for b in range(1, features + 1) if features % (b * wide) == 0 and (factors == 1 or b % 2 == 0)]
            raise ConfigError(
                f"BOFT cannot cut the {features} features of {key or type(self.get_base_layer()).__name__!r} into "
                f"blocks of size {config.boft_block_size or features / blocks:g} with "
                f"boft_n_butterfly_factor={factors}. "
                + (f"boft_block_size may be one of {sizes}." if sizes else f"Features must be a multiple of {step}.")
            )
        out = self.shape[0]
        q, s = torch.zeros(factors, blocks, size, size), torch.ones((1, out) if len(self.shape) > 2 else (out, 1))
        if not config.init_weights:
            nn.init.normal_(q, mean=0.0, std=0.1)
            nn.init.normal_(s, mean=1.0, std=0.1)
        self.put(name, boft_R=nn.Parameter(q), boft_s=nn.Parameter(s), boft_dropout=config.boft_dropout)

    def takes(self, name: str, saved: str, shape: torch.Size) -> bool:
        """Files may have fewer factors than their config says."""
        held = self.boft_R[name].shape
        return saved == "boft_R" and len(shape) == 4 and shape[1:] == held[1:] and 0 < shape[0] <= held[0]

    def factors(self, name: str) -> torch.Tensor:
        """The blocks of all factors, ``[m, blocks, b, b]``."""
        q, p = self.boft_R[name], self.boft_dropout[name]
        wide = q.float() if q.dtype.itemsize < 4 else q  # there is no solver for 16 bits
        skew, eye = (wide - wide.mT) / 2, torch.eye(q.shape[-1], device=q.device, dtype=wide.dtype)
        blocks = torch.linalg.solve(eye + skew, eye - skew, left=False).to(q.dtype)
        if p and self.training:
            still = torch.rand(*q.shape[:2], 1, 1, device=q.device) < p
            blocks = torch.where(still, eye.to(q.dtype), blocks)
        return blocks

    def rotate(self, name: str, x: torch.Tensor, back: bool = False) -> torch.Tensor:
        factors = self.factors(name).to(x.dtype)
        for i in range(len(factors)) if back else reversed(range(len(factors))):
            blocks = factors[i].mT if back else factors[i]
            halves = x.unflatten(-1, (-1, 2, 2**i, blocks.shape[-1] // 2)) if i else x
            pieces = (halves.transpose(-3, -2) if i else halves).reshape(*x.shape[:-1], len(blocks), -1)
            turned = torch.einsum("...dk,dkc->...dc", pieces, blocks)
            if i:
                turned = turned.flatten(-2).unflatten(-1, (-1, 2**i, 2, blocks.shape[-1] // 2)).transpose(-3, -2)
            x = turned.reshape(x.shape)
        return x

    def scale_out(self, name: str) -> torch.Tensor:
        return self.boft_s[name].flatten()

    def keeps_base(self, name: str) -> bool:
        return True


BOFTModel = define_tuner(
    "BOFTModel",
    BOFTLayer,
    BOFTConfig,
    prefix="boft_",
    targets=TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING,
)
