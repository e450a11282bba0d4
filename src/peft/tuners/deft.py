"""DEFT: W' = (I - Q P^T) W + s Q R, a subspace of the outputs taken out and learned anew (NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.families.families import FoldLayer, input_dropout
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


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
    init_scale: float = option(1.0, "Factor on the random R that init_weights=False draws.")
    alpha: int | None = option(None, "The trained part is scaled by s = alpha / r; by 1 where left out.")
    para: bool = option(False, "Only project, without the trained part R. Such an adapter is not the identity.")
    deft_dropout: float = option(0.0, "Dropout on the input of the trained part.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with R = P^T W / s, so that nothing changes; otherwise R is random.")


class DeftLayer(FoldLayer):
    """W' = W + Q (s R - P^T W), Q and P ``[out, r]``, R ``[r, in * kernel]``. With ``para`` there is no R.

    The forward needs no W: the projection acts on the base layer's output. A grouped convolution is the exception, as
    its rows read different channels: there the weight is formed.
    """

    weights: ClassVar[dict[str, type]] = {"deft_P": nn.ParameterDict, "deft_R": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {
        "r": dict,
        "scaling": dict,
        "deft_dropout": nn.ModuleDict,
        "decomposition_method": dict,
    }
    reads_weight: ClassVar[bool] = False

    def update_layer(self, name: str, config: DeftConfig, key: str) -> None:
        out, inner = fan(self.shape)
        scale = config.alpha / config.r if config.alpha else 1.0
        self.put(name, r=config.r, scaling=scale, decomposition_method=config.decomposition_method)
        self.put(name, deft_P=nn.Parameter(torch.randn(out, config.r) * 0.02))
        self.put(name, deft_dropout=input_dropout(config.deft_dropout))
        if config.para:
            return
        if config.init_weights and not self.deft_P[name].is_meta:
            base = self.unmerged_weight().flatten(1)
            with torch.no_grad():
                r = self.directions(name)[1].to(base).T @ base / scale
        else:
            r = torch.randn(config.r, inner) * (0.02 * config.init_scale)
        self.put(name, deft_R=nn.Parameter(r.contiguous()))

    def directions(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Q and P, ``[out, r]``."""
        p = self.deft_P[name]
        if self.decomposition_method[name] == "relu":
            return p, p.relu()
        wide = p.float() if p.dtype.itemsize < 4 else p  # there is no decomposition for 16 bits
        q = torch.linalg.qr(wide)[0].to(p.dtype)
        return q, q

    def reweight(self, name: str, base: torch.Tensor) -> torch.Tensor:
        q, p = (part.to(base.dtype) for part in self.directions(name))
        inner = p.T @ -base.flatten(1)
        if name in self.deft_R:
            inner = inner + self.scaling[name] * self.deft_R[name].to(base.dtype)
        return base + (q @ inner).view_as(base)

    def needs_weight(self) -> bool:
        nested = self.base_layer is not self.get_base_layer()
        return nested or self.merged or self.in_features != self.shape[1]  # what comes from below is then not W x

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        base, kind, (q, p), bias = self.get_base_layer(), self.kind, self.directions(name), self.unmerged_bias()
        taken = kind.channels_last(base_y).to(p.dtype) @ p
        inner = -taken if bias is None else bias.to(p.dtype) @ p - taken
        if name in self.deft_R:
            dropped = x if kind.lookup else self.deft_dropout[name](x)
            learned = kind.channels_last(kind.down(base, dropped, self.deft_R[name]))
            inner = inner + self.scaling[name] * learned
        return y + kind.channels_back(inner @ q.T)


DeftModel = define_tuner(
    "DeftModel",
    DeftLayer,
    DeftConfig,
    prefix="deft_",
    targets=TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING,
)
