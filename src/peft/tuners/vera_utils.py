"""What VeRA and PVeRA share: config fields, the frozen random pair of the whole model, how vectors start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.layer.layer import BaseTunerLayer
from peft.kernels.made_again import made_again


@dataclass
class SharedPairConfig(TargetModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Fields of the methods with a frozen random pair A, B for the whole model and trained vectors for each layer."""

    r: int = option(256, "Rank of the pair. Large, as only a few numbers for each rank are trained.", minimum=1)
    projection_prng_key: int = option(0, "Seed of A and B.")
    save_projection: bool = option(
        True, "Write A and B into the file. Without, they are drawn again from projection_prng_key when it is loaded."
    )
    d_initial: float = option(0.1, "What d starts at.", needs="init_weights", stuck=0)
    init_weights: bool = option(True, "Start with b = 0, so that nothing changes; otherwise b = 1 and d is random.")


def shared_pair(
    rows: int, columns: int, seed: int, layers: Sequence[BaseTunerLayer]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[rows, largest in]`` and B ``[largest out, columns]``, uniform in +-sqrt(6 / second size)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        bound = math.sqrt(6 / shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    sizes = [fan(layer.shape) for layer in layers]
    return draw(rows, max(inner for _, inner in sizes)), draw(max(out for out, _ in sizes), columns)


def vectors(out: int, ranks: int, config: SharedPairConfig) -> tuple[nn.Parameter, nn.Parameter]:
    """b ``[out]`` and d ``[ranks]`` as they start."""
    b, d = torch.ones(out), torch.randn(ranks)
    if config.init_weights:
        b, d = torch.zeros(out), d.fill_(config.d_initial)
    return nn.Parameter(b), nn.Parameter(d)


class ScaledTable(torch.autograd.Function):
    """``diag(rows) table diag(columns)``, of which autograd keeps the two vectors and the frozen table, no product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: torch.Tensor, table: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Rows ``[n]``, table ``[n, m]``, columns ``[m]``."""
        return (table * rows[:, None]).mul_(columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:  # type: ignore[override]
        rows, table, columns = ctx.saved_tensors
        each = gradient * table
        return each @ columns, None, rows @ each


def vera_pair(
    a: torch.Tensor, b: torch.Tensor, lambda_d: torch.Tensor, lambda_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B' of dW = diag(b) B diag(d) A = B' A.

    Args:
        a: A ``[r, in]``. b: B ``[out, r]``. lambda_d: d ``[r]``. lambda_b: b ``[out]``.
    """
    return a, made_again(ScaledTable.apply, lambda_b, b, lambda_d)
