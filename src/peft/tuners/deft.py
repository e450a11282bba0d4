"""DEFT: W' = (I - Q P^T) W + s Q R, a subspace of the outputs taken out and learned anew (NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.families import Fold
from peft.core.layer.weight import wide
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType


@dataclass
class DeftConfig(TargetModules, ExcludeModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of DEFT: r directions of the output are projected out of W, and a low-rank part takes their place.

    For personalising generative models, where new concepts should replace old behaviour in a small subspace and
    leave the rest alone. At the start the trained part is what has been taken out.
    """

    METHOD: ClassVar[PeftType] = PeftType.DEFT
    OWN_BIAS: ClassVar[str] = "deft_only"

    r: int = option(8, "Number of directions.", minimum=1)
    decomposition_method: Literal["relu", "qr"] = option(
        "relu",
        "What projects. 'relu': Q is the trained matrix, P its positive part. 'qr': Q = P is its orthonormal basis.",
        choices=("relu", "qr"),
    )
    init_scale: float = option(
        1.0, "Factor on the random R that init_weights=False draws.", needs=("init_weights", False)
    )
    alpha: int | None = option(None, "The trained part is scaled by s = alpha / r; by 1 where left out.")
    para: bool = option(False, "Only project, without the trained part R. Such an adapter is not the identity.")
    deft_dropout: float = option(0.0, "Dropout on the input of the trained part.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with R = P^T W / s, so that nothing changes; otherwise R is random.")


def deft_change(y: torch.Tensor, learned: torch.Tensor | None, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Q (s R x - P^T W x), along the last axis: of a vector x, or of the columns of W, where x is the identity.

    Args:
        y: W x, ``[..., out]``. learned: s R x, ``[..., r]``, where there is an R. q, p: ``[out, r]``.
    """
    rows = y.reshape(-1, y.shape[-1])  # of more axes torch multiplies in a way that depends on what trains
    inner = rows @ -p if learned is None else learned.reshape(-1, learned.shape[-1]) - rows @ p
    return (inner @ q.T).view(*y.shape[:-1], len(q))


def deft_directions(p: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and P, ``[out, r]``: the trained matrix and its positive part, or its orthonormal basis twice."""
    if method == "relu":
        return p, p.relu()
    q = torch.linalg.qr(wide(p))[0].to(p.dtype)  # there is no decomposition for 16 bits
    return q, q


class Deft(Fold):
    """W' = W + Q (s R - P^T W), Q and P ``[out, r]``, R ``[r, in * kernel]``. With ``para`` there is no R.

    The forward needs no W: the projection acts on the base layer's output. A grouped convolution is the exception, as
    its rows read different channels: there the weight is formed.
    """

    deft_P, deft_R = part(), part()
    r, scaling, deft_dropout = setting(), setting(), input_dropout()
    decomposition_method = setting()
    requires_dense_base = False

    def create(self, config: DeftConfig, key: str) -> None:
        out, inner = fan(self.shape)
        self.r, self.scaling = config.r, config.alpha / config.r if config.alpha else 1.0
        self.decomposition_method, self.deft_dropout = config.decomposition_method, config.deft_dropout
        self.deft_P = nn.Parameter(torch.randn(out, config.r) * 0.02)
        if config.para:
            return
        if config.init_weights and not self.deft_P.is_meta:  # on meta, a file brings both
            base = self.base_weight().flatten(1)
            with torch.no_grad():
                r = self.directions()[1].to(base).T @ base / self.scaling
        else:
            r = torch.randn(config.r, inner) * (0.02 * config.init_scale)
        self.deft_R = nn.Parameter(r.contiguous())

    def directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Q and P, ``[out, r]``."""
        return deft_directions(self.deft_P, self.decomposition_method)

    def folded(self, base: torch.Tensor) -> torch.Tensor:
        q, p = (matrix.to(base.dtype) for matrix in self.directions())
        learned = None if self.deft_R is None else self.scaling * self.deft_R.to(base.dtype).T
        return base + deft_change(base.flatten(1).T, learned, q, p).T.view_as(base)

    def only_folds(self) -> bool:
        layer = self.layer  # what comes from below is W x in most layers only
        return layer.base_layer is not self.base or layer.merged or self.in_features != self.shape[1]

    prefers_folding = only_folds

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        base, kind, (q, p), bias = self.base, self.kind, self.directions(), self.base_bias()
        learned = None if bias is None else bias.to(p.dtype) @ p
        if self.deft_R is not None:
            dropped = x if kind.lookup else self.deft_dropout(x)
            update = self.scaling * kind.channels_last(kind.down(base, dropped, self.deft_R))
            learned = update if learned is None else learned + update
        return y + kind.channels_back(deft_change(kind.channels_last(base_y).to(p.dtype), learned, q, p))


DeftModel = define_tuner(Deft, DeftConfig)
