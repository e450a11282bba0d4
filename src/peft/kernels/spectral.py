"""Product with a weight whose spectrum is sparse, y = Re(IFFT2(F)) x with n numbers in F, without making the weight.

One transform of each token's features on either side: with X the spectrum of x, Y[u] = sum_k F_k X[v_k] over the k with
u_k = u is that of y. The gradient of F_k is a product of two lines of such spectra, so neither the forward nor the
backward pass makes anything as large as the weight.
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
    """Real and imaginary parts of sum_i x_i exp(2 pi i f / n) for half of the frequencies f, ``[2, f, tokens]``."""
    half = torch.fft.rfft(x.reshape(-1, x.shape[-1]))
    return torch.stack((half.real.T, -half.imag.T))


def _folded(frequencies: torch.Tensor, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Where frequencies below ``size`` stand in half of a spectrum, and the signs of their imaginary parts there."""
    above = frequencies > size // 2
    return torch.where(above, size - frequencies, frequencies), 1 - 2 * above.to(dtype)


def _turned_back(spectrum: torch.Tensor, values: torch.Tensor, places: Places, shape: tuple[int, int]) -> torch.Tensor:
    """Re(IFFT) of the Y with Y[u] = sum_k F_k X[v_k] over the k with u_k = u, ``[tokens, out]``."""
    (to, to_sign), (of, of_sign) = (_folded(f, size, values.dtype) for f, size in zip(places, shape))
    alone = (2 * to) % shape[0] == 0  # frequencies that are their own conjugates: the real part counts once
    real, imaginary = values / 2 * (1 + alone.to(values.dtype)), values / 2 * to_sign * of_sign * ~alone
    targets, half = torch.cat([to, to + shape[0] // 2 + 1]), shape[0] // 2 + 1
    order = targets.argsort()
    starts = torch.searchsorted(targets[order], torch.arange(2 * half, device=to.device))
    sources, weights = torch.cat([of, of + spectrum.shape[1]])[order], torch.cat([real, imaginary])[order]
    lines = F.embedding_bag(sources, spectrum.flatten(0, 1), starts, mode="sum", per_sample_weights=weights)
    return torch.fft.irfft(torch.complex(lines[:half].T, lines[half:].T), n=shape[0])


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
        (rows, columns), dtype = ctx.shape, values.dtype
        above, dx, d_values = _spectrum(gradient), None, None
        if ctx.needs_input_grad[0]:
            dx = _turned_back(above, values / rows, (v, u), (columns, rows)).view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            below = _spectrum(ctx.kept.get(saved))
            (to, to_sign), (of, of_sign) = _folded(u, rows, dtype), _folded(v, columns, dtype)
            real, imaginary = (
                torch.linalg.vecdot(above[i].index_select(0, to), below[i].index_select(0, of)) for i in (0, 1)
            )
            d_values = (real - imaginary * to_sign * of_sign) / (rows * columns)
        return dx, d_values, None, None, None
