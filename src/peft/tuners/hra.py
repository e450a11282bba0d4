"""HRA: the input goes through r Householder reflections, W' = W H_1 ... H_r (arXiv 2405.17484)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.families.families import RotationLayer
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


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


class HRALayer(RotationLayer):
    """W' = W R^T with R^T = H_1 ... H_r; u is ``[in * kernel, r]``. Embeddings reflect their output.

    An odd ``r`` (or ``apply_GS``) starts at random reflections, so a fresh adapter changes the model.
    """

    weights: ClassVar[dict[str, type]] = {"hra_u": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {"hra_r": dict, "hra_apply_GS": dict}

    def update_layer(self, name: str, config: HRAConfig, key: str) -> None:
        paired = config.init_weights and config.r % 2 == 0
        u = torch.empty(self.rotated_features, config.r // 2 if paired else config.r)
        nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        if paired:
            u = u.repeat_interleave(2, dim=1)
        self.put(name, hra_u=nn.Parameter(u), hra_r=config.r, hra_apply_GS=config.apply_GS)

    def rotate(self, name: str, x: torch.Tensor, back: bool = False) -> torch.Tensor:
        """The compact form of Schreiber and Van Loan: H_1 ... H_r = I - U T U^T, T^-1 = I/2 + strict_upper(U^T U)."""
        u = self.hra_u[name]
        # there is no triangular solver for 16 bits, and to round between the reflections adds up
        wide = torch.promote_types(torch.promote_types(u.dtype, x.dtype), torch.float32)
        u, dtype, x = u.to(wide), x.dtype, x.to(wide)
        if self.hra_apply_GS[name]:
            u = gram_schmidt(u)
            reflected = 2 * u.T
        else:
            u = u / u.norm(dim=0)
            inverse = (u.T @ u).triu(1) + 0.5 * torch.eye(u.shape[1], device=u.device, dtype=u.dtype)
            inverse = inverse if back else inverse.T
            reflected = torch.linalg.solve_triangular(inverse, u.T, upper=back)
        return (x - (x @ u) @ reflected).to(dtype)


def gram_schmidt(u: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns ``[n, r]`` that span those of u; one that depends on those before it becomes zero."""
    columns: list[torch.Tensor] = []
    for column in (u / u.norm(dim=0)).unbind(1):
        for other in columns:
            column = column - (other @ column) * other
        norm = column.norm()
        columns.append(column / norm if norm > 1e-5 else torch.zeros_like(column))
    return torch.stack(columns, 1)


HRAModel = define_tuner(
    "HRAModel",
    HRALayer,
    HRAConfig,
    prefix="hra_",
    targets=TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING,
)
