"""The holes in the heap of C's library, given back to the system while a training step runs on a CPU.

Of a step's tensors some are kept for the backward pass, among others that are freed at once. glibc asks for a little
more than a tensor takes, so as to align it, and where a tensor has been freed one of the same size then finds no room:
the heap grows with each block of the model, to more than twice of what is in use. The holes stay in memory, and with
the process, unless the library is told to return their pages.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache


LEAST, SHARE = 64 * 2**20, 2
"""By how much a process has to grow: 64 MiB, and by half. Pages that were returned cost time when used again: with a
quarter the peak is a fifth lower, and a step takes three hundredths longer (benchmarks/RESULTS.md)."""
LARGE = 2**20  # bytes of a tensor at which to look at all


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's function that returns the pages of all holes; None elsewhere."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def can_trim() -> bool:
    """Whether the C library can be told to return the pages of its heap's holes."""
    return _trim() is not None


def resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read(64).split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Trimmed:
    """Keeps the holes small: called with the bytes of tensors that are kept for the backward pass, or used there."""

    def __init__(self) -> None:
        self.least = 0  # the process at its smallest since the last time that it was trimmed

    def __call__(self, size: int) -> None:
        """Return the pages of the holes if the process has grown, seen at a tensor of this many bytes."""
        trim = _trim()
        if size < LARGE or trim is None:
            return
        now = resident()
        self.least = min(self.least or now, now)
        if now - self.least >= max(LEAST, self.least // SHARE):
            trim(0)
            self.least = resident()
