"""TinyLoRA: dW = B (sum_k v_k P_k) A in the leading singular subspace, with v shared by layers (2602.04118)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import input_dropout, part, setting, shared
from peft.core.addition import LinearIn
from peft.core.base.kinds import fan
from peft.core.families import LowRank
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.kernels.decompositions import halves, svd
from peft.peft_types import PeftType


@dataclass
class TinyLoraConfig(TargetModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of TinyLoRA: u numbers for each group of layers, and nothing else, are trained.

    For the smallest adapters of all, tens of parameters, such as in reinforcement learning on a capable model.
    """

    METHOD: ClassVar[PeftType] = PeftType.TINYLORA
    OWN_BIAS: ClassVar[str] = "tinylora_only"

    r: int = option(2, "Rank of the frozen factors; at most that of the weight.", minimum=1)
    u: int = option(64, "How many numbers are trained for each group of layers.", minimum=1)
    weight_tying: float = option(
        0.0, "0: each layer is a group of its own; 1: all are one; between: neighbours are.", minimum=0, maximum=1
    )
    projection_seed: int = option(42, "Seed of the random matrices P.")
    save_projection: bool = option(
        True, "Write P into the file. Without, it is drawn again from projection_seed when it is loaded."
    )
    init_v_bound: float = option(
        0.02,
        "Bound of the trained numbers where they start at random.",
        minimum=0,
        needs=("init_weights", ("uniform", False)),
    )
    tinylora_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_weights: bool | str = option(
        True,
        "Start with v = 0, so that nothing changes; 'uniform' or False: uniform in +- init_v_bound.",
        choices=(True, False, "uniform"),
    )


def tinylora_core(v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """M = sum_k v_k P_k of dW = B M A, ``[r, r]``.

    Args:
        v: ``[u]``. p: the P_k ``[u, r, r]``.
    """
    return torch.einsum("u,uij->ij", v, p)


class TinyLora(LowRank):
    """dW = B M A with A = sqrt(S) V^T and B = U sqrt(S) of the weight's SVD, M = sum_k v_k P_k ``[r, r]``.

    Of an embedding A and B are those of the table ``[tokens, dim]``.
    """

    tinylora_A, tinylora_B = part(BufferDict), part(BufferDict)
    tinylora_P = part(BufferDict, saved_by="save_projection")
    tinylora_v = shared()
    r, u, layer_index, tinylora_v_key, save_projection = setting(), setting(), setting(), setting(), setting()
    tinylora_dropout = input_dropout()
    adds = LinearIn("tinylora_v")

    @classmethod
    def share(cls, config: TinyLoraConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        """The trained vectors ``[u]``, one for each group of neighbouring layers, and which group a layer is in."""
        groups = max(1, round(len(layers) * (1 - config.weight_tying)))
        bound = 0.0 if config.init_weights is True else config.init_v_bound
        start = (torch.empty(config.u).uniform_(-bound, bound) for _ in range(groups))
        vectors = nn.ParameterDict({str(i): nn.Parameter(v) for i, v in enumerate(start)})
        # The last group has what is left over.
        keys = [str(min(i // (len(layers) // groups), groups - 1)) for i in range(len(layers))]
        return {"tinylora_v": vectors, "tinylora_v_key": keys, "layer_index": list(range(len(layers)))}

    def create(self, config: TinyLoraConfig, key: str) -> None:
        self.r = r = min(config.r, *fan(self.shape))
        self.u, self.save_projection = config.u, config.save_projection
        generator = torch.Generator("cpu").manual_seed(config.projection_seed + self.layer_index)
        # On the CPU even for a skeleton: a file need not hold it (save_projection=False).
        self.tinylora_P = torch.empty(config.u, r, r, device="cpu").normal_(0, 1 / math.sqrt(r), generator=generator)
        sizes = fan(self.shape)[::-1] if self.kind.lookup else fan(self.shape)
        a, b = torch.empty(r, sizes[1]), torch.empty(sizes[0], r)
        if not a.is_meta:  # otherwise the file brings them
            weight = self.base_weight().detach().flatten(1).float()
            a, b = halves(*svd(weight.T if self.kind.lookup else weight), r)
        # As they come from a file, to the last bit of a product.
        self.tinylora_A, self.tinylora_B = a.contiguous(), b.contiguous()
        self.tinylora_dropout = config.tinylora_dropout

    def vector(self) -> torch.Tensor:
        """v, ``[u]``, of the group of layers that this one is in."""
        return self.tinylora_v[self.tinylora_v_key]

    def outer(self) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.vector().dtype
        return self.tinylora_A.to(dtype), self.tinylora_B.to(dtype)

    def core(self) -> torch.Tensor:
        v = self.vector()
        return tinylora_core(v, self.tinylora_P.to(v.dtype))

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.kind.lookup:
            return super().pair()
        (a, b), core = self.outer(), self.core()
        return b.T, (core @ a).T

    def parameters(self) -> Iterator[torch.Tensor]:
        yield self.vector()


TinyLoraModel = define_tuner(TinyLora, TinyLoraConfig)
