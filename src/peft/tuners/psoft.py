"""PSOFT: dW = B (R - I) A, an orthogonal R within the weight's principal subspace (openreview FSHrinMArK)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.families import LowRank, ScaledBy
from peft.core.layer.buffers import BufferDict
from peft.core.layer.weight import wide
from peft.core.model.registry import define_tuner
from peft.kernels.decompositions import halves, svd
from peft.peft_types import PeftType
from peft.tuners.cayley import cayley, cayley_series


RANDOMISED = ("psoft_svd", "lowrank")


@dataclass
class PsoftConfig(TargetModules, ExcludeModules, FanInFanOut, ModulesToSave, LayerSelection):
    """Config of PSOFT: rotates the part of the weight that its r largest singular values make up, and scales it.

    Use it where OFT's rotations are wanted at the cost of a LoRA: r (r - 1) / 2 + 2 r numbers a layer. The frozen
    factors are not in the file; they come from the SVD of the base weight when it is loaded.
    """

    METHOD: ClassVar[PeftType] = PeftType.PSOFT

    r: int = option(32, "Dimension of the principal subspace.", minimum=1)
    psoft_alpha: int = option(32, "The update is scaled by psoft_alpha / r, which B is divided by: 1 at the start.")
    psoft_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    ab_svd_init: str = option(
        "psoft_init",
        "Where the singular values go: all to B (the columns of A are orthogonal, as the paper wants it), or with "
        "'pissa_init' their roots to A and to B.",
        choices=("psoft_init", "pissa_init"),
    )
    psoft_svd: str = option("full", "Exact SVD, or a randomised one that is faster.", choices=("full", "lowrank"))
    psoft_svd_lowrank_niter: int = option(10, "Iterations of the randomised SVD.", minimum=0, needs=RANDOMISED)
    random_seed: int = option(0, "Seed of the randomised SVD.", needs=RANDOMISED)
    psoft_orth: bool = option(True, "R is orthogonal; otherwise any r x r matrix.")
    psoft_mag_b: bool = option(True, "Train a scale of R's rows.")
    psoft_mag_a: bool = option(True, "Train a scale of R's columns.")
    use_cayley_neumann: bool = option(False, "Approximate the Cayley transform by a Neumann series.")
    num_cayley_neumann_terms: int = option(5, "Terms of that series.", minimum=1, needs="use_cayley_neumann")
    cayley_neumann_eps: float | None = option(
        None,
        "Scale a Q of larger Frobenius norm down to this, so that the series converges.",
        above=0,
        below=1,
        needs="use_cayley_neumann",
    )
    init_weights: bool = option(True, "Start with R = I, so that nothing changes; otherwise at a random R.")


class PsoftRotation(nn.Module):
    """R ``[r, r]`` = diag(vector_b) C diag(vector_a); C is ``weight``, or it is orthogonal and ``weight`` the upper
    triangle of a skew-symmetric Q.

    C is the Cayley transform (I + Q)(I - Q)^-1: the transpose of what the exact rotations of OFT and BOFT are for the
    same Q. Files depend on that.
    """

    def __init__(self, r: int, config: PsoftConfig) -> None:
        super().__init__()
        self.r, self.orthogonal = r, config.psoft_orth
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.radius = config.cayley_neumann_eps
        weight = torch.zeros(r * (r - 1) // 2) if self.orthogonal else torch.eye(r)
        self.weight = nn.Parameter(weight)
        if config.psoft_mag_b:
            self.vector_b = nn.Parameter(torch.ones(r))
        if config.psoft_mag_a:
            self.vector_a = nn.Parameter(torch.ones(r))
        if not config.init_weights:
            with torch.no_grad():
                self.weight += torch.randn_like(self.weight) * 0.1

    def cayley(self) -> torch.Tensor:
        """C of the triangle, ``[r, r]``."""
        upper = torch.ones(self.r, self.r, dtype=torch.bool, device=self.weight.device).triu(1)
        weight = wide(self.weight)
        q = weight.new_zeros(self.r, self.r).masked_scatter(upper, weight)  # keeps less than with indices
        q = q - q.T
        if self.terms is None:
            return cayley(q).to(self.weight.dtype)
        if self.radius is not None:
            q = q * (self.radius / q.norm().clamp_min(1e-30)).clamp(max=1)
        return cayley_series(q, self.terms).to(self.weight.dtype)

    def forward(self) -> torch.Tensor:
        """R, ``[r, r]``."""
        r = self.cayley() if self.orthogonal else self.weight
        if "vector_b" in self._parameters:
            r = self.vector_b[:, None] * r
        return r * self.vector_a if "vector_a" in self._parameters else r


class Psoft(LowRank, ScaledBy):
    """dW = s B (R - I) A with s B A the best approximation of W of rank r: A = V^T and B = U S / s of its SVD."""

    psoft_R = part(nn.ModuleDict)
    psoft_A, psoft_B = part(BufferDict, remade=True), part(BufferDict, remade=True)
    r, psoft_alpha, psoft_dropout = setting(), setting(), input_dropout()
    psoft_config = setting()

    def create(self, config: PsoftConfig, key: str) -> None:
        self.r, self.psoft_alpha = config.r, config.psoft_alpha
        self.scale_by(config.psoft_alpha / config.r)
        if self.r > (most := min(fan(self.shape))):
            raise ValueError(
                f"r={self.r} is more than the weight of {key or 'the layer'} has singular values: {most}. "
                "Lower it, or leave that module out of target_modules."
            )
        self.psoft_config = config
        self.freeze()
        self.psoft_R, self.psoft_dropout = PsoftRotation(self.r, config), config.psoft_dropout

    def freeze(self) -> None:
        """Make A and B of the base."""
        u, s, v = self.decompose(self.psoft_config)
        a, b = (v, u * s) if self.psoft_config.ab_svd_init == "psoft_init" else halves(u, s, v)
        self.psoft_A, self.psoft_B = a.contiguous(), b / self.initial_scaling()

    def loaded(self) -> None:
        if self.psoft_A.is_meta:
            self.freeze()

    def decompose(self, config: PsoftConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U ``[out, r]``, S ``[r]``, V^T ``[r, in * kernel]``."""
        weight, r = self.base_weight().detach().flatten(1).float(), config.r
        if config.psoft_svd == "full":
            u, s, v = svd(weight)
            return u[:, :r], s[:r], v[:r]
        # `svd_lowrank` draws from the global generator.
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(config.random_seed)
            u, s, v = torch.svd_lowrank(weight, q=r, niter=config.psoft_svd_lowrank_niter)
        return u, s, v.T

    def outer(self) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.psoft_R.weight.dtype
        return self.psoft_A.to(dtype), self.psoft_B.to(dtype)

    def core(self) -> torch.Tensor:
        """s (R - I)."""
        rotation = self.psoft_R()
        return (rotation - torch.eye(self.r, device=rotation.device, dtype=rotation.dtype)) * self.scaling


PsoftModel = define_tuner(Psoft, PsoftConfig)
