"""What VeRA and PVeRA share: config fields, the frozen random pair of the whole model, how vectors start, kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.layer.layer import BaseTunerLayer
from peft.kernels.autocast import is_autocast
from peft.kernels.linear import base_output, is_eager
from peft.kernels.remake import is_recomputed


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

    generate_vmap_rule = True  # torch.func.vmap refuses a function without a rule

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
    return a, ScaledTable.apply(lambda_b, b, lambda_d)


_READ = WeakTensorKeyDictionary()
"""Inputs that are there, with what is true of them and of A, A x, and the layers that have used it."""


def projected(layer: BaseTunerLayer, x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """A x as ``[n, rows of A]``, once for all layers that read one input (q, k and v; gate and up), as they share A.

    Their backward passes share it too: autograd sums up what they give, and multiplies that by A once.

    Returns:
        A x, and whether another layer has made it.
    """
    key = x._version, a.data_ptr(), a._version, a.shape, a.stride()
    found = _READ.get(x)
    # a layer that reads its input again is in another call, whose backward pass may come after that of the first
    if found is not None and found[0] == key and layer not in found[2]:
        found[2].add(layer)
        return found[1], True
    h = torch.mm(x.reshape(-1, x.shape[-1]), a.T)
    if x.grad_fn is not None or not x.requires_grad:  # the graph of what is made of a leaf would keep the leaf alive
        _READ[x] = key, h, WeakSet((layer,))
    return h, False


def fused(layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> Any | None:
    """The one adapter of a linear layer in a training step, if it may compute the whole layer with x; else None."""
    if len(adapters) > 1 or not torch.is_grad_enabled() or not is_eager(x) or is_autocast(x.device.type):
        return None
    matrix = layer.kind.matrix and not layer.kind.opaque and x.dtype == adapters[0].dtype
    return adapters[0] if matrix and not is_recomputed() else None


def raised(
    layer: BaseTunerLayer,
    x: torch.Tensor,
    h: torch.Tensor,
    d: torch.Tensor | None,
    b: torch.Tensor,
    table: torch.Tensor,
    keeps: bool,
) -> torch.Tensor:
    """The layer's output and ``b * (B (d * h))``.

    Args:
        x: ``[..., in]``. h: ``[n, r]``. d: ``[r]``, or None for ones. b: ``[out]``. table: B ``[out, r]``, frozen.
        keeps: keep B (d * h) for the gradient of b, and do not multiply once more.
    """
    weight = layer.bypass_matrix(x)
    y = base_output(layer._modules["base_layer"], x, weight, weight is None and layer.base_is_fresh())
    if y.dtype == h.dtype:
        return Raised.apply(y, h, d, b, table, keeps)
    return y + (F.linear(_times(h, d), table) * b).view_as(y)


def _times(h: torch.Tensor, d: torch.Tensor | None) -> torch.Tensor:
    return h if d is None else h * d


class Raised(torch.autograd.Function):
    """y + b * (B (d * h)), in place of y; see :func:`raised`."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        h: torch.Tensor,
        d: torch.Tensor | None,
        b: torch.Tensor,
        table: torch.Tensor,
        keeps: bool,
    ) -> torch.Tensor:
        ctx.mark_dirty(y)  # the base's output, which nothing else reads, is added to in place
        u, z, flat = None, _times(h, d), y.view(-1, y.shape[-1])
        if keeps:
            u = torch.mm(z, table.T)
            flat.addcmul_(u, b)
        else:
            flat.addmm_(z, (table * b[:, None]).T)
        ctx.save_for_backward(h, d, b, table, u)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        h, d, b, table, u = ctx.saved_tensors
        _, needs_h, needs_d, needs_b, *_ = ctx.needs_input_grad
        dy, dh, dd, db = gradient.reshape(-1, len(b)), None, None, None
        if needs_h or needs_d:  # b goes to the smaller one
            dz = torch.mm(dy, table * b[:, None]) if len(dy) > table.shape[1] else torch.mm(dy * b, table)
            dh, dd = _times(dz, d), (dz * h).sum(0) if needs_d else None
        # What is kept of u has no graph, and a second derivative needs one.
        if needs_b and (u is None or torch.is_grad_enabled()):
            db = (torch.mm(dy.T, _times(h, d)) * table).sum(1)
        elif needs_b:
            db = (dy * u).sum(0)
        return gradient, dh, dd, db, None, None
