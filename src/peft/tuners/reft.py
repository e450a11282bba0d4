"""LoReFT, NoReFT and DiReFT: h' = h + R^T (f(W h + b) - R h) at the first and last positions of a text, after blocks.

Representation finetuning (Wu et al. 2024, arXiv 2404.03592): a frozen model is edited in its hidden states, at few
positions, and not in its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import ModulesToSave, option
from peft.core.adapter import part, setting
from peft.core.blocks.blocks import (
    CROSS,
    BlockAdapter,
    BlockLayer,
    BlockTarget,
    BlockTuner,
    find_blocks,
    first_output,
    width_of,
    with_first,
)
from peft.core.blocks.extent import Extent, extent_of
from peft.core.layer.composed import Change, change_of
from peft.core.model.registry import define_tuner
from peft.core.model.walk import locate
from peft.errors import ConfigError, NoMatchingPeftModuleError
from peft.tuners.reft_utils import Intervention


DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass
class ReftConfig(ModulesToSave):
    """Config of LoReFT, NoReFT and DiReFT: hidden states are edited at a few positions, after each block.

    A small adapter for instructions and classification: its cost does not grow with the text, and what a decoder
    writes costs nothing extra. It cannot be merged. LoReFT is the paper's; DiReFT trains a little faster. Texts that
    are packed into one row count as one.
    """

    METHOD: ClassVar[str] = "REFT"

    variant: str = option(
        "loreft",
        "'loreft' (R with orthonormal rows), 'noreft' (R free), or 'direft' (R free, without '- R h').",
        choices=("loreft", "noreft", "direft"),
    )
    layers: str | list[int] = option("all", "Numbers of the blocks after which hidden states are edited, or 'all'.")
    prefix_positions: int = option(
        3,
        "How many positions at the beginning of each text are edited; padding does not count. Shorter prompts have "
        "the rest among the first new tokens, as in training.",
        minimum=0,
    )
    suffix_positions: int = option(
        0,
        "How many positions at the end of each prompt are edited. A decoder's prompt is what `generate` is given, and "
        "in training what stands before the first label that counts; without either, and in other models, it is the "
        "whole text. Blocks with cross-attention write, and have no prompt.",
        minimum=0,
    )
    r: int = option(1, "Rank: the number of directions in which a hidden state is edited.", minimum=1)
    tied_weights: bool = option(
        False, "Edit the first and the last positions by the same R, W and b.", needs="suffix_positions"
    )
    dropout: float = option(0.05, "Dropout on the edited hidden state.", minimum=0, below=1)
    non_linearity: str | None = option(None, "f: the name of an activation of transformers; the identity if left out.")
    dtype: str | None = option(
        None, "In which the edit is computed; that of its tensors if left out.", choices=(None, *DTYPES)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prefix_positions + self.suffix_positions:
            raise ConfigError("ReftConfig: prefix_positions and suffix_positions are both 0, so nothing is edited.")
        if self.layers != "all":
            # What is no list fails below.
            chosen: Any = self.layers if isinstance(self.layers, list | tuple | range) else [None]
            if not all(type(number) is int and number >= 0 for number in chosen):
                raise ConfigError(f"ReftConfig: layers should be 'all' or numbers of blocks, not {self.layers!r}.")
            self.layers = list(chosen)


class Reft(BlockAdapter):
    """The edits after one block: of the first positions, and of the last ones unless those are tied to them."""

    reft_prefix, reft_suffix = part(nn.ModuleDict), part(nn.ModuleDict)
    positions = setting()

    def create(self, config: ReftConfig, key: str) -> None:
        writes = any(sublayer.role == CROSS for sublayer in self.block.sublayers)
        first, last = self.positions = config.prefix_positions, 0 if writes else config.suffix_positions
        width = width_of(self.base)
        if config.r > width:
            raise ConfigError(f"ReftConfig: r={config.r} is more than the {width} features of {key!r}.")
        if first or config.tied_weights:
            self.reft_prefix = Intervention(config, width)
        if last and not config.tied_weights:
            self.reft_suffix = Intervention(config, width)

    def change(self, h: torch.Tensor) -> torch.Tensor:
        """What is added at the positions: ``[batch, positions, width]``, the first ones before the last."""
        first, last = self.positions
        units = [(self.reft_prefix, first), (self.reft_suffix, last)]
        units = [(self.reft_prefix, first + last)] if self.reft_suffix is None else units  # tied, or no suffix
        parts = h.split([count for _, count in units], 1)
        return torch.cat([unit(x) for (unit, count), x in zip(units, parts) if count], 1)


class ReftLayer(BlockLayer, nn.Module):
    """Wraps a block, whose output is edited at the positions of each adapter; each reads the block's own output."""

    extent: Extent
    composes: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        h = first_output(output)
        y = h
        for adapter, rows in self.acting(h):
            if not isinstance(adapter, Reft):  # a composition
                y = self.changed(adapter, rows, h, y)
            elif (edits := self.edits(adapter, rows, h, h)) is not None:
                y = y.flatten(0, -2).index_add(0, *edits).view(h.shape)
        return output if y is h else with_first(output, y)

    def edits(self, adapter: Reft, rows: Any, h: torch.Tensor, of: torch.Tensor) -> Any:
        """Which tokens of all those in ``h`` an adapter edits, and what is added to them; None where there are none.

        Args:
            rows: those of the batch that are its own, None for all. of: what it reads, shaped like ``h``.
        """
        if (found := self.extent.ends(h, *adapter.positions)) is None:
            return None
        index, valid = found
        places = index + torch.arange(0, len(h) * h.shape[1], h.shape[1], device=h.device)[:, None]
        if rows is not None:
            places, valid = places[rows], valid[rows]
        chosen = of.flatten(0, -2).index_select(0, places.flatten())  # [rows * positions, width]
        chosen = chosen.view(*places.shape, -1)
        change = adapter.change(adapter.cast(chosen)).to(h.dtype).masked_fill(~valid[..., None], 0)
        return places.flatten(), change.flatten(0, 1)

    def changed(self, adapter: Any, rows: Any, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y with what a composition changes of h."""

        def step(leaf: Reft, state: torch.Tensor) -> Change | None:
            if (edits := self.edits(leaf, rows, h, state)) is None:
                return None
            update = torch.zeros_like(state).flatten(0, -2).index_add(0, *edits).view(h.shape)
            return Change(update, state)

        change = change_of(adapter, h, step)
        return y if change is None else y + change.total.to(y.dtype)


class ReftTuner(BlockTuner):
    """Edits the outputs of the blocks in ``config.layers``."""

    def find(self, config: ReftConfig, model: nn.Module) -> list[BlockTarget]:  # type: ignore[override]
        blocks = find_blocks(model)
        wanted = range(len(blocks)) if config.layers == "all" else config.layers
        missing = [number for number in wanted if number not in range(len(blocks))]
        edited = [b for b in blocks if b.index in wanted]
        if not config.prefix_positions:
            edited = [b for b in edited if all(part.role != CROSS for part in b.sublayers)]
        if missing or not edited:
            raise NoMatchingPeftModuleError(
                f"ReftConfig edits nothing after the blocks {config.layers} of {type(model).__name__}: it has "
                f"{len(blocks)} transformer blocks, counted from 0, and those with cross-attention have no suffix."
            )
        return [BlockTarget(b.key, locate(model, b.key).module, block=b) for b in edited]

    def _layer_for(self, model: nn.Module, target: Any, holders: Any) -> Any:
        layer = super()._layer_for(model, target, holders)
        layer.__dict__["extent"] = extent_of(model, target.key.rpartition(".")[0])
        return layer


ReftModel = define_tuner(Reft, ReftConfig, base=ReftTuner, layer=ReftLayer)
