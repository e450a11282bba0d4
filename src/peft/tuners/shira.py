"""SHiRA: W' = W + a sparse update, at positions drawn once and for all (arXiv 2406.13175)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, ModulesToSave, TargetModules, option
from peft.core.adapter import part
from peft.core.addition import SideBySide
from peft.core.base.kinds import Kind, fan
from peft.core.families import ScaledBy, Sparse
from peft.core.filling import skip_values
from peft.core.layer.buffers import BufferDict
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> torch.Tensor:
    """A mask ``[out, in]`` with ``r (out + in)`` random ones, like the weight of ``base_layer``.

    Args:
        random_seed: seed of the draw; None: the global one.
    """
    shape = base_layer.weight.shape
    rows, columns = fan(tuple(shape))
    generator = None if random_seed is None else torch.Generator("cpu").manual_seed(random_seed)
    # On the CPU: a seed means the same mask on every device, and a skeleton has none to draw on.
    chosen = torch.randperm(rows * columns, generator=generator, device="cpu")[: r * (rows + columns)]
    return torch.zeros(rows * columns, device="cpu").index_fill(0, chosen, 1).view(shape)


@dataclass
class ShiraConfig(TargetModules, FanInFanOut, ModulesToSave):
    """Config of SHiRA: trains few entries of each weight, as many as a LoRA of rank r has numbers.

    Use it for adapters that are switched fast or merged with others: they hardly overlap. Set ``config.mask_fn`` to a
    function ``(base_layer, r, **kwargs) -> mask`` to choose the entries otherwise; the mask is shaped like W, and has
    ``r (out + in)`` ones. The positions are written into the file, so loading needs no such function.
    """

    METHOD: ClassVar[PeftType] = PeftType.SHIRA

    r: int = option(32, "Each layer trains r (out + in) entries of its weight.", minimum=1)
    mask_type: str = option(
        "random",
        "How the entries are chosen, unless mask_fn is set; with anything but 'random' it has to be.",
    )
    random_seed: int | None = option(None, "Seed of that choice; None: the global random numbers.")
    init_weights: bool = option(True, "Start with zeros, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_fn: Callable[..., torch.Tensor] = random_mask


def shira_entries(
    values: torch.Tensor, indices: torch.Tensor, columns: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dW is s values[k] at the row and column ``indices[:, k]`` of ``[out, in * kernel]``, and 0 elsewhere.

    Args:
        values: ``[n]``. indices: ``[2, n]``. columns: ``in * kernel``.

    Returns:
        Places in the flat dW and the numbers there, ``[n]`` each.
    """
    rows, inner = indices.long()
    return rows * columns + inner, values * scaling


class Shira(Sparse, ScaledBy):
    """dW holds ``shira_weight[k]`` at the row and column ``shira_indices[:, k]`` of ``[out, in * kernel]``."""

    shira_weight = part()
    shira_indices = part(BufferDict)
    adds = SideBySide("shira_weight", shira_weight=0, shira_indices=1)

    def create(self, config: ShiraConfig, key: str) -> None:
        rows, columns = fan(self.shape)
        count = config.r * (rows + columns)
        if count > rows * columns:
            most = rows * columns // (rows + columns)
            raise ValueError(
                f"r={config.r} trains {count} entries, and the weight of {key or 'the layer'} has only "
                f"{rows * columns}. Choose r of at most {most}, or leave that module out of target_modules."
            )
        values = torch.zeros(count) if config.init_weights else torch.randn(count)
        indices = torch.empty(2, count, dtype=torch.int32)
        if not values.is_meta:  # otherwise the file brings them
            indices = chosen_entries(config, self.base, self.kind, (rows, columns))
        self.scale_by(1.0)
        self.shira_weight, self.shira_indices = nn.Parameter(values), indices

    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        return shira_entries(self.shira_weight, self.shira_indices, fan(self.shape)[1], self.scaling)


def chosen_entries(config: ShiraConfig, base: nn.Module, kind: Kind, shape: tuple[int, int]) -> torch.Tensor:
    """Rows and columns ``[2, n]`` of the entries that a config trains of a weight ``[out, in * kernel]``."""
    (rows, columns), count = shape, config.r * sum(shape)
    # A file brings the entries, so that nothing has to choose them.
    if config.mask_type != "random" and config.mask_fn is random_mask and not skip_values():
        raise ValueError(
            f"mask_type={config.mask_type!r} needs a function that chooses the entries: set config.mask_fn to it, or "
            "mask_type to 'random'."
        )
    if config.mask_fn is random_mask:  # drawn for the weight as methods see it, however it is kept
        mask = random_mask(_Shaped(torch.empty(rows, columns, device="meta")), config.r, config.random_seed)
    else:
        mask = kind.orient(config.mask_fn(base, config.r, random_seed=config.random_seed), base)
    if mask.numel() != rows * columns or int((mask != 0).sum()) != count:
        raise ValueError(
            f"mask_fn gave a mask of shape {list(mask.shape)} with {int((mask != 0).sum())} entries; wanted is "
            f"one shaped like the weight with r (out + in) = {count} entries."
        )
    return mask.reshape(rows, columns).nonzero().T.to(dtype=torch.int32, device="cpu").contiguous()


class _Shaped(nn.Module):
    """A module that has a weight of a shape, for mask functions."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight


ShiraModel = define_tuner(Shira, ShiraConfig)
