"""VB-LoRA: dW = B A whose pieces are mixtures of a few vectors from one bank for the whole model (2405.15179)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.compat.methods import VBLoRACompat
from peft.config import ExcludeModules, FanInFanOut, LayerSelection, ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import input_dropout, part, setting, shared
from peft.core.base.kinds import fan
from peft.core.families import LowRank
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.core.model.tuner import BaseTuner
from peft.errors import ConfigError
from peft.peft_types import PeftType


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
        False, "Write only the weights of the vectors in use: a smaller file, from which training cannot go on."
    )
    vblora_dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    init_vector_bank_bound: float = option(
        0.02, "The bank starts uniform in +- this bound; above 0.", minimum=0, stuck=0
    )
    init_logits_std: float = option(0.1, "Standard deviation of the logits at the start.", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ConfigError(f"VBLoRAConfig: topk={self.topk} of a bank of num_vectors={self.num_vectors}.")


def vblora_pieces(logits: torch.Tensor, bank: torch.Tensor, topk: int) -> torch.Tensor:
    """sum_k w_k bank[i_k], w the softmax of the ``topk`` largest logits and i their places.

    Args:
        logits: ``[m, n, num_vectors]``. bank: ``[num_vectors, vector_length]``.

    Returns:
        ``[m, n, vector_length]``, in the dtype of the logits.
    """
    best, place = logits.float().topk(topk, -1)  # [m, n, topk]
    place, mix = place.flatten(0, 1), best.softmax(-1).flatten(0, 1)
    mixed = F.embedding_bag(place, bank.float(), per_sample_weights=mix, mode="sum")  # [m n, vector_length]
    return mixed.unflatten(0, logits.shape[:2]).to(logits.dtype)


class VBLoRA(LowRank):
    """dW = B A, of which each piece of ``vector_length`` entries is a mixture of the bank's vectors."""

    vblora_logits_A, vblora_logits_B = part(), part()
    vblora_vector_bank = shared()
    r, topk, save_only_topk_weights, is_partial = setting(), setting(), setting(), setting()
    vblora_dropout = input_dropout()
    split = ("_topk_indices", "_topk_weights")

    @classmethod
    def share(cls, config: VBLoRAConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, torch.Tensor]:
        """The bank, ``[num_vectors, vector_length]``, trained."""
        bound = config.init_vector_bank_bound
        bank = torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound)
        return {"vblora_vector_bank": nn.Parameter(bank)}

    def create(self, config: VBLoRAConfig, key: str) -> None:
        rows, columns = (-(-size // config.vector_length) for size in fan(self.shape))
        std, n = config.init_logits_std, config.num_vectors
        self.vblora_logits_A = nn.Parameter(torch.empty(config.r, columns, n).normal_(0, std))
        self.vblora_logits_B = nn.Parameter(torch.empty(rows, config.r, n).normal_(0, std))
        self.r, self.topk, self.save_only_topk_weights = config.r, config.topk, config.save_only_topk_weights
        self.vblora_dropout = config.vblora_dropout

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._refuse_to_train_on()
        bank, (rows, columns) = self.vblora_vector_bank, fan(self.shape)
        a, b = (vblora_pieces(logits, bank, self.topk) for logits in (self.vblora_logits_A, self.vblora_logits_B))
        # [r, pieces of a row, length] -> [r, in]; [pieces of a column, r, length] -> [out, r]
        return a.flatten(1)[:, :columns], b.transpose(1, 2).flatten(0, 1)[:rows]

    def as_saved(self, saved: str, tensor: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        if not self.save_only_topk_weights:
            return tensor
        best, place = tensor.topk(self.topk, -1)
        sizes = (torch.uint8, torch.int16, torch.int32)
        small = next(dtype for dtype in sizes if torch.iinfo(dtype).max >= tensor.shape[-1] - 1)
        # the last weight is what the others leave of 1
        return {"_topk_indices": place.to(small), "_topk_weights": best.softmax(-1)[..., :-1].contiguous()}

    def as_loaded(self, saved: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        place, weights = parts["_topk_indices"].long(), parts["_topk_weights"]
        weights = torch.cat((weights, (1 - weights.sum(-1, keepdim=True)).clamp(min=0)), -1)
        logits = weights.new_full((*place.shape[:-1], len(self.vblora_vector_bank)), float("-inf"))
        return logits.scatter(-1, place, weights.log())

    def loaded(self) -> None:
        self.is_partial = None  # asked again at the next call

    def _refuse_to_train_on(self) -> None:
        """A file of the largest weights alone leaves the other logits at minus infinity, where nothing moves them."""
        logits = self.vblora_logits_A
        if not (self.training and logits.requires_grad and torch.is_grad_enabled()) or logits.is_meta:
            return
        if self.is_partial is None:
            self.is_partial = bool(logits.isinf().any() or self.vblora_logits_B.isinf().any())
        if self.is_partial:
            raise RuntimeError(
                f"adapter {self.name!r} comes from a file with save_only_topk_weights=True: it holds the topk="
                f"{self.topk} largest weights of each piece, and no other could ever be chosen again. Train on from "
                "a file with all of them (save_only_topk_weights=False), or call eval() to use this one as it is."
            )


class VBLoRATuner(VBLoRACompat, BaseTuner):
    """Applies VB-LoRA, and counts what a file of it holds."""


VBLoRAModel = define_tuner(VBLoRA, VBLoRAConfig, base=VBLoRATuner)
