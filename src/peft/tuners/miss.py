"""MiSS: y' = y + (sum of the blocks of x) D; "bat": W' = W + W M + M, block by block (arXiv 2409.15371)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.addition import LinearIn
from peft.core.base.kinds import fan
from peft.core.families import Delta, padded
from peft.core.filling import draw_like_linear
from peft.core.model.registry import define_tuner
from peft.kernels.made_again import Transformable
from peft.peft_types import PeftType


@dataclass
class MissConfig(TargetModules, ExcludeModules, TrainedBias, ModulesToSave, LayerSelection):
    """Config of MiSS: one trained matrix D, shared by the blocks of r inputs; its three forms are in init_weights.

    Use it in place of LoRA for half the parameters at the same r, and less memory and time; "bat" lets the update
    depend on the weight, "mini" shares D among the outputs as well.
    """

    METHOD: ClassVar[PeftType] = PeftType.MISS
    OWN_BIAS: ClassVar[str] = "miss_only"

    r: int = option(64, "Size of the blocks, and rank of the update.", minimum=1)
    miss_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    mini_r: int = option(
        1,
        "'mini' only: outputs that D has; they are repeated for the others.",
        minimum=1,
        needs=("init_weights", "mini"),
    )
    init_weights: bool | str = option(
        True,
        "The form, each starting at zeros, so that nothing changes: True, 'bat' or 'mini'. False is the form of True "
        "with random numbers.",
        choices=(True, False, "bat", "mini"),
    )


class Blocks(Transformable):
    """V M_J + M_J, with ``whole`` V + V M_J + M_J, for each block V of a row J of blocks: one product and one sum."""

    @staticmethod
    def forward(lines: torch.Tensor, m: torch.Tensor, whole: bool) -> torch.Tensor:
        """Lines of blocks ``[J, row * I, r]`` and M ``[J, r, r]``."""
        y = torch.bmm(lines, _factor(m, whole))
        y.unflatten(1, (m.shape[1], -1)).add_(m[:, :, None])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        lines, m, ctx.whole = inputs
        ctx.save_for_backward(lines, m)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        lines, m = ctx.saved_tensors
        of_lines = gradient @ _factor(m, ctx.whole).mT if ctx.needs_input_grad[0] else None
        of_m = lines.mT @ gradient + gradient.unflatten(1, (m.shape[1], -1)).sum(2)
        return of_lines, of_m, None


def _factor(m: torch.Tensor, whole: bool) -> torch.Tensor:
    return m + torch.eye(m.shape[1], dtype=m.dtype, device=m.device) if whole else m


def miss_product(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """dW x = D^T (sum of the blocks of x), D ``[r, out]``; x ``[..., in]`` is filled with zeros to whole blocks."""
    r = len(d)
    blocks = padded(x, -(-x.shape[-1] // r) * r).unflatten(-1, (-1, r))  # [..., block, r]
    return blocks.sum(-2) @ d


def miss_update(d: torch.Tensor, columns: int) -> torch.Tensor:
    """The same dW, ``[out, columns]``: D^T, again and again."""
    return d.T.repeat(1, -(-columns // len(d)))[:, :columns]


def bat(weight: torch.Tensor, m: torch.Tensor, whole: bool = False) -> torch.Tensor:
    """W_JI M_J + M_J for each block (J, I) of r x r entries of W ``[out, columns]``, M ``[out / r, r, r]``.

    With ``whole`` W is in it too: by M_J + 1, which takes no pass over W. Where r does not divide the features, the
    last blocks are filled with zeros.
    """
    (rows, columns), r = weight.shape, m.shape[1]
    wide = padded(weight.to(m.dtype), -(-columns // r) * r)
    lines = padded(wide.T, len(m) * r).T.reshape(len(m), -1, r)  # [J, (row, I), column of the block]
    return Blocks.of(lines, m, whole).reshape(len(m) * r, -1)[:rows, :columns]


class Miss(Delta):
    """``miss_block`` is D ``[r, out]``, for "mini" ``[r, mini_r]``, for "bat" M ``[out / r, r, r]``."""

    miss_block = part()
    miss_r, form, miss_dropout = setting(), setting(), input_dropout()
    adds = LinearIn("miss_block")

    def create(self, config: MissConfig, key: str) -> None:
        r, rows, form = config.r, self.shape[0], config.init_weights
        shapes = {"bat": (-(-rows // r), r, r), "mini": (r, config.mini_r)}
        block = torch.zeros(shapes.get(str(form), (r, rows)))
        if form is False:
            draw_like_linear(block)
        self.miss_r, self.form, self.miss_block = r, form, nn.Parameter(block)
        self.miss_dropout = config.miss_dropout

    def keeps_base(self) -> bool:
        return self.form == "bat"

    def up(self) -> torch.Tensor:
        """D ``[r, out]``."""
        block, rows = self.miss_block, self.shape[0]
        return block if block.shape[1] == rows else block.repeat(1, -(-rows // block.shape[1]))[:, :rows]

    def delta_weight(self) -> torch.Tensor:
        if self.form == "bat":
            return bat(self.base_weight().flatten(1), self.miss_block).reshape(self.shape)
        return miss_update(self.up(), fan(self.shape)[1]).reshape(self.shape)

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        if self.form != "bat":
            return super().fold(weight, base)
        change = bat(base.flatten(1), self.miss_block, whole=weight is base).reshape(self.shape).to(weight.dtype)
        return change if weight is base else weight + change

    def prefers_folding(self) -> bool:
        return self.form == "bat" and self.sums_exactly() and not self.drops(self.miss_dropout)

    def dear_to_make(self) -> bool:
        return self.form == "bat"

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.kind.lookup else self.miss_dropout(x)
        return super().delta(x) if self.form == "bat" or not self.kind.matrix else miss_product(x, self.up())


MissModel = define_tuner(Miss, MissConfig)
