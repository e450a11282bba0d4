"""PEANuT: dW = s B N(W)^T, N a small network that reads the frozen weight (arXiv 2410.01870)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import part, setting
from peft.core.families import LowRank, ScaledBy
from peft.core.filling import draw_like_linear
from peft.core.model.registry import define_tuner
from peft.kernels.remake import remade
from peft.peft_types import PeftType
from peft.tuners.activations import activation


@dataclass
class PeanutConfig(TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Config of PEANuT: a low-rank update whose one factor is computed from the weight by a trained network.

    Use it where a LoRA of the same size is too weak: the network makes the update a non-linear function of the
    weight; in inference it can be merged like a LoRA.
    """

    METHOD: ClassVar[PeftType] = PeftType.PEANUT

    r: int = option(32, "Width of the network, and rank of the update.", minimum=1)
    depth: int = option(0, "Pairs of an encoder and a decoder layer between the first and the last one.", minimum=0)
    act_fn: str = option("relu", "The non-linearity, by its name in transformers.")
    scaling: float = option(1.0, "The update is scaled by this.", stuck=0)
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.act_fn, "PeanutConfig: act_fn")


def peanut(
    weight: torch.Tensor,
    a: torch.Tensor,
    encoders: Sequence[torch.Tensor],
    decoders: Sequence[torch.Tensor],
    f: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """H^T of dW = s B H^T, ``[r, in]``: H = f(W^T A^T); encoders keep H and make f(H E^T) of it; decoders make
    f(H D^T) and add the H that the encoder across from them kept.

    Args:
        weight: W ``[out, in]``. a: A ``[r, out]``. encoders, decoders: matrices ``[r, r]``. f: the non-linearity.
    """
    h, kept = f(F.linear(weight.T, a)), []  # [in, r]
    for encoder in encoders:
        kept.append(h)
        h = f(F.linear(h, encoder))
    for decoder in decoders:
        h = f(F.linear(h, decoder)) + kept.pop()
    return h.T


class Peanut(LowRank, ScaledBy):
    """dW = s B H^T with H ``[in * kernel, r]`` that a network makes of the weight: :func:`peanut`."""

    peanut_A, peanut_B, peanut_encoders = part(nn.ModuleDict), part(nn.ModuleDict), part(nn.ModuleDict)
    peanut_decoders = part(nn.ModuleDict)
    act_fn = setting(nn.ModuleDict)
    reversible = False  # while merged, the network would read another weight
    requires_dense_base = True

    def create(self, config: PeanutConfig, key: str) -> None:
        r, rows = config.r, self.shape[0]
        self.scale_by(config.scaling)
        self.act_fn = activation(config.act_fn, "PeanutConfig: act_fn")
        self.peanut_A, self.peanut_B = nn.Linear(rows, r, bias=False), nn.Linear(r, rows, bias=False)
        if config.depth:
            self.peanut_encoders, self.peanut_decoders = (
                nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(config.depth)) for _ in range(2)
            )
        linears = [self.peanut_A, *(self.peanut_encoders or ()), *(self.peanut_decoders or ()), self.peanut_B]
        for linear in linears:
            draw_like_linear(linear.weight)
        if config.init_weights:
            nn.init.zeros_(self.peanut_B.weight)

    def network(self) -> torch.Tensor:
        """H^T, ``[r, in * kernel]``."""
        a = self.peanut_A.weight
        encoders, decoders = (
            [linear.weight for linear in held or ()] for held in (self.peanut_encoders, self.peanut_decoders)
        )
        return peanut(self.base_weight().flatten(1).to(a.dtype), a, encoders, decoders, self.act_fn)

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.sums_exactly() and torch.is_grad_enabled():  # a copy of the weight is not kept
            h = remade(self.network)
        else:
            h = self.network()
        return h, self.peanut_B.weight * self.scaling


PeanutModel = define_tuner(Peanut, PeanutConfig)
