"""MTL-LoRA: W x + s (sum_j p_j B_j) D_t A x with D_t and p = softmax(w_t / tau) of the task (arXiv 2410.09437).

A and the B_j are those of all tasks. The paper writes Lambda_t for D_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.families import Sample
from peft.core.filling import draw_like_linear
from peft.core.model.registry import define_tuner


@dataclass
class MtlLoraConfig(TargetModules, ExcludeModules, ModulesToSave, LayerSelection):
    """Config of MTL-LoRA: one LoRA for several tasks that keeps apart what differs between them.

    For training on some known tasks at once, where a plain LoRA of all would blur them. A call says the task of each
    sample: ``model(..., task_ids=tensor)``. It cannot be merged.
    """

    METHOD: ClassVar[str] = "MTL_LORA"

    r: int = option(8, "Rank of A and of each B_j.", minimum=1)
    alpha: float = option(8, "The update is scaled by alpha / r.", stuck=0)
    dropout: float = option(0.0, "Dropout on the input of the update.", minimum=0, below=1)
    n_tasks: int = option(1, "Number of tasks; with one, task_ids can be left out.", minimum=1)
    n_up_projection: int = option(1, "Number of the B_j.", minimum=1)
    task_specific_matrix_type: str = option(
        "singular_values",
        "What D_t is: 'singular_values' a diagonal, 'linear' a full matrix [r, r]; the identity at its start.",
        choices=("singular_values", "linear"),
    )
    weights_sharpness: float = option(
        0.05, "tau: the smaller, the more a task keeps to the B_j with its largest weight.", above=0
    )
    init_weights: bool = option(True, "Start with B_j = 0, so that nothing changes; otherwise they are random.")


def task_matrices(w: torch.Tensor, b: torch.Tensor, d: torch.Tensor, sharpness: float) -> torch.Tensor:
    """(sum_j p_j B_j) D_t of each task, transposed: ``[tasks, r, out]``.

    Args:
        w: the weights before the softmax, ``[tasks, n]``. b: the B_j ``[n, out, r]``. d: the D_t, ``[tasks, r, r]`` or
            their diagonals ``[tasks, r]``. sharpness: tau.
    """
    mixed = torch.einsum("tn,nor->tro", (w / sharpness).softmax(-1), b)
    return d.unsqueeze(-1) * mixed if d.dim() == 2 else d.mT @ mixed


class MtlLora(Sample):
    """y' = y + s (sum_j p_j B_j) D_t A drop(x). A is ``[r, in * kernel]``, B ``[n, out, r]``."""

    mtl_lora_A, mtl_lora_B, mtl_lora_D, mtl_lora_weights = part(), part(), part(), part()
    n_tasks, scaling, sharpness, mtl_lora_dropout = setting(), setting(), setting(), input_dropout()
    because = "its update depends on the task of the sample"

    def create(self, config: MtlLoraConfig, key: str) -> None:
        (rows, columns), r, tasks = fan(self.shape), config.r, config.n_tasks
        a, b = torch.empty(r, columns), torch.zeros(config.n_up_projection, rows, r)
        for matrix in (a, *(() if config.init_weights else b)):
            draw_like_linear(matrix)
        d = torch.eye(r).repeat(tasks, 1, 1) if config.task_specific_matrix_type == "linear" else torch.ones(tasks, r)
        self.mtl_lora_A, self.mtl_lora_B, self.mtl_lora_D = nn.Parameter(a), nn.Parameter(b), nn.Parameter(d)
        self.mtl_lora_weights = nn.Parameter(torch.ones(tasks, config.n_up_projection))
        self.n_tasks, self.scaling, self.sharpness = tasks, config.alpha / r, config.weights_sharpness
        self.mtl_lora_dropout = config.dropout

    def update(self, x: torch.Tensor) -> torch.Tensor:
        tasks = self.context.tasks_of(self.n_tasks, len(x), x.device)
        each = task_matrices(self.mtl_lora_weights, self.mtl_lora_B, self.mtl_lora_D, self.sharpness) * self.scaling
        dropped = self.dropped(x)
        return self.each_up(self.down(dropped, self.mtl_lora_A), each[tasks])


MtlLoraModel = define_tuner(MtlLora, MtlLoraConfig)
