"""HRA: the input goes through r Householder reflections, W' = W H_1 ... H_r (arXiv 2405.17484)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import part, setting
from peft.core.families import Rotation
from peft.core.filling import draw_like_linear
from peft.core.model.registry import define_tuner
from peft.kernels.made_again import reading
from peft.peft_types import PeftType


@dataclass
class HRAConfig(TargetModules, ExcludeModules, TrainedBias, ModulesToSave, LayerSelection):
    """Config of HRA: W' = W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T) with unit vectors u.

    Between LoRA and OFT: as cheap as a low-rank update (the product of reflections is one of rank r), yet
    orthogonal, so it keeps the angles between neurons.
    """

    METHOD: ClassVar[PeftType] = PeftType.HRA
    OWN_BIAS: ClassVar[str] = "hra_only"

    r: int = option(8, "Number of reflections. Even: an odd number of them cannot start as the identity.", minimum=1)
    apply_GS: bool = option(
        False, "Make the vectors orthogonal by Gram-Schmidt first. Such a product is never the identity."
    )
    init_weights: bool = option(
        True, "Start with pairs of equal reflections, so that nothing changes (r even); otherwise at random vectors."
    )


def reflected(x: torch.Tensor, u: torch.Tensor, back: bool = False) -> torch.Tensor:
    """x R along the last axis, R^T = H_1 ... H_r, H_i = I - 2 u_i u_i^T / |u_i|^2; with ``back`` x R^T.

    By the compact form of Schreiber and Van Loan: H_1 ... H_r = I - U T U^T, T^-1 = I/2 + strict_upper(U^T U).

    Args:
        x: ``[..., n]``. u: ``[n, r]``, of any length.
    """
    u = u / u.norm(dim=0)
    inverse = (u.T @ u).triu(1) + 0.5 * torch.eye(u.shape[1], device=u.device, dtype=u.dtype)
    inverse = inverse if back else inverse.T
    rest = torch.linalg.solve_triangular(inverse, u.T, upper=back)
    with reading(x):
        return x - (x @ u) @ rest


class HRA(Rotation):
    """W' = W R^T with R^T = H_1 ... H_r; u is ``[in * kernel, r]``. Embeddings reflect their output.

    An odd ``r`` (or ``apply_GS``) starts at random reflections, so a fresh adapter changes the model.
    """

    hra_u = part()
    hra_r, hra_apply_GS = setting(), setting()
    last_comes_first = True
    spares_input = True

    def create(self, config: HRAConfig, key: str) -> None:
        paired = config.init_weights and config.r % 2 == 0
        u = torch.empty(self.rotated_features, config.r // 2 if paired else config.r)
        draw_like_linear(u)
        if paired:
            u = u.repeat_interleave(2, dim=1)  # two equal reflections are none
        self.hra_u, self.hra_r, self.hra_apply_GS = nn.Parameter(u), config.r, config.apply_GS

    def rotate(self, x: torch.Tensor, back: bool = False, drawn: bool = False) -> torch.Tensor:
        # there is no triangular solver for 16 bits, and to round between the reflections adds up
        wide = torch.promote_types(torch.promote_types(self.hra_u.dtype, x.dtype), torch.float32)
        u, inner = self.hra_u.to(wide), x.to(wide)
        if not self.hra_apply_GS:
            return reflected(inner, u, back).to(x.dtype)
        u = gram_schmidt(u)  # then they commute
        with reading(x):
            return (inner - (inner @ u) @ (2 * u.T)).to(x.dtype)


def gram_schmidt(u: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns ``[n, r]`` that span those of u; one that depends on those before it becomes zero."""
    columns: list[torch.Tensor] = []
    for column in (u / u.norm(dim=0)).unbind(1):
        for other in columns:
            column = column - (other @ column) * other
        norm = column.norm()
        columns.append(torch.where(norm > 1e-5, column / norm.clamp_min(1e-5), 0))
    return torch.stack(columns, 1)


HRAModel = define_tuner(HRA, HRAConfig)
