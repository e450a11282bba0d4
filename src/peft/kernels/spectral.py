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
    """sum_i x_i exp(-2 pi i f / n) for half of the frequencies f, complex ``[f, tokens]``."""
    return torch.fft.rfft(x.reshape(-1, x.shape[-1])).T.contiguous()


def _folded(frequencies: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where frequencies below ``size`` stand in half of a spectrum, and whether it has their conjugates there."""
    above = frequencies > size // 2
    return torch.where(above, size - frequencies, frequencies), above


def _turned_back(spectrum: torch.Tensor, values: torch.Tensor, places: Places, shape: tuple[int, int]) -> torch.Tensor:
    """Re(IFFT) of the Y with Y[u] = sum_k F_k X[v_k] over the k with u_k = u, ``[tokens, out]``."""
    (to, to_above), (of, of_above) = (_folded(f, size) for f, size in zip(places, shape))
    alone, half = (2 * to) % shape[0] == 0, shape[0] // 2 + 1  # alone: its own conjugate, whose real part counts once
    targets = to + half * (to_above == of_above)  # those to be conjugated are summed apart
    order = targets.argsort()
    starts = torch.searchsorted(targets[order], torch.arange(2 * half, device=to.device))
    weights = torch.where(alone, values, values / 2)[order]
    lines = torch.view_as_real(spectrum).flatten(1)
    lines = F.embedding_bag(of[order], lines, starts, mode="sum", per_sample_weights=weights)
    straight, turned = torch.view_as_complex(lines.unflatten(1, (-1, 2))).chunk(2)
    return torch.fft.irfft((straight + turned.conj()).T, n=shape[0])


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
            picked = _lines_of(above, to).mul_(_lines_of(_spectrum(ctx.kept.get(saved)), of))
            real, imaginary = picked.unflatten(1, (-1, 2)).sum(1).unbind(1)
            d_values = torch.where(to_above == of_above, real - imaginary, real + imaginary) / (rows * columns)
        return dx, d_values, None, None, None


def _lines_of(spectrum: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Lines of a spectrum, real and imaginary parts by turns, ``[n, 2 * tokens]``."""
    return torch.view_as_real(spectrum).flatten(1).index_select(0, places)
