"""y' = y + f(x) with an f that depends on the sample. No weight equals it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.adapter import Adapter
from peft.core.addition import Addition, NoSum
from peft.core.base.kinds import Kind
from peft.kernels.made_again import reading


class Sample(Adapter):
    """y' = y + f(x): a method defines :meth:`update`, which reads x by way of :meth:`down`.

    Attributes:
        because: why no weight equals it, for the errors.
    """

    because: ClassVar[str] = "its update depends on the sample"
    spares_input = True
    adds: ClassVar[Addition] = NoSum("what they do depends on the sample, so no sum of their tensors does their sum.")

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """f(x), shaped like the output."""
        raise NotImplementedError

    def down(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """A x as ``kind.down`` gives it, for A ``[r, in * kernel]``; x is not kept where it can be made again."""
        with reading(x):
            return self.kind.down(self.base, x, a)

    def each_up(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``B h`` with a matrix for each sample.

        Args:
            h: what ``kind.down`` gives. b: ``[batch, r, out]``.
        """
        h = self.kind.channels_last(h)
        groups = self.kind.groups(self.base)
        if groups == 1:
            y = (h if h.dim() == 3 else h.reshape(len(h), math.prod(h.shape[1:-1]), h.shape[-1])) @ b
        else:
            pieces = h.reshape(len(h), math.prod(h.shape[1:-1]), groups, b.shape[1])  # [batch, positions, groups, r]
            y = torch.einsum("bpgr,brgo->bpgo", pieces, b.unflatten(-1, (groups, -1))).flatten(-2)
        return self.kind.channels_back(y.view(*h.shape[:-1], y.shape[-1]))

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: Any) -> str | None:
        if kind.read_elsewhere:
            return f"its weight is read by another computation, and {cls.because}, so there is no weight to give"
        return None

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return y + self.update(x)

    def unmergeable(self) -> str | None:
        return f"{self.because}, so no one weight equals it. Keep the adapter unmerged."
