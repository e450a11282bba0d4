"""SHiRA: W' = W + a sparse update, at positions drawn once and for all (arXiv 2406.13175)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, ModulesToSave, TargetModules, option
from peft.core.base.kinds import fan
from peft.core.families.families import ScaledLayer, SparseLayer
from peft.core.layer.buffers import BufferDict
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> torch.Tensor:
    """A mask ``[out, in]`` with ``r (out + in)`` random ones, like the weight of ``base_layer``.

    Args:
        random_seed: seed of the draw; None: the global one.
    """
    shape = base_layer.weight.shape
    rows, columns = fan(tuple(shape))
    generator = None if random_seed is None else torch.Generator("cpu").manual_seed(random_seed)
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
    mask_type: str = option("random", "How the entries are chosen, unless mask_fn is set.", choices=("random",))
    random_seed: int | None = option(None, "Seed of that choice; None: the global random numbers.")
    init_weights: bool = option(True, "Start with zeros, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_fn: Callable[..., torch.Tensor] = random_mask


class ShiraLayer(SparseLayer, ScaledLayer):
    """dW holds ``shira_weight[k]`` at the row and column ``shira_indices[:, k]`` of ``[out, in * kernel]``."""

    weights: ClassVar[dict[str, type]] = {"shira_weight": nn.ParameterDict, "shira_indices": BufferDict}
    settings: ClassVar[dict[str, type]] = {"scaling": dict}
    linear: ClassVar[tuple[str, ...]] = ("shira_weight",)
    stacked: ClassVar[dict[str, int]] = {"shira_weight": 0, "shira_indices": 1}

    def update_layer(self, name: str, config: ShiraConfig, key: str) -> None:
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
            indices = self._choose(config, count)
        self.put(name, scaling=1.0, shira_weight=nn.Parameter(values), shira_indices=indices)

    def _choose(self, config: ShiraConfig, count: int) -> torch.Tensor:
        base, (rows, columns) = self.get_base_layer(), fan(self.shape)
        if config.mask_fn is random_mask:  # drawn for the weight as methods see it, however it is kept
            mask = random_mask(_Shaped(torch.empty(rows, columns, device="meta")), config.r, config.random_seed)
        else:
            mask = config.mask_fn(base, config.r, random_seed=config.random_seed)
            mask = self.kind.orient(mask, base)
        if mask.numel() != rows * columns or int((mask != 0).sum()) != count:
            raise ValueError(
                f"mask_fn gave a mask of shape {list(mask.shape)} with {int((mask != 0).sum())} entries; wanted is "
                f"one shaped like the weight with r (out + in) = {count} entries."
            )
        return mask.reshape(rows, columns).nonzero().T.to(dtype=torch.int32, device="cpu").contiguous()

    def initial_scaling(self, name: str) -> float:
        return 1.0

    def entries(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = self.shira_indices[name].long()
        return rows * fan(self.shape)[1] + columns, self.shira_weight[name] * self.scaling[name]


class _Shaped(nn.Module):
    """A module that has a weight of a shape, for mask functions."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight


ShiraModel = define_tuner(
    "ShiraModel",
    ShiraLayer,
    ShiraConfig,
    prefix="shira_",
    targets=TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING,
)
