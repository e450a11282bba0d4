"""W' = W + dW: any dW, a low-rank product, few entries, and one with a factor of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from peft.core.adapter import Adapter, setting
from peft.core.layer.scaled import ScaledLayer
from peft.core.layer.weight import base_bias, sums_exactly
from peft.kernels.autocast import is_autocast
from peft.kernels.linear import Factors, active_rate, in_dtype, is_eager
from peft.kernels.sparse import sparse_linear, with_entries


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer


class Delta(Adapter):
    """W' = W + dW. A method defines :meth:`delta_weight`, and :meth:`delta` only where a cheaper way exists.

    Without one, dW is as large as W: where W can hold it, W + dW is multiplied by once, else dW on its own.

    Where dW is a low-rank product, :meth:`factors` says so, and the fused kernels compute with it. :meth:`delta`
    stays, as what they are tested against.
    """

    def delta_weight(self) -> torch.Tensor:
        """dW, ``[out, in, *kernel]``."""
        raise NotImplementedError

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """dW x."""
        dtype = floating(x)  # not within the function: it is held until the backward pass, and would hold x
        return self.multiplied(x, lambda: self.delta_weight().to(dtype=dtype))

    def prefers_folding(self) -> bool:
        return type(self).delta is Delta.delta and self.sums_exactly()

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return y + self.delta(x)

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return weight + in_dtype(weight.dtype, self.delta_weight())

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - self.delta_weight().to(weight.dtype)


class LowRank(Delta):
    """dW = B A with a pair of matrices that the method makes of its parameters: :meth:`pair`.

    Or dW = B M A, with a pair :meth:`outer` and a small M between them, :meth:`core`: a step multiplies by M the
    products of rank r, which are few, and makes no B M. The weight is the matrix ``[out, in * kernel]``.
    """

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[r, in * kernel]`` and B ``[out, r]``, in the dtype of the adapter."""
        (a, b), core = self.outer(), self.core()
        return a, b * core if core.dim() == 1 else b @ core

    def outer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of dW = B M A, in the same shapes."""
        raise NotImplementedError

    def core(self) -> torch.Tensor:
        """M of dW = B M A, ``[r, r]``, or the diagonal of one, ``[r]``."""
        raise NotImplementedError

    def acting_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in this forward, which a method may draw anew while it trains; no weight has that in it."""
        return self.pair()

    def _rate(self) -> float | None:
        """The dropout that acts now, where the factors of dW say all."""
        if type(self).output is not Delta.output:  # more than dW x is added
            return None
        return active_rate(getattr(self, self.dropout)) if self.dropout else 0.0

    def factors(self) -> Factors | None:
        rate = self._rate()
        return None if rate is None else Factors(*self.acting_pair(), 1.0, rate)

    def training_factors(self) -> Sequence[Factors] | None:
        if type(self).core is LowRank.core:
            return super().training_factors()
        rate = self._rate()
        return None if rate is None else (Factors(*self.outer(), 1.0, rate, self.core()),)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        base, (a, b) = self.base, self.acting_pair()
        return self.kind.up(base, self.kind.down(base, self.dropped(x), a), b)

    def delta_weight(self) -> torch.Tensor:
        a, b = self.pair()
        return (b @ a).view(self.shape)


class Sparse(Delta):
    """dW with few entries that are not zero. A method defines :meth:`entries`."""

    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in the flattened ``[out, in * kernel]`` and the values there; what has one position adds up."""
        raise NotImplementedError

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        weight = weight_to_add_to(layer, adapters, x)
        if weight is None:
            return None
        positions, values = (joined(parts) for parts in zip(*(adapter.entries() for adapter in adapters)))
        return sparse_linear(x, values, positions, weight, base_bias(layer))

    def delta_weight(self) -> torch.Tensor:
        positions, values = self.entries()
        return with_entries(values.new_zeros(self.shape), positions, values)

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        positions, values = self.entries()
        return with_entries(weight, positions, values.to(weight.dtype))

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        positions, values = self.entries()
        return with_entries(weight, positions, -values.to(weight.dtype))


class Scaled(Delta):
    """A dW with a factor, the setting ``scaling``. A method defines :meth:`initial_scaling`."""

    layer_base: ClassVar[Any] = ScaledLayer

    def initial_scaling(self) -> float:
        """What the factor starts at, from the adapter's config."""
        raise NotImplementedError


class ScaledBy(Scaled):
    """A dW whose factor starts at a number that its config tells: :meth:`scale_by`."""

    scaling, configured = setting(), setting()

    def scale_by(self, factor: float) -> None:
        """Let the factor start at this."""
        self.scaling = self.configured = factor

    def initial_scaling(self) -> float:
        return self.configured


def kernel_weight(layer: BaseTunerLayer, x: torch.Tensor) -> torch.Tensor | None:
    """W ``[out, in]`` in the dtype of x where kernels may compute the whole layer, outside autocast; else None."""
    if layer.kind.opaque or not is_eager(x) or is_autocast(x.device.type):
        return None
    weight = layer.bypass_matrix(x)
    return weight if weight is not None and weight.dtype is x.dtype else None


def weight_to_add_to(layer: BaseTunerLayer, adapters: Sequence[Adapter], x: torch.Tensor) -> torch.Tensor | None:
    """The same where W can hold these adapters' dW as well, computed in its dtype; else None."""
    weight = kernel_weight(layer, x)
    if weight is None or not sums_exactly(layer):
        return None
    return weight if all(adapter.dtype is weight.dtype for adapter in adapters) else None


def by_number(x: torch.Tensor, factor: Any) -> torch.Tensor:
    """x times a factor, a number or a tensor; x itself where that is the number 1."""
    return x if not isinstance(factor, torch.Tensor) and factor == 1 else x * factor


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors one after another; one by itself."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def padded(x: torch.Tensor, size: int) -> torch.Tensor:
    """x with its last axis filled with zeros up to ``size``."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def floating(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of an input that floats; None for indices."""
    return x.dtype if x.is_floating_point() else None
