"""BD-LoRA: A or B of diagonal blocks, so that tensor-parallel shards need no further exchange (arXiv 2510.23346)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import resolve_pattern
from peft.core.adapter import setting
from peft.core.base.kinds import Kind
from peft.core.filling import skip_values
from peft.errors import ConfigError
from peft.tuners.lora.config import BdLoraConfig, LoraConfig
from peft.tuners.lora.initialize import is_drawn
from peft.tuners.lora.layer import Lora
from peft.usage import note


def block_product(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """``block_diag(*blocks) x`` along the last axis, at the cost of the blocks alone.

    Args:
        x: ``[..., n * inner]``. blocks: ``[n, outer, inner]``.

    Returns:
        ``[..., n * outer]``.
    """
    n, outer, inner = blocks.shape
    parts = x.reshape(-1, n, inner).transpose(0, 1)  # [n, rows, inner]
    return torch.bmm(parts, blocks.mT).transpose(0, 1).reshape(*x.shape[:-1], n * outer)


class BlockDiagonal(nn.Module):
    """A linear map of ``count`` diagonal blocks, held one below the other: ``weight`` is ``[out, in / count]``."""

    def __init__(self, in_features: int, out_features: int, count: int, bias: bool) -> None:
        super().__init__()
        self.count, self.in_features, self.out_features = count, in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features // count))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def blocks(self) -> torch.Tensor:
        """``[count, out / count, in / count]``."""
        return self.weight.unflatten(0, (self.count, -1))

    def dense(self) -> torch.Tensor:
        """``[out, in]``, with its zeros."""
        return torch.block_diag(*self.blocks())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = block_product(x, self.blocks().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class BdLora(Lora):
    """dW = s B A with A or B block-diagonal: A is held as ``[r, in / n]``, or B as ``[out, r / n]``.

    Where a server splits W by outputs (q, k, v, gate and up projections), B is cut into as many blocks as there are
    shards: each needs its own rows of A and its own block, and its output is its own. Where it splits W by inputs (o
    and down projections), A is cut, and the shards' updates go through the sum that the layer makes anyway.
    """

    option: ClassVar[str] = "use_bdlora"
    bdlora_side, bdlora_blocks = setting(), setting()
    fixed_rank: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = {
        "Mica": "MiCA's B holds singular vectors of the whole weight, which a factor made of blocks cannot"
    }

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if not kind.matrix:
            return "BD-LoRA cuts the features of linear layers into blocks, and this is none"
        if config.init_lora_weights not in (True, False, "gaussian"):
            return f"init_lora_weights={config.init_lora_weights!r} makes whole factors, and BD-LoRA's are of blocks"
        return None

    def create(self, config: LoraConfig, key: str) -> None:
        options: Any = config.use_bdlora
        self.bdlora_side, self.bdlora_blocks = side_of(options, key), options.nblocks
        super().create(config, key)

    def make_pair(self, config: LoraConfig) -> None:
        super().make_pair(config)
        side, count = self.bdlora_side, self.bdlora_blocks
        if side is None:
            return
        inner, outer = (self.in_features, self.r) if side == "A" else (self.r, self.out_features)
        if inner % count or outer % count:
            raise ConfigError(
                f"BD-LoRA: nblocks={count} does not divide the {inner} inputs and {outer} outputs of {side} here "
                f"(rank {self.r}). Choose nblocks and r so that both are multiples of nblocks."
            )
        made = BlockDiagonal(inner, outer, count, bias=side == "B" and config.lora_bias)
        if not (is_drawn(config) and skip_values()):
            if side == "B" and config.init_lora_weights:
                nn.init.zeros_(made.weight)
            elif config.init_lora_weights == "gaussian":
                nn.init.normal_(made.weight, std=1 / self.r)
            else:
                made.reset_parameters()
        setattr(self, f"lora_{side}", made)

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = super().pair()
        if self.bdlora_side == "A":
            return self.lora_A.dense(), b
        return (a, self.lora_B.dense()) if self.bdlora_side == "B" else (a, b)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        cls = type(self)
        if (cls.pair, cls.acting_pair) != (BdLora.pair, Lora.acting_pair):
            return super().update(x)  # another variant computes with the dense pair
        if self.lora_B.bias is None:
            return self.lora_B(self.lora_A(x) * self.scaling)  # r numbers of each token are scaled, not all outputs
        return self.lora_B(self.lora_A(x)) * self.scaling


def side_of(options: BdLoraConfig, key: str) -> str | None:
    """Which factor of the module called ``key`` is block-diagonal: "A", "B", or None where neither list names it.

    Entries are names of modules, ends of names, regular expressions, or parts of a path: "self_attn" means all below.

    Raises:
        ValueError: if neither does and ``match_strict`` asks for one.
    """
    for side, entries in (("A", options.target_modules_bd_a), ("B", options.target_modules_bd_b)):
        named = [entry for entry in entries or () if _names(entry, key)]
        note(entries, named)
        if named:
            return side
    if options.match_strict:
        raise ConfigError(
            f"module {key!r} is adapted, and neither target_modules_bd_a={options.target_modules_bd_a} nor "
            f"target_modules_bd_b={options.target_modules_bd_b} names it. Add it to one of them, or set "
            "match_strict=False in BdLoraConfig to train a plain pair there."
        )
    return None


def _names(entry: str, key: str) -> bool:
    path, wanted = key.split("."), entry.strip(".").split(".")
    within = any(path[i : i + len(wanted)] == wanted for i in range(len(path)))
    return within or bool(resolve_pattern({entry: True}, key, False))
