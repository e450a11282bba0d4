"""MiCA: B holds the smallest left singular vectors of W and stays as it is; only A is trained (arXiv 2604.01694)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from peft.core.base.kinds import Kind
from peft.core.filling import skip_values
from peft.errors import ConfigError
from peft.kernels.decompositions import svd
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Lora


def minor_directions(weight: torch.Tensor, r: int) -> torch.Tensor:
    """The left singular vectors ``[out, r]`` of the r smallest singular values of W ``[out, in]``, in float32.

    Raises:
        ValueError: if W has fewer than r singular values.
    """
    if r > min(weight.shape):
        raise ConfigError(
            f"init_lora_weights='mica' takes r singular vectors of each weight, and one of shape "
            f"{tuple(weight.shape)} has {min(weight.shape)}, fewer than r={r}. Lower the rank there, by rank_pattern."
        )
    return svd(weight.float())[0][:, -r:]


class Mica(Lora):
    """dW = s B A, B ``[out, r]`` frozen at the minor directions of W, A ``[r, in]`` from zero.

    What the model uses least changes first. A convolution's kernel counts as the matrix ``[out, in * kernel]``. B is
    saved like any other, and what is loaded is what was saved: there is no second decomposition.
    """

    untrained: ClassVar[frozenset[str]] = frozenset({"lora_B", "lora_embedding_B"})
    needs_dense_pair = "MiCA takes singular vectors of the weight that the pair changes"

    @classmethod
    def asked_by(cls, config: LoraConfig) -> bool:
        return config.init_lora_weights == "mica"

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if config.lora_bias:
            return "MiCA trains A alone, so a bias of B (lora_bias) would never change"
        return super().refuses(kind, module, config)

    def make_pair(self, config: LoraConfig) -> None:
        self.allocate(self.r)
        self.held_pair()[1].requires_grad_(False)
        if not skip_values():
            self.start(config)

    @torch.no_grad()
    def start(self, config: LoraConfig) -> None:
        a, b = self.held_pair()
        a.zero_()
        if not b.is_meta:
            b.copy_(minor_directions(self.base_weight().flatten(1), self.r).view_as(b))
