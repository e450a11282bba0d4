"""CoMoL: W x + s B (sum_e p_e C_e) A x, p = softmax(R A x) of the token, cores C_e [r, r] (arXiv 2603.00573)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.families import Sample
from peft.core.filling import kaiming, zeros
from peft.core.model.registry import define_tuner
from peft.tuners.routing import top_weights


@dataclass
class ComolConfig(TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Config of CoMoL: a mixture of experts inside the r dimensions of one LoRA.

    For varied data, where several LoRAs with a router would help and their size is too much: an expert is r x r
    numbers, and so is the router. Each token mixes the experts for itself. It cannot be merged.
    """

    METHOD: ClassVar[str] = "COMOL"

    r: int = option(8, "Rank of A and B, which all experts share.", minimum=1)
    alpha: float = option(8, "The update is scaled by alpha / r.")
    num_experts: int = option(4, "Number of the cores.", minimum=1)
    top_k: int | None = option(None, "How many cores a token mixes, its most likely ones; None for all.", minimum=1)
    dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise B is random.")


def mixed_cores(h: torch.Tensor, cores: torch.Tensor, router: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """(sum_e p_e C_e) h with p = softmax(R h), ``[..., r]``.

    Args:
        h: A x ``[..., r]``. cores: ``[experts, r, r]``. router: R ``[experts, r]``.
        top_k: how many of the p_e are kept.
    """
    weights = top_weights((h @ router.T).softmax(-1), top_k)
    each = torch.einsum("eij,...j->...ei", cores, h)  # which is less than a core for each token
    return torch.einsum("...e,...ei->...i", weights, each)


class Comol(Sample):
    """A is ``[r, in * kernel]``, B ``[out, r]``, the cores ``[experts, r, r]``, the router ``[experts, r]``.

    The cores start near the identity, apart from each other, so the start is that of one LoRA.
    """

    comol_A, comol_B, comol_cores, comol_router = part(), part(), part(), part()
    comol_scale, comol_top_k, comol_dropout = setting(), setting(), input_dropout()
    because = "its cores are mixed by the input"

    def create(self, config: ComolConfig, key: str) -> None:
        (out, columns), r, experts = fan(self.shape), config.r, config.num_experts
        self.comol_A, self.comol_router = kaiming(r, columns), kaiming(experts, r)
        self.comol_B = zeros(out, r) if config.init_weights else kaiming(out, r)
        self.comol_cores = nn.Parameter(torch.eye(r) + torch.randn(experts, r, r) / (4 * r**0.5))
        self.comol_scale, self.comol_top_k = config.alpha / r, config.top_k
        self.comol_dropout = config.dropout

    def update(self, x: torch.Tensor) -> torch.Tensor:
        kind, base = self.kind, self.base
        h = kind.channels_last(self.down(self.dropped(x), self.comol_A))
        pieces = h.unflatten(-1, (-1, len(self.comol_A)))  # [batch, ..., groups, r]
        mixed = mixed_cores(pieces, self.comol_cores, self.comol_router, self.comol_top_k)
        return kind.up(base, kind.channels_back(mixed.flatten(-2)), self.comol_scale * self.comol_B)


ComolModel = define_tuner(Comol, ComolConfig)
