"""Poly: W x + (sum_s w_s B_s)(sum_s w_s A_s) x / r, w learned for each task (arXiv 2202.13914, 2211.03831)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.distributions.utils import clamp_probs

from peft.compat.methods import PolyCompat
from peft.config import ExcludeModules, ModulesToSave, TargetModules, option
from peft.core.adapter import part, setting
from peft.core.base.kinds import fan
from peft.core.families import Sample
from peft.core.filling import draw_like_linear
from peft.core.model.registry import define_tuner
from peft.core.model.tuner import BaseTuner
from peft.kernels.made_again import reading
from peft.peft_types import PeftType


@dataclass
class PolyConfig(TargetModules, ExcludeModules, ModulesToSave):
    """Config of Poly: an inventory of LoRA-like skills, mixed by learned weights for each task.

    For training on many tasks at once, and few-shot transfer to new ones that mix the same skills. A call says the
    task of each sample: ``model(..., task_ids=tensor)``. It cannot be merged.
    """

    METHOD: ClassVar[PeftType] = PeftType.POLY

    r: int = option(8, "Rank of each skill.", minimum=1)
    init_weights: bool = option(True, "Start with B = 0, so that nothing changes; otherwise B is random.")
    poly_type: str = option("poly", "How skills are chosen; there is one way.", choices=("poly",))
    n_tasks: int = option(1, "Number of tasks; with one, task_ids can be left out.", minimum=1)
    n_skills: int = option(4, "Number of skills that the tasks mix.", minimum=1)
    n_splits: int = option(
        1, "Parts of the features that choose skills apart: multi-head routing. Divides in- and output.", minimum=1
    )


class PolyRouter(nn.Module):
    """The weights of the skills for each task and split: ``module_logits``, ``[tasks, splits * skills]``."""

    def __init__(self, tasks: int, splits: int, skills: int) -> None:
        super().__init__()
        self.splits = splits
        self.module_logits = nn.Parameter(torch.empty(tasks, splits * skills).uniform_(-1e-3, 1e-3))

    def forward(self, tasks: torch.Tensor) -> torch.Tensor:
        """Weights ``[batch, splits, skills]`` that add up to 1; relaxed Bernoulli draws in training."""
        logits = self.module_logits[tasks].unflatten(-1, (self.splits, -1))
        if self.training:
            # as RelaxedBernoulli of torch.distributions draws at temperature 1, in a fraction of the calls
            drawn = clamp_probs(torch.rand(logits.shape, dtype=logits.dtype, device=logits.device))
            weights = (logits + torch.logit(drawn)).sigmoid()
        else:
            weights = logits.sigmoid()
        return weights / (weights.sum(-1, keepdim=True) + 1e-12)


def poly_matrices(weights: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_s w_s A_s ``[batch, in, r]`` and sum_s w_s B_s ``[batch, r, out]`` of each sample, by splits of features.

    Args:
        weights: w ``[batch, splits, skills]``. a: ``[splits, skills, in / splits, r]``.
        b: ``[splits, skills, r, out / splits]``.
    """
    down = torch.einsum("bqs,qsir->bqir", weights, a).flatten(1, 2)  # the splits of the input one after another
    return down, poly_up(weights, b)


def poly_up(weights: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The second of :func:`poly_matrices`."""
    return torch.einsum("bqs,qsrd->brqd", weights, b).flatten(-2)  # the splits of the output one after another


class Poly(Sample):
    """y' = y + B A x / r with A = sum_s w_s A_s and B = sum_s w_s B_s for each split, w by the sample's task.

    A is ``[splits, skills, in * kernel / splits, r]``, B ``[splits, skills, r, out / splits]``.
    """

    poly_router = part(nn.ModuleDict)
    poly_lora_A, poly_lora_B = part(), part()
    r, n_tasks, n_skills, n_splits = setting(), setting(), setting(), setting()
    random_in_training = True
    because = "its update depends on the task of the sample"

    def create(self, config: PolyConfig, key: str) -> None:
        (rows, columns), splits, skills, r = fan(self.shape), config.n_splits, config.n_skills, config.r
        if rows % splits or columns % splits:
            raise ValueError(
                f"n_splits={splits} does not divide the {columns} input and {rows} output features of "
                f"{key or 'layer'}; choose a divisor of both, or leave the layer out of the targets."
            )
        a = torch.empty(skills, splits, r, columns // splits)
        b = torch.zeros(splits, skills, r, rows // splits)
        # One by one: more dimensions would be read as a kernel's.
        for matrix in (*a.flatten(0, 1), *(() if config.init_weights else b.flatten(0, 1))):
            draw_like_linear(matrix)
        # A is held as [splits, skills, in / splits, r]
        self.poly_lora_A, self.poly_lora_B = nn.Parameter(a.permute(1, 0, 3, 2).contiguous()), nn.Parameter(b)
        self.poly_router = PolyRouter(config.n_tasks, splits, skills)
        self.r, self.n_tasks, self.n_skills, self.n_splits = r, config.n_tasks, skills, splits

    def update(self, x: torch.Tensor) -> torch.Tensor:
        router, a, b = self.poly_router, self.poly_lora_A, self.poly_lora_B
        router.train(self.training)
        weights = router(self.context.tasks_of(self.n_tasks, len(x), x.device))
        if self.kind.lookup or len(self.shape) > 2:
            return self.each_up(self.mixed_after(x, a, weights), poly_up(weights, b) / self.r)
        down, up = poly_matrices(weights, a, b)
        with reading(x):
            h = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1]) @ down  # [batch, positions, r]
        return self.each_up(h.view(*x.shape[:-1], h.shape[-1]), up / self.r)

    def mixed_after(self, x: torch.Tensor, a: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """A x with the A of each sample where x is no matrix: every skill's A x, mixed afterwards."""
        splits, skills, inner, r = a.shape
        full = a.new_zeros(splits, skills, r, splits, inner)
        for split in range(splits):
            full[split, :, :, split] = a[split].mT
        h = self.kind.channels_last(self.down(x, full.view(-1, splits * inner)))
        pieces = h.unflatten(-1, (-1, splits, skills, r)).flatten(1, -4)  # [batch, positions, splits, skills, r]
        mixed = torch.einsum("bpqsr,bqs->bpr", pieces, weights)
        return self.kind.channels_back(mixed.reshape(*h.shape[:-1], h.shape[-1] // (splits * skills)))


class PolyTuner(PolyCompat, BaseTuner):
    """Applies Poly: a call says the task of each row."""


PolyModel = define_tuner(Poly, PolyConfig, base=PolyTuner)
