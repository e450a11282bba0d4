"""How the pairs of LoRA start (``init_lora_weights``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.core.layer.rewritten import rewrite
from peft.core.layer.weight import base_weight


if TYPE_CHECKING:
    from peft.tuners.lora.config import LoraConfig
    from peft.tuners.lora.layer import Lora


def is_drawn(config: LoraConfig) -> bool:
    """Whether A and B start without regard to the base weight, and leave it alone."""
    return config.init_lora_weights in (True, False, "gaussian", "orthogonal")


def initialize(lora: Lora, config: LoraConfig) -> None:
    """Fill A and B of a fresh adapter. Every choice but False makes dW = 0."""
    init = config.init_lora_weights
    _as_torch_does(lora)  # first in any case: then a seed gives the numbers that it gives elsewhere
    if init is False:
        return
    a, b = lora.held_pair()
    with torch.no_grad():
        if init == "orthogonal":
            for down, up in lora.kind.pairs(lora.base, a, b):
                _orthogonal(down, up)
        elif init == "loftq":
            _loftq(lora, a, b, config)
        elif lora.kind.lookup:
            a.zero_()
            b.normal_()
        else:
            _zero_up(a, b, std=1 / lora.r if init == "gaussian" else None)
        if lora.lora_bias:
            lora.lora_B.bias.zero_()


def _as_torch_does(lora: Lora) -> None:
    if lora.kind.lookup:
        with torch.no_grad():
            for table in lora.held_pair():
                table.normal_()
    else:
        lora.lora_A.reset_parameters()
        lora.lora_B.reset_parameters()


def _zero_up(a: torch.Tensor, b: torch.Tensor, std: float | None) -> None:
    """A normal with this standard deviation, by default uniform in +-1/sqrt(fan_in); B zero."""
    if std is None:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    else:
        nn.init.normal_(a, std=std)
    b.zero_()


def _loftq(lora: Lora, a: torch.Tensor, b: torch.Tensor, config: LoraConfig) -> None:
    """W becomes what is left of it in few bits, and s B A fits the rest (LoftQ)."""
    from peft.utils.loftq_utils import loftq_init

    options: Any = config.loftq_config
    bits, turns = (options.get("loftq_bits", 4), options.get("loftq_iter", 1)) if isinstance(options, dict) else (
        options.loftq_bits, options.loftq_iter
    )  # fmt: skip
    weight = base_weight(lora.layer)
    with weight.device:  # the pair may be on the meta device, to be loaded later; the weight is not
        rounded, down, up = loftq_init(weight, bits, lora.r, turns)
    rewrite(lora.layer, lora.name, rounded)
    a.copy_(down)
    b.copy_(up / lora.scaling)


def _orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """A and B from the odd and the even rows of one random orthogonal matrix: B A = 0, neither factor is."""
    r = a.shape[0]
    if r % 2:
        raise ValueError(
            f"init_lora_weights='orthogonal' needs an even rank, and in this layer each group has rank {r}; choose "
            "another r, for instance with rank_pattern."
        )
    q, _ = torch.linalg.qr(torch.randn(r, r))
    a.copy_((torch.randn(a[0].numel(), r // 2) @ q[0::2]).T.view_as(a) / 10)
    b.copy_((torch.randn(r // 2, b.shape[0]).T @ q[1::2]).view_as(b) / 10)
