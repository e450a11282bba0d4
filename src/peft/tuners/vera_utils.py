"""What VeRA and PVeRA share: config fields, adapters with the frozen random pair of the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.families import LowRank
from peft.core.layer.layer import BaseTunerLayer
from peft.kernels.autocast import is_autocast
from peft.kernels.few import is_few
from peft.kernels.linear import base_output, in_dtype, is_eager
from peft.kernels.remake import is_recomputed
from peft.tuners.vera_kernels import Raised, ScaledTable, projected, times


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


def vera_pair(
    a: torch.Tensor, b: torch.Tensor, lambda_d: torch.Tensor, lambda_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B' of dW = diag(b) B diag(d) A = B' A.

    Args:
        a: A ``[r, in]``. b: B ``[out, r]``. lambda_d: d ``[r]``. lambda_b: b ``[out]``.
    """
    return a, ScaledTable.of(lambda_b, b, lambda_d)


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

    def held_here(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """b ``[out]`` and d ``[draws * r]``; leading columns of A, ``[draws * r, in * kernel]``, and rows of B."""
        (rows, columns), (b, d) = fan(self.shape), [getattr(self, name) for name in self.parts]
        a, table = [in_dtype(d.dtype, getattr(self, name)) for name in self.common]
        a = a if a.shape[1] == columns else a.narrow(1, 0, columns)
        return b, d, a, table if len(table) == rows else table.narrow(0, 0, rows)

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What of these a forward computes with now."""
        return self.held_here()

    def drawn(self, h: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What z is made of in a step: z = d * h of h = A x ``[n, draws * r]``; of another z, that and None."""
        return h, d

    def inner(self, h: torch.Tensor) -> torch.Tensor:
        """z of ``d * (A x)``, with the channels where the layer has them."""
        return h

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        if len(adapters) > 1 or not is_eager(x) or is_autocast(x.device.type):
            return None
        (adapter,) = adapters
        if is_few(x):  # in the fewest calls
            y = layer._modules["base_layer"](x)  # type: ignore[misc]
            raised, b = adapter.raised(adapter.cast(x))
            return in_dtype(y.dtype, torch.addcmul(y, raised, b))
        matrix = layer.kind.matrix and not layer.kind.opaque and x.dtype == adapter.dtype
        if not matrix or not torch.is_grad_enabled() or is_recomputed():
            return None
        b, d, a, table = adapter.read()
        h, made = projected(layer, adapter.dropped(x), a)
        h, d = adapter.drawn(h, d)
        weight = layer.bypass_matrix(x)
        y = base_output(layer._modules["base_layer"], x, weight, weight is None and layer.base_is_fresh())
        if y.dtype == h.dtype:
            return Raised.apply(
                y, h, d, b, table, not made
            )  # what another layer's A x has saved is spent on keeping less
        return y + (F.linear(times(h, d), table) * b).view_as(y)

    def raised(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B z and b, whose product is dW x."""
        base, kind, (b, d, a, table) = self.base, self.kind, self.read()
        groups = kind.groups(base)
        h = kind.down(base, self.dropped(x), a) * kind.along_channels(d if groups == 1 else d.repeat(groups), base)
        return kind.up(base, self.inner(h), table), kind.along_channels(b, base)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        raised, b = self.raised(x)
        return raised * b
