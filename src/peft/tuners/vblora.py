"""VB-LoRA: dW = B A whose pieces are mixtures of a few vectors from one bank for the whole model (2405.15179)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.families.families import LowRankLayer, input_dropout
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


@dataclass
class VBLoRAConfig(TargetModules, ExcludeModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection):
    """Config of VB-LoRA: all A and B are put together from one small bank of vectors.

    For very small files: with ``save_only_topk_weights`` an adapter is the bank and a few indices. A fresh adapter is
    not the identity: the bank and the logits start at random, both.
    """

    METHOD: ClassVar[PeftType] = PeftType.VBLORA
    OWN_BIAS: ClassVar[str] = "vblora_only"

    r: int = option(4, "Rank of B A.", minimum=1)
    num_vectors: int = option(256, "Vectors in the bank. More of them for larger models.", minimum=1)
    vector_length: int = option(
        256, "Length of the vectors. A and B are cut into pieces of this length; the last may be shorter.", minimum=1
    )
    topk: int = option(2, "How many vectors of the bank make a piece.", minimum=1)
    save_only_topk_weights: bool = option(
        False, "Write only the weights of the vectors in use: a smaller file, trained on only among these."
    )
    vblora_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_vector_bank_bound: float = option(0.02, "The bank starts uniform in +- this bound; above 0.", minimum=0)
    init_logits_std: float = option(0.1, "Standard deviation of the logits at the start.", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ConfigError(f"VBLoRAConfig: topk={self.topk} of a bank of num_vectors={self.num_vectors}.")


class VBLoRALayer(LowRankLayer):
    """Each piece of A and B is sum_k w_k bank[i_k], w the softmax of its k largest logits and i their places."""

    weights: ClassVar[dict[str, type]] = {"vblora_logits_A": nn.ParameterDict, "vblora_logits_B": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {
        "r": dict,
        "topk": dict,
        "save_only_topk_weights": dict,
        "vblora_dropout": nn.ModuleDict,
    }
    shared: ClassVar[tuple[str, ...]] = ("vblora_vector_bank",)
    split: ClassVar[tuple[str, ...]] = ("_topk_indices", "_topk_weights")
    dropout: ClassVar[str] = "vblora_dropout"

    @classmethod
    def share(cls, config: VBLoRAConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, torch.Tensor]:
        """The bank, ``[num_vectors, vector_length]``, trained."""
        bound = config.init_vector_bank_bound
        bank = torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound)
        return {"vblora_vector_bank": nn.Parameter(bank)}

    def update_layer(self, name: str, config: VBLoRAConfig, key: str) -> None:
        rows, columns = (-(-size // config.vector_length) for size in fan(self.shape))
        a, b = (torch.empty(config.r, columns, config.num_vectors), torch.empty(rows, config.r, config.num_vectors))
        for attribute, logits in (("vblora_logits_A", a), ("vblora_logits_B", b)):
            self.put(name, **{attribute: nn.Parameter(logits.normal_(0, config.init_logits_std))})
        self.put(name, r=config.r, topk=config.topk, save_only_topk_weights=config.save_only_topk_weights)
        self.put(name, vblora_dropout=input_dropout(config.vblora_dropout))

    def pieces(self, name: str, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., num_vectors]`` -> pieces ``[..., vector_length]``."""
        best, place = logits.float().topk(self.topk[name], -1)
        bank, shape = self.vblora_vector_bank[name].float(), place.shape
        place, mix = place.flatten(0, 1), best.softmax(-1).flatten(0, 1)
        mixed = F.embedding_bag(place, bank, per_sample_weights=mix, mode="sum")
        return mixed.view(*shape[:-1], -1).to(logits.dtype)

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (self.pieces(name, logits[name]) for logits in (self.vblora_logits_A, self.vblora_logits_B))
        rows, columns = fan(self.shape)
        return a.flatten(1)[:, :columns], b.transpose(1, 2).flatten(0, 1)[:rows]

    def as_saved(self, name: str, saved: str, tensor: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        if not self.save_only_topk_weights[name]:
            return tensor
        best, place = tensor.topk(self.topk[name], -1)
        sizes = (torch.uint8, torch.int16, torch.int32)
        small = next(dtype for dtype in sizes if torch.iinfo(dtype).max >= tensor.shape[-1] - 1)
        # the last weight is what the others leave of 1
        return {"_topk_indices": place.to(small), "_topk_weights": best.softmax(-1)[..., :-1].contiguous()}

    def as_loaded(self, name: str, saved: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        place, weights = parts["_topk_indices"].long(), parts["_topk_weights"]
        weights = torch.cat((weights, (1 - weights.sum(-1, keepdim=True)).clamp(min=0)), -1)
        logits = weights.new_full((*place.shape[:-1], len(self.vblora_vector_bank[name])), float("-inf"))
        return logits.scatter(-1, place, weights.log())


VBLoRAModel = define_tuner(
    "VBLoRAModel",
    VBLoRALayer,
    VBLoRAConfig,
    prefix="vblora_",
    targets=TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING,
)
