"""The Cayley transform of skew-symmetric matrices, exact and by a series."""

from __future__ import annotations

import torch

from peft.core.layer.weight import wide


def cayley(q: torch.Tensor) -> torch.Tensor:
    """(I + Q)(I - Q)^-1 for Q ``[..., n, n]``, as 2 (I - Q)^-1 - I, of which autograd keeps one matrix alone."""
    exact = wide(q)  # there is no solver for 16 bits
    eye = torch.eye(q.shape[-1], device=q.device, dtype=exact.dtype)
    return (2 * torch.linalg.inv(eye - exact) - eye).to(q.dtype)


def cayley_series(q: torch.Tensor, terms: int) -> torch.Tensor:
    """About (I + Q)(I - Q)^-1 for small Q ``[n, n]`` or ``[blocks, n, n]``: I + 2 (Q + ... + Q^(t-2)) + Q^(t-1).

    Fewer than four terms are special in the file format: one is I, two are I + 2 Q, three are four.
    """
    eye = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    if terms <= 2:
        return eye + 2 * q * (terms - 1)
    times = torch.addmm if q.dim() == 2 else torch.baddbmm
    twice = 2 * eye
    total = q + twice  # from the highest power down, each step one product and sum
    for _ in range(max(terms, 4) - 3):
        total = times(twice, q, total)
    return times(eye, q, total)
