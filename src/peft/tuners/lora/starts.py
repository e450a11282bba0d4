"""What LoRA can start from, as functions of plain tensors: A ``[r, in]`` and B ``[out, r]`` of W ``[out, in]``."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import torch

from peft.kernels.decompositions import halves, svd


Pair = tuple[torch.Tensor, torch.Tensor]

PISSA = re.compile(r"pissa(?:_niter_(\d+))?")


def pissa(weight: torch.Tensor, r: int, niter: int | None = None) -> Pair:
    """A ``[r, in]`` and B ``[out, r]`` with B A = U_r S_r V_r^T, of the r largest values (PiSSA, arXiv 2404.02948).

    Both get the roots of the singular values.

    Args:
        weight: ``[out, in]``, float32.
        niter: approximate by a random projection with so many power iterations; by default the decomposition is exact.
    """
    if niter is None:
        return halves(*svd(weight), r)
    u, s, v = torch.svd_lowrank(weight, min(r, *weight.shape), niter=niter)
    return halves(u, s, v.T)


def olora(weight: torch.Tensor, r: int) -> Pair:
    """A = R[:r] ``[r, in]`` and B = Q[:, :r] ``[out, r]`` of W = Q R (OLoRA, arXiv 2406.01775)."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def corda(
    weight: torch.Tensor, covariance: torch.Tensor, r: int, least: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U ``[out, r]``, S ``[r]`` and V ``[in, r]`` with W = U S V^T over all r (CorDA, arXiv 2406.05223, eq. 2).

    From W C = U S V'^T: V^T is V'^T C^-1. C has a share of the mean of its diagonal added to it, of 1 % or as many
    times twice that as it takes for the inverse to be one.

    Args:
        weight: ``[out, in]``. covariance: C ``[in, in]``, of the layer's inputs.
        least: take the r smallest instead of the largest: directions that the data use least ("kpm").

    Raises:
        ValueError: if C holds values that are not finite.
    """
    if not covariance.isfinite().all():
        raise ValueError("the covariance of the inputs holds values that are not finite; check the calibration data.")
    eye, damping = torch.eye(len(covariance)).to(covariance), 0.01
    while True:
        damped = covariance + eye * (covariance.diagonal().mean() * damping)
        inverse, failed = torch.linalg.inv_ex(damped)
        # Damped until the inverse is one; a covariance of zeros never has one, so there is an end.
        if damping > 1e6 or (not failed and torch.dist(damped @ inverse, eye) < 0.05):
            break
        damping *= 2
    u, s, vt = svd(weight @ damped)
    kept = slice(max(len(s) - r, 0), None) if least else slice(r)
    return u[:, kept], s[kept], (vt[kept] @ inverse).T


def lora_ga(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    r: int,
    scaling: float,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: int = 16,
) -> Pair:
    """A and B along singular vectors of the weight's gradient (LoRA-GA, arXiv 2407.05000, eq. 7 and section 3.3).

    A has right vectors of length one; B has left vectors, as the reference has them times their singular values.

    Args:
        gradient, weight: ``[out, in]``, float32. scaling: s of s B A.
        direction: "ArB2r": A gets vectors 1 to r and B r + 1 to 2 r; "A2rBr": the other way round; "ArBr": A the
            even and B the odd ones of 2 r; "random": both the same r of them, drawn.
        scale: "stable": B times out^(1/4) / sqrt(gamma); "weight_svd": B as large as W's first singular value;
            "gd_scale": both divided by s; "unit": as they are.
    """
    most = min(gradient.shape)
    q = min(4 * r, most)  # more than are used: the last ones of a projection are rough
    u, s, v = torch.svd_lowrank(gradient, q=q, niter=4)
    u, s, v = u[:, : 2 * r], s[: 2 * r], v[:, : 2 * r]
    count = len(s)
    of_a: Sequence[int]
    of_b: Sequence[int]
    if count < 2 * r:  # there are not enough for both
        of_a = of_b = range(min(r, count))
    elif direction == "ArBr":
        of_a, of_b = range(1, 2 * r, 2), range(0, 2 * r, 2)
    elif direction == "A2rBr":
        of_a, of_b = range(r, 2 * r), range(r)
    elif direction == "ArB2r":
        of_a, of_b = range(r), range(r, 2 * r)
    else:
        of_a = of_b = random.sample(range(2 * r), r)
    a, b = v[:, list(of_a)].T, u[:, list(of_b)] * s[list(of_b)]
    if scale == "stable":
        b = b * (len(gradient) ** 0.25 / gamma**0.5)
    elif scale == "weight_svd":
        b = b * (torch.linalg.matrix_norm(weight, 2) / s[of_b[0]])
    elif scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return a, b
