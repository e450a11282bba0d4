"""MixLoRA: W x + s sum_e p_e B_e A_e x over the k experts that a router picks for each token (arXiv 2404.15159)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.families import Sample
from peft.core.filling import draw_like_linear
from peft.core.model.registry import define_tuner
from peft.core.model.threads import OfThread
from peft.errors import PeftWarning
from peft.tuners.routing import imbalance, top_weights


@dataclass
class MixLoraConfig(TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Config of MixLoRA: several LoRAs in each layer, of which each token uses the k that a router picks for it.

    For varied data that one low-rank update has to compromise on. The router is one of each adapted layer; the paper
    has one for each feed-forward block. A term of the loss keeps experts from falling idle. It cannot be merged.
    """

    METHOD: ClassVar[str] = "MIX_LORA"

    r: int = option(8, "Rank of each expert.", minimum=1)
    alpha: float = option(8, "The updates are scaled by alpha / r.")
    num_experts: int = option(4, "Number of the experts.", minimum=1)
    top_k: int = option(2, "How many experts a token uses.", minimum=1)
    balance: float = option(
        0.01, "Weight in the loss of how unevenly the experts are used; 1 is even. 0 leaves that out.", minimum=0
    )
    dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise B is random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than there are experts, num_experts={self.num_experts}.")


def mixed_experts(h: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(w_1 A_1 x; ...; w_E A_E x) of ``A x``, the experts one below the other: s B times it is dW x.

    Args:
        h: ``[..., groups * experts * r]``. weights: ``[..., groups, experts]``.
    """
    parts = h.unflatten(-1, (*weights.shape[-2:], -1))  # [..., groups, experts, r]
    return (parts * weights.unsqueeze(-1)).flatten(-3)


class Uneven(OfThread):
    """How unevenly the experts were used in the last call in training; it has a graph, so no copy has it."""

    of_call: torch.Tensor | None = None


class MixLora(Sample):
    """A is ``[experts * r, in * kernel]``, B ``[out, experts * r]``, the router ``[experts, in * kernel]``."""

    mix_A, mix_B, mix_router = part(), part(), part()
    mix_scale, mix_top_k, mix_uneven, mix_dropout = setting(), setting(), setting(), input_dropout()
    because = "its experts are picked by the input"
    loss_weight: ClassVar[str] = "balance"

    def create(self, config: MixLoraConfig, key: str) -> None:
        (out, columns), r, experts = fan(self.shape), config.r, config.num_experts
        a, b, router = torch.empty(experts * r, columns), torch.zeros(out, experts * r), torch.empty(experts, columns)
        for matrix in (a, router) if config.init_weights else (a, router, *b.split(r, 1)):
            draw_like_linear(matrix)
        self.mix_A, self.mix_B, self.mix_router = nn.Parameter(a), nn.Parameter(b), nn.Parameter(router)
        self.mix_scale, self.mix_top_k = config.alpha / r, config.top_k
        self.mix_dropout, self.mix_uneven = config.dropout, Uneven()

    def update(self, x: torch.Tensor) -> torch.Tensor:
        kind, base, experts = self.kind, self.base, len(self.mix_router)
        chances = kind.channels_last(self.down(x, self.mix_router)).unflatten(-1, (-1, experts)).softmax(-1)
        weights = top_weights(chances, self.mix_top_k)  # [batch, ..., groups, experts]
        if self.training:  # for the loss, see `loss_term`
            self.mix_uneven.of_call = imbalance(chances, weights, self.counted(chances))
        h = kind.channels_last(self.down(x if kind.lookup else self.mix_dropout(x), self.mix_A))
        return kind.up(base, kind.channels_back(mixed_experts(h, weights)), self.mix_scale * self.mix_B)

    def loss_term(self) -> torch.Tensor | None:
        # Once: after the backward pass its graph is gone.
        uneven, self.mix_uneven.of_call = self.mix_uneven.of_call, None
        if not self.training or uneven is None:
            return None
        if torch.is_grad_enabled() and self.mix_router.requires_grad and not uneven.requires_grad:
            warnings.warn(
                "the routers of MixLoRA are not balanced: what they give has no gradient, as under reentrant "
                'gradient checkpointing. Use gradient_checkpointing_kwargs={"use_reentrant": False}.',
                PeftWarning,
            )
        return uneven.float()

    def counted(self, chances: torch.Tensor) -> torch.Tensor | None:
        """1 for each token, 0 for padding, ``[batch, tokens, groups]``; None where no mask fits the positions."""
        batch, tokens = chances.shape[:2]
        mask = self.context.padding(batch, tokens, chances.device) if chances.dim() == 4 else None
        return None if mask is None else mask.unsqueeze(-1).expand(chances.shape[:-1])


MixLoraModel = define_tuner(MixLora, MixLoraConfig)
