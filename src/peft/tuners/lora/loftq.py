"""LoftQ: Q and the pair B A that best make up W together, |W - Q - B A| small, in turns (arXiv 2310.08659, alg. 1)."""

from __future__ import annotations

import torch
from torch import nn

from peft.kernels.decompositions import halves, svd


BLOCK = 64
"""Entries that share a scale."""


def round_to_bits(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of a weight ``[out, in]`` that is quantised and read again; any device, the same dtype.

    With 8 bits, whole numbers up to 127 times a scale of each row, of the weight in half precision, as bitsandbytes
    keeps it. With 2 or 4, codes at the quantiles of a normal distribution, scaled by the largest magnitude in blocks
    of 64 entries (QLoRA, arXiv 2305.14314, section 3); by bitsandbytes itself (NF4) where it is installed.

    Raises:
        ValueError: if ``bits`` is not 2, 4 or 8.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"LoftQ quantises to 2, 4 or 8 bits, not {bits}.")
    if bits == 8:
        halved = weight.half().float()
        scale = halved.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        return ((halved / scale).round() * scale).to(weight.dtype)
    if bits == 4:
        try:
            from bitsandbytes import functional
        except ImportError:
            pass
        else:
            codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
            return functional.dequantize_4bit(codes, state).to(weight.dtype)
    table = _normal_table(bits).to(weight.device)
    flat = weight.float().flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    between = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / scale.clamp_min(1e-30), between)
    return (table[codes] * scale).flatten()[: len(flat)].view_as(weight).to(weight.dtype)


# The offset is that of bitsandbytes, whose tables these are.
def _normal_table(bits: int, offset: float = 0.9677083) -> torch.Tensor:
    """2^bits ascending codes: quantiles of N(0, 1) on both sides of an exact zero, the largest scaled to 1."""
    half = 2 ** (bits - 1)
    upper = [_quantile(p) for p in torch.linspace(offset, 0.5, half + 1)[:-1].tolist()]
    lower = [-_quantile(p) for p in torch.linspace(offset, 0.5, half)[:-1].tolist()]
    table = torch.tensor(sorted([*upper, 0.0, *lower]))
    return table / table.max()


def _quantile(p: float) -> float:
    return float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))


@torch.no_grad()
def loftq_init(
    weight: torch.Tensor | nn.Parameter, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise a weight and fit a pair to the rest, in turns.

    Args:
        weight: ``[out, in]``, dense.
        num_bits: 2, 4 or 8.
        reduced_rank: rank of the pair.
        num_iter: how many turns; the best of them counts.

    Returns:
        The weight that the base shall have, read from its codes, in the dtype of ``weight``; A ``[r, in]`` and B
        ``[out, r]`` in float32.

    Raises:
        ValueError: for other bits, or fewer than one turn.
    """
    if num_iter < 1:
        raise ValueError(f"LoftQ takes at least one iteration, not {num_iter}.")
    wide = weight.detach().float()
    pair, least = torch.zeros_like(wide), float("inf")
    for _ in range(num_iter):
        rounded = round_to_bits(wide - pair, num_bits)
        a, b = halves(*svd(wide - rounded), reduced_rank)
        pair = b @ a
        error = float((wide - rounded - pair).norm())
        if error < least:  # at two bits a turn can make it worse
            least, best = error, (rounded.to(weight.dtype), a, b)
    return best
