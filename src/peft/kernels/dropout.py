"""Dropout whose mask is not kept for the backward pass but drawn again from its seed.

Each entry is dropped with probability p, independently, as by :class:`torch.nn.Dropout`. On the CPU the distances
between dropped entries are drawn, which are geometric: the work is p times that of one number for each entry.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def draw_seed() -> int:
    """A seed from torch's default generator, so that ``torch.manual_seed`` settles the masks."""
    return int(torch.randint(2**62, ()))


def zero_dropped_(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Set the dropped entries of a contiguous ``x`` to zero, in place; those that stay are not scaled.

    The same ``seed``, ``p`` and number of entries drop the same entries.
    """
    if x.device.type == "cpu" and p <= 0.5:
        x.view(-1).index_fill_(0, _dropped(x.numel(), p, seed), 0)
        return x
    if x.is_meta:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
    return x.mul_(kept)


def dropped_copy(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """``x`` with the dropped entries set to zero; those that stay are not scaled."""
    return zero_dropped_(x.clone(memory_format=torch.contiguous_format), p, seed)


def _dropped(count: int, p: float, seed: int) -> torch.Tensor:
    """The places of the dropped entries among ``count``, ascending."""
    generator = np.random.Generator(np.random.SFC64(seed))
    rate = np.float32(-1 / math.log1p(-p))
    last, parts = -1, []
    while last < count - 1:
        left = (count - 1 - last) * p
        gaps = generator.standard_exponential(int(left + 6 * math.sqrt(left)) + 8, dtype=np.float32)
        gaps *= rate
        places = gaps.astype(np.int64)  # rounding an exponential down gives a geometric distance
        places += 1
        places[0] += last
        np.cumsum(places, out=places)
        parts.append(places)
        last = int(places[-1])
    places = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return torch.from_numpy(places[: np.searchsorted(places, count)])
