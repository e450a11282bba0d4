"""PEANuT: dW = s B N(W)^T, N a small network that reads the frozen weight (arXiv 2410.01870)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.families.families import LowRankLayer, ScaledLayer
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


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
    scaling: float = option(1.0, "The update is scaled by this.")
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.act_fn)


def activation(name: str) -> nn.Module:
    """A non-linearity of transformers.

    Raises:
        ConfigError: there is none of that name.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"PeanutConfig: act_fn={name!r} is none of {', '.join(sorted(ACT2FN))}.")
    return ACT2FN[name]


class PeanutLayer(LowRankLayer, ScaledLayer):
    """dW = s B H^T with H ``[in * kernel, r]``: H = f(W^T A^T); encoders keep H and make f(E H) of it; decoders make
    f(D H) and add the H that the encoder across from them kept.
    """

    weights: ClassVar[dict[str, type]] = dict.fromkeys(
        ("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"), nn.ModuleDict
    )
    settings: ClassVar[dict[str, type]] = {"configured": dict, "scaling": dict, "act_fn": nn.ModuleDict}
    reversible = False  # while merged, the network would read another weight
    reads_weight = True

    def update_layer(self, name: str, config: PeanutConfig, key: str) -> None:
        r, rows = config.r, self.shape[0]

        def square() -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(config.depth))

        self.put(name, configured=config.scaling, scaling=config.scaling, act_fn=activation(config.act_fn))
        self.put(name, peanut_A=nn.Linear(rows, r, bias=False), peanut_B=nn.Linear(r, rows, bias=False))
        if config.depth:
            self.put(name, peanut_encoders=square(), peanut_decoders=square())
        parts = (self.peanut_A, self.peanut_encoders, self.peanut_decoders, self.peanut_B)
        for linear in (m for part in parts if name in part for m in part[name].modules() if isinstance(m, nn.Linear)):
            if linear is self.peanut_B[name] and config.init_weights:
                nn.init.zeros_(linear.weight)
            else:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))

    def initial_scaling(self, name: str) -> float:
        return self.configured[name]

    def network(self, name: str) -> torch.Tensor:
        """H^T, ``[r, in * kernel]``."""
        f, a, kept = self.act_fn[name], self.peanut_A[name].weight, []
        h = f(nn.functional.linear(self.unmerged_weight().flatten(1).T.to(a.dtype), a))
        if name in self.peanut_encoders:
            for encoder in self.peanut_encoders[name]:
                kept.append(h)
                h = f(encoder(h))
            for decoder in self.peanut_decoders[name]:
                h = f(decoder(h)) + kept.pop()
        return h.T

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.sums_exactly() and torch.is_grad_enabled():  # a copy of the weight is not kept
            h = checkpoint(self.network, name, use_reentrant=False, preserve_rng_state=False)
        else:
            h = self.network(name)
        return h, self.peanut_B[name].weight * self.scaling[name]


PeanutModel = define_tuner(
    "PeanutModel",
    PeanutLayer,
    PeanutConfig,
    prefix="peanut_",
    targets=TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING,
)
