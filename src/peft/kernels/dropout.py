"""Dropout of which no mask is kept for the backward pass: it is drawn again from its seed.

Each entry is dropped with probability p, independently, as by :class:`torch.nn.Dropout`. On the CPU the distances
between dropped entries are drawn, which are geometric: the work is p times that of one number for each entry. Where
few are dropped their places are kept, a sixteenth of what a float32 input takes or less: drawing costs more.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from peft.kernels.products import accumulate
from peft.kernels.remake import is_recomputed


FEW = 1 / 16  # of the entries dropped, at most, where places are kept


def draw_seed() -> int:
    """A seed from torch's default generator, so that ``torch.manual_seed`` settles the masks."""
    return int(torch.randint(2**62, ()))


class Dropped:
    """The entries that a dropout sets to zero: the same for the same seed, p and number of entries.

    Those that stay are not scaled. What is drawn is held as long as the object: each pass makes one of its own.

    Attributes:
        places: what :meth:`few` of the pass before has given, so that they are not drawn again.
    """

    def __init__(self, p: float, seed: int, places: torch.Tensor | None = None) -> None:
        self.p, self.seed = p, seed
        self._places: np.ndarray | None = None if places is None else places.numpy().astype(np.int64)
        self._mask: torch.Tensor | None = None

    def few(self) -> torch.Tensor | None:
        """The places of the dropped entries where they take little memory, ``[n]``, int32; None if they are many."""
        places = self._places
        # what checkpointing computes again must have the shapes it had, and a user may let it draw other masks
        if places is None or self.p > FEW or (len(places) and places[-1] >= 2**31) or is_recomputed():
            return None
        return torch.from_numpy(places.astype(np.int32))

    def zero_(self, x: torch.Tensor) -> torch.Tensor:
        """Set the dropped entries of a contiguous ``x`` to zero, in place."""
        if self._has_places(x):
            _entries(x)[self._drawn(x)] = 0
            return x
        if x.is_meta:
            return x
        if self._mask is None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            self._mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
            self._mask.bernoulli_(1 - self.p, generator=generator)
        return x.mul_(self._mask.view(x.shape))

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with the dropped entries set to zero."""
        if torch.is_grad_enabled() and x.requires_grad:
            return x * self.zero_(torch.ones_like(x, memory_format=torch.contiguous_format, requires_grad=False))
        return self.zero_(x.clone(memory_format=torch.contiguous_format))

    def add_product(self, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``y + drop(a b)``, in the place of a contiguous y."""
        if not self._has_places(y) or torch.is_grad_enabled():
            return y.add_(self.copy(torch.mm(a, b)))
        entries, places = _entries(y), self._drawn(y)
        before = entries.take(places)
        accumulate(y, a, b, 1.0)
        entries[places] = before
        return y

    def _has_places(self, x: torch.Tensor) -> bool:
        """Whether the dropped entries of ``x`` are known by their places, so that few of them cost little."""
        return x.is_cpu and self.p <= 0.5

    def _drawn(self, x: torch.Tensor) -> np.ndarray:
        if self._places is None:
            self._places = _dropped(x.numel(), self.p, self.seed)
        return self._places


def _entries(x: torch.Tensor) -> np.ndarray:
    """The bits of a tensor's entries, for reading and writing: NumPy does so faster, but has no bfloat16."""
    return x.detach().view(_BITS[x.dtype.itemsize]).numpy().reshape(-1)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _dropped(count: int, p: float, seed: int) -> np.ndarray:
    """The places of the dropped entries among ``count``, ascending."""
    if not count:
        return np.empty(0, np.int64)
    numbers, rate = np.random.SFC64(seed), np.float32(1 / math.log1p(-p))
    last, parts = -1, []
    while last < count - 1:
        left = (count - 1 - last) * p
        drawn = numbers.random_raw(int(left + 6 * math.sqrt(left)) // 2 + 4).view(np.uint32)
        gaps = drawn.astype(np.float32)
        gaps += np.float32(0.5)
        gaps *= np.float32(2**-32)
        np.log(gaps, out=gaps)
        gaps *= rate
        places = gaps.astype(np.int64)  # rounding an exponential down gives a geometric distance
        places += 1
        places[0] += last
        sums = torch.from_numpy(places)  # NumPy's own sum takes six times as long
        torch.cumsum(sums, 0, out=sums)
        parts.append(places)
        last = int(places[-1])
    places = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return places[: np.searchsorted(places, count)]
