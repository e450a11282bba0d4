"""Singular values, ranks by energy, and pairs of low rank: of matrices alone, whatever they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F


Key = TypeVar("Key")


def shared_ranks(values: Mapping[Key, torch.Tensor], share: float, total: float | None = None) -> dict[Key, int]:
    """The ranks of layers that together keep a share of the energy of them all at the lowest sum of ranks.

    The largest singular values of the whole model are kept, wherever they are; each layer keeps at least one.

    Args:
        values: the singular values of each layer, any shape. share: in (0, 1]. total: the energy (sum of squares)
            of all layers, if ``values`` are not all there are.
    """
    squares = {key: value.detach().double().flatten().square().sort(descending=True).values for key, value in
               values.items()}  # fmt: skip
    ordered = torch.cat([*squares.values()]).sort(descending=True).values
    wanted = share * (float(ordered.sum()) if total is None else total)
    count = int((ordered.cumsum(0) < wanted * (1 - 1e-12)).sum()) + 1  # rounding asks for no more than all
    least = ordered[min(count, len(ordered)) - 1]
    return {key: max(1, int((square >= least).sum())) for key, square in squares.items()}


def randomized_svd(
    matrix: torch.Tensor, rank: int, oversample: int = 8, iterations: int = 2, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values and vectors by a random projection (Halko et al., arXiv 0909.4061, alg. 4.4, 5.1).

    Args:
        matrix: ``[out, in]``, float32 or float64. rank: how many. oversample: further columns of the sketch.
        iterations: of the power method, which sharpen slowly falling spectra.

    Returns:
        (u ``[out, k]``, s ``[k]``, vh ``[k, in]``), k the lower of rank and what the matrix can have.
    """
    most = min(matrix.shape)
    width = min(rank + oversample, most)
    # A sketch of half the matrix costs more than the whole decomposition.
    if 2 * width >= most:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        # Drawn on the CPU, as everywhere: a seed gives the same on each device.
        start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
        basis = torch.linalg.qr(matrix @ start).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
        u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        u = basis @ u
    return u[:, :rank], s[:rank], vh[:rank]


def leading_svd(
    matrix: torch.Tensor, share: float, most: int | None = None, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular values and vectors that keep a share of the energy of a matrix, or ``most`` of them.

    The sketch grows until it has them.
    """
    limit = min(*matrix.shape, most or max(matrix.shape))
    energy, rank = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2 * share, 16
    while True:
        u, s, vh = randomized_svd(matrix, min(rank, limit), generator=generator)
        if rank >= limit or float(s.double().square().sum()) >= energy:
            return u, s, vh
        rank *= 2


def svd(matrix: torch.Tensor, driver: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of ``[..., out, in]``, without vectors beyond min(out, in).

    Args:
        driver: cuSOLVER's routine, for CUDA tensors.

    Raises:
        ValueError: for a driver on a device that has none.
    """
    if driver is not None and not matrix.is_cuda:
        raise ValueError(f"svd_driver={driver!r} chooses a routine of CUDA; leave it out on {matrix.device.type}.")
    return torch.linalg.svd(matrix, full_matrices=False, driver=driver)


def halves(
    u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = sqrt(S) V^T ``[rank, in]`` and B = U sqrt(S) ``[out, rank]``, of the largest singular values or all."""
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def face_splitting(
    a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[out, r1 r2]`` and B ``[r1 r2, in * kernel]`` with A B = (A1 B1) * (A2 B2), of ranks r1 and r2."""
    a = (a1[:, :, None] * a2[:, None, :]).flatten(1)  # all products of columns
    return a, (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)


def orthogonality(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|A A^T - I| + |B^T B - I|, Frobenius norms, for A ``[r, in]`` and B ``[out, r]``: how far both are from it."""
    eye = torch.eye(len(a), device=a.device, dtype=a.dtype)
    return (a @ a.T - eye).norm() + (b.T @ b - eye).norm()


def product_svd(
    down: torch.Tensor, up: torch.Tensor, driver: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of ``up @ down``, by that of a matrix ``[r, r]`` where the product is thin.

    Args:
        down: ``[..., r, in]``. up: ``[..., out, r]``. driver: as for :func:`svd`.
    """
    if down.shape[-2] >= min(down.shape[-1], up.shape[-2]):
        return svd(up @ down, driver)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, s, vh = svd(r_up @ r_down.mT, driver)
    return q_up @ u, s, vh @ q_down.mT


def factorize(
    weight: torch.Tensor, rank: int, clamp: float | None = None, driver: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best pair of a given rank for a matrix, by singular value decomposition.

    Args:
        weight: ``[..., out, in]``.
        clamp: limit the entries of the pair to this quantile of them all.
        driver: cuSOLVER's routine, for CUDA tensors.

    Returns:
        (down ``[..., rank, in]``, up ``[..., out, rank]``); zeros beyond the rank that the matrix can have.

    Raises:
        ValueError: for a driver on a device that has none.
    """
    u, s, vh = svd(weight, driver)
    return _truncated(vh, u * s.unsqueeze(-2), rank, clamp)


def factorize_product(
    down: torch.Tensor, up: torch.Tensor, rank: int, clamp: float | None = None, driver: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`factorize` of ``up @ down``, without forming it where it is thin.

    Args:
        down: ``[..., r, in]``. up: ``[..., out, r]``.
    """
    u, s, vh = product_svd(down, up, driver)
    return _truncated(vh, u * s.unsqueeze(-2), rank, clamp)


def _truncated(
    down: torch.Tensor, up: torch.Tensor, rank: int, clamp: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = down[..., :rank, :], up[..., :rank]
    if clamp is not None:
        limit = _quantile(torch.cat([down.flatten(), up.flatten()]), clamp)
        down, up = down.clamp(-limit, limit), up.clamp(-limit, limit)
    return resized(down, rank, -2), resized(up, rank, -1)


def _quantile(values: torch.Tensor, q: float) -> float:
    """As ``torch.quantile``, which takes at most 2**24 values."""
    ordered, place = values.sort().values, q * (values.numel() - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return float(low + (high - low) * (place % 1))


def resized(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """The tensor with zeros appended along one axis."""
    missing, behind = size - tensor.shape[dim], tensor.dim() - 1 - dim % tensor.dim()
    return F.pad(tensor, (0, 0) * behind + (0, missing)) if missing else tensor
