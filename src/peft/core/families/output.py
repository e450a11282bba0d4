"""Maps of the output, and scales of input and output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peft.core.adapter import Adapter
from peft.core.families.fold import Shift
from peft.kernels.channels import mixed_by_output
from peft.kernels.few import is_few
from peft.kernels.linear import in_dtype, is_eager
from peft.kernels.made_again import reading
from peft.kernels.strict import is_plain


def by_output(
    adapter: Adapter, x: torch.Tensor, y: torch.Tensor, scales: Callable[[], Sequence[torch.Tensor]]
) -> torch.Tensor | None:
    """What :func:`mixed_by_output` gives of the output y of a frozen linear layer; None where that is not asked.

    Args:
        x: the input of the adapter, which the layer gets by way of :meth:`Adapter.input`.
        scales: gives c, or c and s.
    """
    if not torch.is_grad_enabled() or (is_eager(y) and is_few(y)):
        return None  # nothing is kept, or nothing that counts
    layer = adapter.layer
    # Beside others, y is not what the base layer gives, and could not be had again from x.
    alone = not layer.context.is_mixed and len(layer.current()) == 1
    if is_plain() or not alone or not layer.kind.matrix or not layer.base_is_fresh():
        return None
    return mixed_by_output(y, x, lambda x: layer.base_layer(adapter.input(x)), *scales())


class Output(Shift):
    """An affine map of the output, y' = M y + c: W' = M W and b' = M b + c.

    A method defines :meth:`map_output` and/or :meth:`shift`. A layer without a bias gets c for one when it is merged;
    what has no place for a bias (a table) takes no c.
    """

    reversible = False  # M may be singular

    def map_output(self, y: torch.Tensor) -> torch.Tensor:
        """M y along the last axis."""
        return y

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        if type(self).map_output is not Output.map_output:
            y = self.kind.channels_last(in_dtype(self.dtype, y))
            y = self.kind.channels_back(self.map_output(y))
        return self.shifted(y)

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return self.map_output(weight.movedim(0, -1)).movedim(-1, 0)

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        shift = self.shift()
        mapped = None if bias is None else self.map_output(bias)
        return mapped if shift is None else shift if mapped is None else mapped + shift


class Scale(Adapter):
    """W' = diag(out) W diag(in). A method defines :meth:`scale_in` and/or :meth:`scale_out`, a vector or None.

    ``scale_in`` has one entry for each input channel, ``scale_out`` one for each output channel.
    """

    reversible = False  # a scale may be zero
    spares_input = True

    def scale_in(self) -> torch.Tensor | None:
        return None

    def scale_out(self) -> torch.Tensor | None:
        return None

    def input(self, x: torch.Tensor) -> torch.Tensor:
        scale = None if self.kind.lookup else self.scale_in()
        if scale is None:
            return x
        with reading(x):
            return x * self.along_channels(scale)

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        inner, scale = self.scale_in() if self.kind.lookup else None, self.scale_out()
        if inner is not None:  # x selects a column of W, hence an entry of the scale
            y = y * inner[x].unsqueeze(-1)
        if scale is None:
            return y
        changed = by_output(self, x, y, lambda: (scale,))
        return y * self.along_channels(scale) if changed is None else changed

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        ones = [1] * (weight.dim() - 2)
        inner, outer = self.scale_in(), self.scale_out()
        if inner is not None:
            groups = self.in_features // weight.shape[1]
            inner = inner.view(groups, 1, weight.shape[1], *ones)  # a grouped kernel holds its own channels only
            weight = (weight.unflatten(0, (groups, -1)) * inner.to(weight.dtype)).flatten(0, 1)
        if outer is not None:
            weight = weight * outer.view(-1, 1, *ones).to(weight.dtype)
        return weight

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        scale = self.scale_out()
        return bias if scale is None or bias is None else bias * scale.to(bias.dtype)
