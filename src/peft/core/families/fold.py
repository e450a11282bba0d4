"""W' = f(W) for any f, and a shift of the bias beside what becomes of W."""

from __future__ import annotations

import torch

from peft.core.adapter import Adapter
from peft.core.families.delta import floating


class Shift(Adapter):
    """b' = b + c beside what becomes of W, where there is a b. A method defines :meth:`shift`."""

    def shift(self) -> torch.Tensor | None:
        """c, ``[out]``, or None."""
        return None

    def shifted(self, y: torch.Tensor) -> torch.Tensor:
        """The output with c in it."""
        shift = self.shift()
        return y if shift is None else y + self.along_channels(shift)

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        shift = self.shift()
        return bias if shift is None or bias is None else bias + shift

    def unfold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        shift = self.shift()
        return bias if shift is None or bias is None else bias - shift


class Fold(Shift):
    """W' = f(W) for any f. A method defines :meth:`folded`; several adapters add up their f(W) - W.

    Where it changes the bias as well, by what depends on W and b alone, it defines :meth:`shift`.

    :meth:`delta` is the forward's ``(f(W) - W) x``, dropout included, where the forward is not ``f(W) x``.
    """

    reversible = False
    requires_dense_base = True

    def folded(self, base: torch.Tensor) -> torch.Tensor:
        """f(W), from the weight without any adapter, ``[out, in, *kernel]``."""
        raise NotImplementedError

    def change(self, dtype: torch.dtype | None) -> torch.Tensor:
        """f(W) - W, computed in a dtype."""
        base = self.base_weight().to(dtype=dtype)
        return self.folded(base) - base

    def prefers_folding(self) -> bool:
        return type(self).delta is Fold.delta and self.sums_exactly()

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """(f(W) - W) x."""
        dtype = floating(x)  # not within the function: it is held until the backward pass, and would hold x
        return self.multiplied(x, lambda: self.change(dtype))

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return self.shifted(y + self.delta(x))

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        if weight is base:  # the first to be folded in: no difference to round
            return self.folded(base)
        return weight + (self.folded(base) - base).to(weight.dtype)
