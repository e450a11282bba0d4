"""Lily: W x + s (sum_e p_e B_e) A x, p the mean of softmax(R A x); A and the B_e are shared (arXiv 2407.09946)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import part, setting
from peft.core.base.kinds import fan
from peft.core.families import Sample
from peft.core.gates import mean_of_tokens
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType


@dataclass
class LilyConfig(TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Config of Lily: low-rank pairs that layers share, with the B chosen by the input.

    For when one adapter has to cover varied inputs at few parameters: neighbouring layers share A, all layers of a
    kind share a set of experts B, and each sample mixes these by a small router in each layer. It cannot be merged.
    """

    METHOD: ClassVar[PeftType] = PeftType.LILY

    r: int = option(32, "Rank of A and of each expert B.", minimum=1)
    stride_A: int = option(
        1, "How many neighbouring layers, of those with the same name and shape, share an A.", minimum=1
    )
    num_B: int = option(2, "Experts B, shared by all layers with the same name and shape.", minimum=1)
    scaling: float = option(1.0, "Factor of the update.", stuck=0)
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise B is random.")
    routing: str = option(
        "sample",
        "Over what the weights of the experts are averaged. 'sample': the tokens of a sample, padding left out where "
        "the model gets an attention mask. 'token': nothing, so that a token does not depend on later ones. 'batch': "
        "all tokens of the batch; the output for a sample then depends on its neighbours. Files that do not say "
        "were trained so.",
        choices=("sample", "token", "batch"),
    )

    @classmethod
    def check_kwargs(cls, /, **kwargs: Any) -> dict:
        """Files without ``routing`` come from an implementation that averages over the batch."""
        # Files that do not say it are older.
        return {"routing": "batch", **kwargs} if "peft_version" in kwargs else kwargs


def lily_chances(h: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """softmax(R A x): the weights of the experts at each position, ``[..., num_B]``.

    Args:
        h: A x ``[..., r]``. router: R ``[num_B, r]``.
    """
    return F.linear(h, router).softmax(-1)


def lily_experts(chances: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """sum_e p_e B_e, ``[..., r, out]``.

    Args:
        chances: p ``[..., num_B]``. experts: the B_e ``[num_B, r, out]``.
    """
    return torch.einsum("...e,ero->...ro", chances, experts)


class Lily(Sample):
    """y' = y + s (sum_e p_e B_e) A x, p the average of softmax(R A x).

    ``lily_A.weight`` is ``[r, in * kernel]``, ``lily_B.weight`` ``[num_B * r, out]``, ``lily_router.weight``
    ``[num_B, r]``.
    """

    lily_A, lily_B, lily_router = part(nn.ModuleDict), part(nn.ModuleDict), part(nn.ModuleDict)
    r, num_B, scaling, routing = setting(), setting(), setting(), setting()
    because = "its routing depends on the sample"

    @classmethod
    def share(cls, config: LilyConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        return shared_matrices(config, layers)

    def create(self, config: LilyConfig, key: str) -> None:
        self.lily_router = nn.Linear(config.r, config.num_B, bias=False)
        self.r, self.num_B, self.scaling, self.routing = config.r, config.num_B, config.scaling, config.routing

    def update(self, x: torch.Tensor) -> torch.Tensor:
        base, r, kind = self.base, self.r, self.kind
        h = self.down(x, self.lily_A.weight)
        pieces = kind.channels_last(h).unflatten(-1, (-1, r))  # [batch, ..., groups, r]
        chances = lily_chances(pieces, self.lily_router.weight)
        experts, scale = self.lily_B.weight, self.scaling  # the chances are scaled, which are few
        if self.routing == "token":  # (sum_e p_e B_e) h with the p_e on h: no matrix for each token
            each = ((chances * scale).unsqueeze(-1) * pieces.unsqueeze(-2)).flatten(
                -3
            )  # [batch, ..., groups * num_B * r]
            return kind.up(base, kind.channels_back(each), experts.T)
        experts = experts.unflatten(0, (-1, r))  # [num_B, r, out]
        if self.routing == "batch":
            mean = mean_of_tokens(chances.flatten(0, -2)[None], None)[0] * scale
            return kind.up(base, h, lily_experts(mean, experts).T)
        return self.each_up(h, lily_experts(self.average(chances) * scale, experts))

    def average(self, chances: torch.Tensor) -> torch.Tensor:
        """The mean over the positions of each sample, without padding, ``[batch, num_B]``."""
        flat = chances.flatten(1, -2)  # [batch, positions * groups, num_B]
        return mean_of_tokens(flat, self.context.padding(len(flat), flat.shape[1], flat.device))


def shared_matrices(config: LilyConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
    """A for neighbours, and the experts for all layers, of those with the same last name and shape."""
    alike: dict[tuple, list[nn.Module]] = {}
    experts: dict[tuple, nn.Module] = {}
    first, second = [], []
    for layer in layers:
        rows, columns = fan(layer.shape)
        group = (layer.key.rpartition(".")[2], layer.shape)
        known = alike.setdefault(group, [])
        new = len(known) % config.stride_A == 0
        known.append(nn.Linear(columns, config.r, bias=False) if new else known[-1])
        if group not in experts:
            experts[group] = nn.Linear(rows, config.num_B * config.r, bias=False)
            if config.init_weights:
                nn.init.zeros_(experts[group].weight)
        first.append(known[-1])
        second.append(experts[group])
    return {"lily_A": first, "lily_B": second}


LilyModel = define_tuner(Lily, LilyConfig)
