"""Triton kernel of low-rank updates: y_i += s B_g A_g x_i in one launch, g the update of row i.

A program takes a block of tokens of one row, makes A x for them and adds B (A x) to y, block by block of outputs.
With the factors in each other's place it is the gradient of the input, so forward and backward share it.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch


def can_run(x: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether the kernel serves these tensors: on a GPU with Triton (or anywhere under ``TRITON_INTERPRET=1``)."""
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") or importlib.util.find_spec("triton") is None:
        return False
    return down.dtype in (torch.float32, torch.bfloat16, torch.float16) and down.shape[-2] <= 256


def add_low_rank_(
    y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float, index: torch.Tensor
) -> torch.Tensor:
    """y += scale * the update of each row of x, in place; returns A x, ``[rows, tokens, r]``.

    Args:
        y: ``[rows, ..., out]``, contiguous. x: ``[rows, ..., in]``, in the dtype of the factors.
        down: A ``[G, r, in]``. up: B transposed, ``[G, r, out]``. index: the update of each row, ``[rows]``.
    """
    rows, rank = len(index), down.shape[1]
    x, out = x.reshape(rows, -1, x.shape[-1]).contiguous(), y.view(rows, -1, y.shape[-1])
    tokens, down, up = x.shape[1], down.contiguous(), up.contiguous()
    hidden = torch.empty(rows, tokens, rank, dtype=down.dtype, device=x.device)
    block = 16 if tokens <= 16 else 32
    width = max(16, 1 << (rank - 1).bit_length())
    grid = (rows, -(-tokens // block))
    _kernel()[grid](out, x, down, up, index, hidden, scale, tokens, x.shape[-1], y.shape[-1], rank, block, width, 64)
    return hidden


@cache
def _kernel() -> Any:
    """The kernel, compiled by its first call."""
    import triton
    import triton.language as tl

    @triton.jit
    def low_rank(
        y, x, down, up, index, hidden, scale, tokens, inner, outer, rank,
        TOKENS: tl.constexpr, RANK: tl.constexpr, FEATURES: tl.constexpr,
    ):  # fmt: skip
        row, group = tl.program_id(0), tl.load(index + tl.program_id(0))
        t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        r, f = tl.arange(0, RANK), tl.arange(0, FEATURES)
        down += group * rank * inner
        up += group * rank * outer
        place = (row * tokens + t).to(tl.int64)
        h = tl.zeros((TOKENS, RANK), dtype=tl.float32)
        for start in range(0, inner, FEATURES):
            i = start + f
            part = tl.load(x + place[:, None] * inner + i[None, :], (t[:, None] < tokens) & (i[None, :] < inner), 0.0)
            a = tl.load(down + r[None, :] * inner + i[:, None], (r[None, :] < rank) & (i[:, None] < inner), 0.0)
            h += tl.dot(part, a, input_precision="ieee")
        kept = (t[:, None] < tokens) & (r[None, :] < rank)
        tl.store(hidden + place[:, None] * rank + r[None, :], h.to(hidden.dtype.element_ty), kept)
        h = h.to(hidden.dtype.element_ty)
        for start in range(0, outer, FEATURES):
            o = start + f
            b = tl.load(up + r[:, None] * outer + o[None, :], (r[:, None] < rank) & (o[None, :] < outer), 0.0)
            at, inside = y + place[:, None] * outer + o[None, :], (t[:, None] < tokens) & (o[None, :] < outer)
            added = tl.dot(h, b, input_precision="ieee") * scale
            tl.store(at, (tl.load(at, inside, 0.0) + added).to(y.dtype.element_ty), inside)

    return low_rank
