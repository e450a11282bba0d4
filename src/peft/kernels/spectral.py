"""Product with a weight whose spectrum is sparse, y = Re(IFFT2(F)) x with n numbers in F, without making the weight.

One transform of each token's features on either side: with X the spectrum of x, Y[u] = sum_k F_k X[v_k] over the
k with u_k = u is that of y. The gradient of F_k is a product of two lines of such spectra, so neither pass makes
anything as large as the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function

from peft.kernels.linear import is_eager
from peft.kernels.remake import kept


PAD = 16
"""Numbers after each line of a spectrum: lines of 2^k bytes would be transposed through a few lines of the cache."""

Places = tuple[torch.Tensor, torch.Tensor]


def spectral_product(x: torch.Tensor, values: torch.Tensor, places: Places, shape: tuple[int, int]) -> torch.Tensor:
    """``Re(IFFT2(F)) x``, ``[..., out]``, in the dtype of x, float32 or wider.

    Args:
        x: ``[..., in]``. values: the numbers in F that are not zero, ``[n]``, real.
        places: their rows u and columns v, ``[n]`` each. shape: ``(out, in)`` of F.
    """
    if is_eager(x) and torch.is_grad_enabled() and (x.requires_grad or values.requires_grad):
        return SpectralProduct.apply(x, values, *places, shape)
    return _product(x, values, places, shape)


def _product(x: torch.Tensor, values: torch.Tensor, places: Places, shape: tuple[int, int]) -> torch.Tensor:
    return _turned_back(_spectrum(x), values / shape[1], places, shape).view(*x.shape[:-1], -1)


def _spectrum(x: torch.Tensor) -> torch.Tensor:
    """sum_i x_i exp(-2 pi i f / n) for half of the f: real parts and imaginary ones, ``[2, f, tokens + PAD]``."""
    parts = torch.view_as_real(torch.fft.rfft(x.reshape(-1, x.shape[-1]))).permute(2, 1, 0)
    return F.pad(parts, (0, PAD))


def _folded(frequencies: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where frequencies below ``size`` stand in half of a spectrum, and whether it has their conjugates there."""
    above = frequencies > size // 2
    return torch.where(above, size - frequencies, frequencies), above


def _turned_back(spectrum: torch.Tensor, values: torch.Tensor, places: Places, shape: tuple[int, int]) -> torch.Tensor:
    """Re(IFFT) of the Y with Y[u] = sum_k F_k X[v_k] over the k with u_k = u, ``[tokens, out]``."""
    (to, to_above), (of, of_above) = (_folded(f, size) for f, size in zip(places, shape))
    alone, half = (2 * to) % shape[0] == 0, shape[0] // 2 + 1  # alone: its own conjugate, whose real part counts once
    order = to.argsort()
    starts, of = torch.searchsorted(to[order], torch.arange(half, device=to.device)), of[order]
    real = torch.where(alone, values, values / 2)[order]
    imaginary = torch.where((to_above == of_above)[order], -real, real)  # those to be conjugated
    lines = F.embedding_bag(  # real parts, then imaginary ones
        torch.cat((of, of + spectrum.shape[1])),
        spectrum.flatten(0, 1),
        torch.cat((starts, starts + len(of))),
        mode="sum",
        per_sample_weights=torch.cat((real, imaginary)),
    )
    parts = lines.view(2, half, -1)[:, :, :-PAD].permute(2, 1, 0).contiguous()
    return torch.fft.irfft(torch.view_as_complex(parts), n=shape[0])


class SpectralProduct(Function):
    """See :func:`spectral_product`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor, u: torch.Tensor, v: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        ctx.kept, ctx.shape = kept(x) if values.requires_grad else None, shape
        ctx.save_for_backward(None if ctx.kept is None else ctx.kept.tensor, values, u, v)
        return _product(x, values, (u, v), shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        saved, values, u, v = ctx.saved_tensors
        rows, columns = ctx.shape
        above, dx, d_values = _spectrum(gradient), None, None
        if ctx.needs_input_grad[0]:
            dx = _turned_back(above, values / rows, (v, u), (columns, rows)).view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            (to, to_above), (of, of_above) = _folded(u, rows), _folded(v, columns)
            picked = above.index_select(1, to).mul_(_spectrum(ctx.kept.get(saved)).index_select(1, of))
            real, imaginary = picked.sum(2)
            d_values = torch.where(to_above == of_above, real - imaginary, real + imaginary) / (rows * columns)
        return dx, d_values, None, None, None
