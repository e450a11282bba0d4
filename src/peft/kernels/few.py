"""Inputs so small that what a step costs is its calls, not what they compute.

A function of autograd that is written in Python costs some 100 us a step more than torch's own operations do. It is
paid for by the passes over memory and the bytes that it spares, which are nothing where entries are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


ENTRIES = 2**16
"""Of an input on a processor; with as many, both ways take as long (measured with 64 to 576 features)."""

ENTRIES_ELSEWHERE = 2**20
"""On an accelerator, which works off an operation on so many while the next one is started. Not measured."""


def is_small(entries: int) -> bool:
    """Whether so many entries of a weight, which each layer would keep, are few on any device."""
    return entries < ENTRIES


def is_few(x: torch.Tensor, draws: bool = False) -> bool:
    """Whether autograd's own operations are the faster way with this input.

    Args:
        draws: entries of x are dropped, which torch's own operation takes longer for than ours.
    """
    few = ENTRIES if x.is_cpu or (x.is_meta and device_of(x) == "cpu") else ENTRIES_ELSEWHERE
    return x.numel() < (few // 2 if draws else few)


def device_of(x: torch.Tensor) -> str:
    """The type of device that a tensor is on, or stands for."""
    return _STANDS_FOR[-1] if x.is_meta else x.device.type


_STANDS_FOR = ["cpu"]


@contextmanager
def meta_stands_for(device: str) -> Iterator[None]:
    """A context in which tensors on the meta device, whose values nobody knows, are kept as on this type of device."""
    _STANDS_FOR.append(device)
    try:
        yield
    finally:
        _STANDS_FOR.pop()
