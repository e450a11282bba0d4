"""Products with a weight whose spectrum is sparse, dW = Re(IFFT2(F)) with n real numbers in F.

Few tokens are cheaper to multiply without making dW, by one transform of each token's features on either side: with X
the spectrum of x, Y[u] = sum_k F_k X[v_k] over the k with u_k = u is that of y. For many tokens dW is made, for less
than half of what a transform of its size takes, since F is real: dW[-i, -j] = dW[i, j]. In both cases the gradient of
F_k is a product of a line of either spectrum, so that no pass needs the gradient of a whole matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from peft.kernels.linear import Direct, fresh_linear, is_eager
from peft.kernels.remake import kept
from peft.kernels.sparse import paired_products


PAD = 16
"""Numbers after each line of a spectrum: lines of 2^k bytes would be transposed through a few lines of the cache."""

Places = tuple[torch.Tensor, torch.Tensor]


def spectral_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    places: Places,
    shape: tuple[int, int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(W + dW) x + b``, ``[..., out]``, in the dtype of x, float32 or wider; without a ``weight`` ``dW x``.

    Args:
        x: ``[..., in]``. values: the numbers in F that are not zero, ``[n]``, real.
        places: their rows u and columns v, ``[n]`` each. shape: ``(out, in)`` of F.
        weight, bias: W ``[out, in]`` and b ``[out]`` (or None), frozen.
    """
    if not x.numel():  # there is no transform of nothing
        matrix = spectral_matrix(values, places, shape)
        return F.linear(x, matrix if weight is None else matrix + weight, bias)
    if is_eager(x) and torch.is_grad_enabled() and (x.requires_grad or values.requires_grad):
        return SpectralLinear.of(x, values, *places, shape, weight, bias)
    return _forward(x, values, places, shape, weight, bias)


def _forward(
    x: torch.Tensor,
    values: torch.Tensor,
    places: Places,
    shape: tuple[int, int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    tokens = x.numel() // shape[1]
    if weight is not None and shape[0] * shape[1] < 2 * tokens * (shape[0] + shape[1]):
        return fresh_linear(x, spectral_matrix(values, places, shape).add_(weight), bias)
    update = _turned_back(_spectrum(x), values / shape[1], places, shape).view(*x.shape[:-1], -1)
    return update if weight is None else update.add_(F.linear(x, weight, bias))


def spectral_matrix(values: torch.Tensor, places: Places, shape: tuple[int, int]) -> torch.Tensor:
    """Re(IFFT2(F)), ``[rows, columns]``. For the arguments see :func:`spectral_linear`."""
    (u, v), (rows, columns), half = places, shape, shape[1] // 2 + 1
    # the real part has the spectrum (F[u, v] + F[-u, -v]) / 2, of which half is held; -u, for the transform's own sign
    u, v = torch.cat((-u % rows, u)), torch.cat((v, -v % columns))
    inside, values = v < half, values / (2 * rows)
    spectrum = values.new_zeros(half * rows).index_add(
        0, (v * rows + u) * inside, torch.cat((values, values)) * inside
    )
    above = torch.fft.irfft(torch.fft.rfft(spectrum.view(half, rows)).t(), n=columns)
    below = above[1 : rows - len(above) + 1].flip(0)
    return torch.cat((above, torch.cat((below[:, :1], below[:, 1:].flip(1)), 1)))


def _spectrum(x: torch.Tensor) -> torch.Tensor:
    """sum_i x_i exp(-2 pi i f / n) for half of the f: real parts and imaginary ones, ``[2, f, tokens + PAD]``."""
    x = x.reshape(-1, x.shape[-1]).contiguous()  # torch 2.8 transforms nothing that has a stride of 0
    parts = torch.view_as_real(torch.fft.rfft(x)).permute(2, 1, 0)
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


def _correlated(rows: torch.Tensor, columns: torch.Tensor, places: Places, shape: tuple[int, int]) -> torch.Tensor:
    """The spectrum of the sum over the tokens of y x^T at these places, from the spectra of y and x: ``[n]``, real."""
    (to, to_above), (of, of_above) = (_folded(f, size) for f, size in zip(places, shape))
    to, of = torch.cat((to, to + rows.shape[1])), torch.cat((of, of + columns.shape[1]))
    real, imaginary = paired_products(rows.flatten(0, 1), columns.flatten(0, 1), to, of).view(2, -1)
    return torch.where(to_above == of_above, real - imaginary, real + imaginary)


class SpectralLinear(Direct):
    """See :func:`spectral_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        u: torch.Tensor,
        v: torch.Tensor,
        shape: tuple[int, int],
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.shape = shape
        ctx.kept, tensor = kept(x, values.requires_grad)
        ctx.save_for_backward(tensor, values, u, v, weight)
        return _forward(x, values, (u, v), shape, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        saved, values, u, v, weight = ctx.saved_tensors
        rows, columns = ctx.shape
        dy, spectrum, dx, d_values = gradient.reshape(-1, rows), None, None, None
        by_matrix = weight is not None and rows < 2 * len(dy)
        if ctx.needs_input_grad[1] or not by_matrix:
            spectrum = _spectrum(dy)
        if ctx.needs_input_grad[1]:
            of_x = ctx.kept.get(saved, _spectrum)
            d_values = _correlated(spectrum, of_x, (u, v), ctx.shape) / (rows * columns)
        if ctx.needs_input_grad[0] and by_matrix:
            dx = dy @ spectral_matrix(values, (u, v), ctx.shape).add_(weight)
        elif ctx.needs_input_grad[0]:
            dx = _turned_back(spectrum, values / rows, (v, u), (columns, rows))
            dx = dx if weight is None else dx.addmm_(dy, weight)
        return None if dx is None else dx.view(*gradient.shape[:-1], -1), d_values, None, None, None, None, None
