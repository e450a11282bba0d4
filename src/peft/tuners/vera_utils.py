"""What VeRA and PVeRA share: config fields, adapters with the frozen random pair of the whole model, their kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.families import LowRank
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


def _times(h: torch.Tensor, d: torch.Tensor | None) -> torch.Tensor:
    return h if d is None else h * d


class Raised(torch.autograd.Function):
    """y + b * (B (d * h)), in place of y.

    Args:
        y: ``[..., out]``. h: ``[n, r]``. d: ``[r]``, or None for ones. b: ``[out]``. table: B ``[out, r]``, frozen.
        keeps: keep B (d * h) for the gradient of b, and do not multiply once more.
    """

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


class SharedPair(LowRank):
    """b * (B z), z made of d * (A x): A and B are frozen and of the whole model, b and d of one layer.

    A method declares b and d, in this order, and A and B. A convolution is its matrix ``[out, in * kernel]``, and each
    of its groups has its own A x.

    Attributes:
        draws: z ``[r]`` is made of so many vectors of its size.
    """

    draws: ClassVar[int] = 1

    @classmethod
    def share(cls, config: Any, layers: Sequence[BaseTunerLayer]) -> dict[str, torch.Tensor]:
        """A ``[draws * r, largest in]`` and B ``[largest out, r]``, uniform in +-sqrt(6 / second size)."""
        generator = torch.Generator().manual_seed(config.projection_prng_key)

        def draw(*shape: int) -> torch.Tensor:
            bound = math.sqrt(6 / shape[1])
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        outs, inners = zip(*(fan(layer.shape) for layer in layers))
        return dict(zip(cls.common, (draw(cls.draws * config.r, max(inners)), draw(max(outs), config.r))))

    def start(self, config: SharedPairConfig) -> None:
        """Make b ``[out]`` and d ``[draws * r]``."""
        b, d = torch.ones(self.shape[0]), torch.randn(self.draws * config.r)
        if config.init_weights:
            b, d = torch.zeros_like(b), d.fill_(config.d_initial)
        for name, vector in zip(self.parts, (b, d)):
            setattr(self, name, nn.Parameter(vector))

    def vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """b ``[out]`` and d ``[draws * r]``."""
        b, d = (getattr(self, name) for name in self.parts)
        return b, d

    def frozen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The leading columns of A, ``[draws * r, in * kernel]``, and rows of B, ``[out, r]``."""
        (rows, columns), (a, b), d = fan(self.shape), (getattr(self, name) for name in self.common), self.vectors()[1]
        return a[:, :columns].to(d), b[:rows].to(d)

    def drawn(self, h: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What z is made of in a step: z = d * h of h = A x ``[n, draws * r]``; of another z, that and None."""
        return h, d

    def inner(self, h: torch.Tensor) -> torch.Tensor:
        """z of ``d * (A x)``, with the channels where the layer has them."""
        return h

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        if len(adapters) > 1 or not torch.is_grad_enabled() or not is_eager(x) or is_autocast(x.device.type):
            return None
        (adapter,) = adapters
        matrix = layer.kind.matrix and not layer.kind.opaque and x.dtype == adapter.dtype
        if not matrix or is_recomputed():
            return None
        (b, d), (a, table) = adapter.vectors(), adapter.frozen()
        h, made = projected(layer, adapter.dropped(x), a)
        h, d = adapter.drawn(h, d)
        weight = layer.bypass_matrix(x)
        y = base_output(layer._modules["base_layer"], x, weight, weight is None and layer.base_is_fresh())
        if y.dtype == h.dtype:
            return Raised.apply(
                y, h, d, b, table, not made
            )  # what another layer's A x has saved is spent on keeping less
        return y + (F.linear(_times(h, d), table) * b).view_as(y)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        base, kind, (b, d), (a, table) = self.base, self.kind, self.vectors(), self.frozen()
        groups = getattr(base, "groups", 1)
        h = kind.down(base, self.dropped(x), a) * self.along_channels(d if groups == 1 else d.repeat(groups))
        return kind.up(base, self.inner(h), table) * self.along_channels(b)
