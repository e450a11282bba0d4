"""FROD: W' = U (diag(l) + S) V^T, V common to like layers, l and a sparse S trained (AAAI 2026, v40i31.39813)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import input_dropout, part, setting, shared
from peft.core.families import LowRank
from peft.core.filling import skip_values
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.weight import base_bias, sums_exactly
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType
from peft.tuners.frod_utils import (
    categories,
    common_basis,
    coordinates,
    directions,
    off_diagonal_places,
    sparse_product,
)


@dataclass
class FrodConfig(TargetModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of FROD: W in a basis that like layers have in common; its scales train, and a few couplings.

    Updates have full rank with few numbers: ``in + sparse_rate in^2`` a layer. Making the basis takes a while, and the
    frozen U of each layer as much memory as W.
    """

    METHOD: ClassVar[PeftType] = PeftType.FROD
    OWN_BIAS: ClassVar[str] = "frod_only"

    projection_prng_key: int = option(0, "Seed of the places of S.")
    save_projection: bool = option(
        True, "Write V and the places of S into the file. Without, they are made again from the base and the seed."
    )
    frod_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with W' = W; otherwise random numbers are added to l and S.")
    sparse_rate: float = option(
        0.01, "Share of the entries of S that train; none is on the diagonal, where l is.", minimum=0, maximum=1
    )
    regularization_alpha: float = option(
        1e-3, "Added to the diagonal of each layer's share of the basis, so that it has an inverse.", minimum=0
    )
    progressbar: bool = option(True, "Show a progress bar while the basis is made.")
    runtime_offload_base_weight: bool = option(
        False, "Has no effect: W stays where it is, since merging, other adapters and switching off need it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runtime_offload_base_weight:
            warnings.warn(
                "FrodConfig: runtime_offload_base_weight has no effect. W stays where it is, since merging, other "
                "adapters and switching this one off need it."
            )


def frod_coupled(h: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(diag(l) + S) h along the last axis, S with ``values`` ``[nnz]`` at ``places`` ``[2, nnz]``: rows, columns."""
    return torch.addcmul(sparse_product(h, values, places), h, scales)


def frod_product(
    x: torch.Tensor, u: torch.Tensor, v: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """U (diag(l) + S) V^T x along the last axis, for U ``[out, n]`` and V ``[n, n]``: W' x for the trained l."""
    return F.linear(frod_coupled(x @ v, scales, values, places), u)


class Frod(LowRank):
    """dW = U (diag(l - l_0) + S) V^T with U diag(l_0) = W V^-T, the columns of U of length 1.

    V ``[n, n]``, n = in * kernel, and the places of S belong to all layers that have one name in the blocks of a
    model, such as ``self_attn.q_proj``. Tables of embeddings are transposed: V turns their vectors.
    """

    frod_lambda_l, frod_lambda_s_values = part(), part()
    frod_U, frod_start = part(BufferDict, remade=True), part(BufferDict, remade=True)
    frod_V, frod_s_indices, frod_s_size = shared(frozen=True), shared(frozen=True), shared(frozen=True)
    category, frod_dropout = setting(), input_dropout()
    save_projection = setting()

    @classmethod
    def share(cls, config: FrodConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        return projections(config, layers)

    def create(self, config: FrodConfig, key: str) -> None:
        self.frod_dropout, self.save_projection = config.frod_dropout, config.save_projection
        if config.save_projection and skip_values():
            self.frod_U, self.frod_start = torch.empty(0), torch.empty(len(self.basis))
        else:
            self.loaded()
        values = torch.zeros(self.places.shape[1])
        scales = self.frod_start.to(values.device)  # on the meta device a file brings the values
        if not config.init_weights:
            values = 0.1 * torch.randn(len(values))
            scales = scales + 0.1 * torch.randn(len(scales))
        self.frod_lambda_l, self.frod_lambda_s_values = nn.Parameter(scales.clone()), nn.Parameter(values)

    def loaded(self) -> None:
        self.frod_U, self.frod_start = coordinates(directions(self.layer), self.basis)

    @property
    def basis(self) -> torch.Tensor:
        """V ``[n, n]``."""
        return self.frod_V[self.category]

    @property
    def places(self) -> torch.Tensor:
        """Rows and columns of the trained entries of S, ``[2, nnz]``."""
        return self.frod_s_indices[self.category]

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        u, v, *coupling = self._tensors(self.dtype)
        a = frod_coupled(v, *coupling).T
        return (u.T, a.T) if self.kind.lookup else (a, u)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        if not self.kind.matrix:
            return super().delta(x)
        return frod_product(self.dropped(x), *self._tensors(x.dtype))

    def _tensors(self, dtype: torch.dtype, whole: bool = False) -> tuple[torch.Tensor, ...]:
        """U, V, the scales less those of W (unless it is ``whole``), S's values and their places."""
        tensors = self.frod_U, self.basis, self.frod_lambda_l, self.frod_lambda_s_values, self.frod_start
        u, v, scales, values, start = (tensor.to(dtype) for tensor in tensors)
        return u, v, scales if whole else scales - start, values, self.places

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        adapter, *others = adapters
        whole = layer.kind.matrix and not layer.kind.opaque and layer.may_bypass_base(x) and sums_exactly(layer)
        if others or not whole or adapter.drops(adapter.frod_dropout):
            return None
        inner, bias = adapter.cast(x), base_bias(layer)
        y = frod_product(inner, *adapter._tensors(inner.dtype, whole=True))
        return (y if bias is None else y + bias).to(x.dtype)  # U, l and V say all of W'


def projections(config: FrodConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
    """V ``[n, n]``, the places of S ``[2, nnz]`` and its size, by category, and the category of each layer."""
    names = categories(layers)
    v, places, sizes = (BufferDict(None, persistent=config.save_projection) for _ in range(3))
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    for name in sorted(set(names)):
        members = [layer for layer, own in zip(layers, names) if own == name]
        n = directions(members[0]).shape[1]
        if config.save_projection and skip_values():
            v[name] = torch.empty(n, n)
        else:
            shown = tqdm(members, disable=not config.progressbar, desc=f"FROD: basis of {name}")
            v[name] = common_basis([directions(layer).cpu() for layer in shown], config.regularization_alpha)
        places[name], sizes[name] = off_diagonal_places(n, config.sparse_rate, generator), torch.tensor([n, n])
    return {"frod_V": v, "frod_s_indices": places, "frod_s_size": sizes, "category": names}


FrodModel = define_tuner(Frod, FrodConfig)
