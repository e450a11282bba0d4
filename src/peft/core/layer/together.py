"""Which layers of a model read one input, learned from the call before.

q, k and v read one tensor, so do gate and up; what they share they do together (:mod:`peft.kernels.joint`). A layer
that is not called, or called with another tensor, is left out the next time; until then it costs a product of rank r.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.kernels.joint import can_join, join
from peft.kernels.linear import Factors, Share


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer

ROWS = 256  # of an input; with fewer, a node of the graph costs more than its products save
Downs = list["weakref.ref[torch.Tensor]"]


class Reading:
    """One input, and the layers that have read it so far in this call.

    Attributes:
        expected: how many layers read it in the call before. downs: the A of those after the first, of that call.
        share: what they do together, held until all have come.
    """

    def __init__(self, x: torch.Tensor, first: BaseTunerLayer) -> None:
        self.x, self.version, self.layers = weakref.ref(x), x._version, [first]
        self.downs: list[torch.Tensor] = []
        self.share: Share | None = None

    def is_of(self, x: torch.Tensor, layer: BaseTunerLayer) -> bool:
        """Whether a layer is one more that reads this input."""
        mine = self.x()
        same = mine is not None and mine is x and mine._version == self.version  # those of inference mode have none
        return same and all(layer is not other for other in self.layers)


class Readers:
    """The inputs that layers of a model share. One a model, in its context; copies and pickles start anew."""

    def __init__(self) -> None:
        self.followers: weakref.WeakKeyDictionary[nn.Module, Downs | None] = weakref.WeakKeyDictionary()
        self.expected: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self.now: Reading | None = None

    def __reduce__(self) -> Any:
        return Readers, ()

    def share(self, layer: BaseTunerLayer, x: torch.Tensor, factors: Sequence[Factors]) -> Share | None:
        """What the layer gets of what others have done with this input; None where it is on its own."""
        now = self.now
        if now is not None and now.is_of(x, layer):
            now.layers.append(layer)
            now.downs += _shareable(factors)
            share = now.share
            if len(now.layers) == self.expected.get(now.layers[0], 0):
                now.share = None  # all have come; what is held of the graph is the layers'
            return share
        if now is not None:
            self._learn(now)
        if x.numel() < ROWS * x.shape[-1] or not can_join(x):
            self.now = None
            return None
        now = self.now = Reading(x, layer)
        known = self.followers.get(layer)
        if known is None:
            return None
        there = [down for ref in known if (down := ref()) is not None and _fits(down, x)]
        downs = {id(down): down for down in (*_shareable(factors), *there)}
        share = now.share = join(x, list(downs.values())) if len(downs) > 1 else None  # one product saves nothing
        return share

    def _learn(self, reading: Reading) -> None:
        """Keep for the next call which layers have read this input."""
        first, count = reading.layers[0], len(reading.layers)
        self.followers[first] = [weakref.ref(down) for down in reading.downs] if count > 1 else None
        self.expected[first] = count
        reading.share = None


def _shareable(factors: Sequence[Factors]) -> list[torch.Tensor]:
    """The A that multiply the input as it is, and that are there from call to call."""
    return [f.down for f in factors if not f.dropout and f.down.grad_fn is None]


def _fits(down: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether an A can multiply this input now: its memory may be elsewhere between two calls of its layer."""
    there = down.dim() == 2 and down.shape[1] == x.shape[-1] and down.device == x.device
    return there and down.untyped_storage().nbytes() >= down.nbytes
