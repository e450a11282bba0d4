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
from peft.core.families.families import LowRankLayer, drops, input_dropout
from peft.core.filling import skip_values
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.tuners.frod_utils import SparseProduct, categories, common_basis
from peft.tuners.spectra import random_places
from peft.utils.constants import TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING
from peft.utils.error import CheckpointError
from peft.utils.peft_types import PeftType


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
    sparse_rate: float = option(0.01, "Share of the entries of S that train.", minimum=0, maximum=1)
    regularization_alpha: float = option(
        1e-3, "Added to the diagonal of each W^T W, which has no inverse otherwise where W has fewer rows.", minimum=0
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


class FrodLayer(LowRankLayer):
    """dW = U (diag(l - l_0) + S) V^T with U diag(l_0) = W V^-T, the columns of U of length 1.

    V ``[n, n]``, n = in * kernel, and the places of S belong to all layers that have one name in the blocks of a
    model, such as ``self_attn.q_proj``. Tables of embeddings are transposed: V turns their vectors.
    """

    weights: ClassVar[dict[str, type]] = {
        "frod_lambda_l": nn.ParameterDict,
        "frod_lambda_s_values": nn.ParameterDict,
        "frod_U": BufferDict,
        "frod_start": BufferDict,
    }
    settings: ClassVar[dict[str, type]] = {"category": dict, "frod_dropout": nn.ModuleDict, "save_projection": dict}
    shared: ClassVar[tuple[str, ...]] = ("frod_V", "frod_s_indices", "frod_s_size")
    remade: ClassVar[tuple[str, ...]] = ("frod_U", "frod_start")
    dropout: ClassVar[str] = "frod_dropout"

    @classmethod
    def share(cls, config: FrodConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        """V ``[n, n]``, the places of S ``[2, nnz]`` and its size, by category, and the category of each layer."""
        names = categories(layers)
        v, places, sizes = (BufferDict(None, persistent=config.save_projection) for _ in cls.shared)
        for name in dict.fromkeys(names):
            members = [layer for layer, own in zip(layers, names) if own == name]
            n = members[0].directions().shape[1]
            if config.save_projection and skip_values():
                v[name] = torch.empty(n, n)
            else:
                shown = tqdm(members, disable=not config.progressbar, desc=f"FROD: basis of {name}")
                v[name] = common_basis((layer.directions().cpu() for layer in shown), config.regularization_alpha)
            chosen = random_places(n * n, int(config.sparse_rate * n * n), config.projection_prng_key)
            places[name], sizes[name] = torch.stack([chosen // n, chosen % n]), torch.tensor([n, n])
        return {"frod_V": v, "frod_s_indices": places, "frod_s_size": sizes, "category": names}

    def directions(self) -> torch.Tensor:
        """W ``[out, in * kernel]``, or a table as ``[tokens, dim]``."""
        weight = self.unmerged_weight().detach().flatten(1)
        return weight.T if self.kind.lookup else weight

    def update_layer(self, name: str, config: FrodConfig, key: str) -> None:
        self.put(name, frod_dropout=input_dropout(config.frod_dropout), save_projection=config.save_projection)
        if config.save_projection and skip_values():
            n = len(self._of("frod_V", name))
            self.put(name, frod_U=torch.empty(0), frod_start=torch.empty(n))
        else:
            self.loaded(name)
        values = torch.zeros(self._of("frod_s_indices", name).shape[1])
        scales = self.frod_start[name].to(values.device)  # on the meta device a file brings the values
        if not config.init_weights:
            scales, values = scales + 0.1 * torch.randn(len(scales)), 0.1 * torch.randn(len(values))
        self.put(name, frod_lambda_l=nn.Parameter(scales.clone()), frod_lambda_s_values=nn.Parameter(values))

    def loaded(self, name: str) -> None:
        w = self.directions()
        u = torch.linalg.solve(self._of("frod_V", name).to(w.device, torch.double), w.double().T).T.contiguous()
        start = u.norm(dim=0)
        self.put(name, frod_U=(u / start.clamp_min(1e-30)).float(), frod_start=start.float())

    def upgrade(self, name: str, written_by: str) -> None:
        if written_by.startswith("0.") and not self.save_projection[name]:
            raise CheckpointError(
                f"the file was written by version {written_by} with save_projection=False, and that version drew what "
                "it left out in a way of its own. Save the adapter there with save_projection=True."
            )

    def _of(self, attribute: str, name: str) -> torch.Tensor:
        return getattr(self, attribute)[name][self.category[name]]

    def _coupled(self, name: str, h: torch.Tensor, less: torch.Tensor | float = 0.0) -> torch.Tensor:
        """(diag(l - less) + S) h along the last axis."""
        scales, values = self.frod_lambda_l[name].to(h.dtype), self.frod_lambda_s_values[name].to(h.dtype)
        return torch.addcmul(SparseProduct.apply(h, values, self._of("frod_s_indices", name)), h, scales - less)

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.frod_lambda_l[name].dtype
        u, v, start = (t.to(dtype) for t in (self.frod_U[name], self._of("frod_V", name), self.frod_start[name]))
        a = self._coupled(name, v, start).T
        return (u.T, a.T) if self.kind.lookup else (a, u)

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._product(name, self.dropped(name, x)) if self.kind.matrix else super().delta(name, x)

    def _product(self, name: str, x: torch.Tensor, whole: bool = False) -> torch.Tensor:
        """dW x; with ``whole`` W' x."""
        u, v, start = (t.to(x.dtype) for t in (self.frod_U[name], self._of("frod_V", name), self.frod_start[name]))
        return F.linear(self._coupled(name, x @ v, 0.0 if whole else start), u)

    def fused(self, names: list[str], x: torch.Tensor) -> torch.Tensor | None:
        base = self._modules["base_layer"]
        plain = self.kind.matrix and self.kind.is_plain(base) and not base.weight.requires_grad and not self.merged
        alone = len(names) == 1 and not drops(self, self.frod_dropout.values())
        if not (plain and alone and self.sums_exactly()):
            return None
        y, bias = self._product(names[0], self.cast(names[0], x), whole=True), self.get_base_bias()
        return (y if bias is None else y + bias).to(x.dtype)  # U, l and V say all of W'


FrodModel = define_tuner(
    "FrodModel",
    FrodLayer,
    FrodConfig,
    prefix="frod_",
    targets=TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING,
)
