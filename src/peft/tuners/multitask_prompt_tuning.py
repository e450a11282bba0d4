"""Multitask prompt tuning: [P * (u_t v_t); E(x)], a prompt times a low-rank factor of task t (arXiv 2303.02861)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import option
from peft.core.files.io import read_tensors
from peft.core.prompts import define_prompt
from peft.errors import ConfigError, some
from peft.peft_types import PeftType
from peft.tuners.prompt_tuning import PromptEmbedding, PromptTuningConfig


class MultitaskPromptTuningInit(str, enum.Enum):
    """How a prompt starts: as a text, at random, or from what was trained on other tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


FROM_SOURCE = tuple(MultitaskPromptTuningInit)[2:]


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Config of multitask prompt tuning.

    For a prompt that is learned from many tasks and moved to a new one: train with several ``task_ids``, then
    start from that file (``prompt_tuning_init``) for the target task.
    """

    METHOD: ClassVar[PeftType] = PeftType.MULTITASK_PROMPT_TUNING
    STARTS: ClassVar[Any] = MultitaskPromptTuningInit

    prompt_tuning_init: Any = option(
        MultitaskPromptTuningInit.RANDOM,
        "How the prompt starts: 'TEXT', 'RANDOM', or from a prompt trained on other tasks: 'AVERAGE_SOURCE_TASKS', "
        "'EXACT_SOURCE_TASK', 'ONLY_SOURCE_SHARED'.",
    )
    prompt_tuning_init_state_dict_path: str | None = option(
        None,
        "File of the prompt that was trained on other tasks (adapter_model.safetensors or .bin).",
        needs=("prompt_tuning_init", FROM_SOURCE),
    )
    prompt_tuning_init_task: int | None = option(
        0,
        "The task to start from.",
        minimum=0,
        needs=("prompt_tuning_init", MultitaskPromptTuningInit.EXACT_SOURCE_TASK),
    )
    num_ranks: int | None = option(1, "Rank of each task's own factor.", minimum=1)
    num_tasks: int | None = option(1, "How many tasks there are.", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init in FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                f"MultitaskPromptTuningConfig: prompt_tuning_init={self.prompt_tuning_init.value!r} needs "
                "prompt_tuning_init_state_dict_path, the file of the prompt to start from."
            )


class MultitaskPromptEmbedding(PromptEmbedding):
    """P ``[stacks * tokens, width]``, u ``[tasks, stacks * tokens, ranks]`` and v ``[tasks, ranks, width]``."""

    uses_tasks: ClassVar[bool] = True
    in_decoder: ClassVar[bool] = True

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__(config, word_embeddings)
        tasks, ranks = config.num_tasks, config.num_ranks
        self.num_tasks = tasks
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, self.count(config), ranks).normal_(0, 0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, ranks, config.token_dim).normal_(0, 0.02))
        if config.prompt_tuning_init in FROM_SOURCE and not config.inference_mode:
            self._start_from(config)

    @torch.no_grad()
    def _start_from(self, config: MultitaskPromptTuningConfig) -> None:
        """P of the source prompt; for each new task u and v of one of its tasks, of their mean, or fresh ones."""
        path, start = str(config.prompt_tuning_init_state_dict_path), config.prompt_tuning_init
        state = read_tensors(path)
        cols, rows = (state.get(f"prefix_task_{name}") for name in ("cols", "rows"))
        shared = next((value for key, value in state.items() if "prompt_embeddings" in key), None)
        if shared is None or cols is None or rows is None:
            raise ConfigError(f"{path} is no prompt trained on several tasks; it holds {some(state)}.")
        self._fill(self.embedding.weight, shared, path)
        if start == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            return
        task = config.prompt_tuning_init_task or 0
        if start == MultitaskPromptTuningInit.EXACT_SOURCE_TASK and task >= len(cols):
            raise ConfigError(f"prompt_tuning_init_task={task}, but {path} has {len(cols)} tasks, counted from 0.")
        average = start == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS
        for p, value in ((self.prefix_task_cols, cols), (self.prefix_task_rows, rows)):
            one = value.mean(0) if average else value[task]
            self._fill(p, one.expand(self.num_tasks, *one.shape), path)

    @staticmethod
    def _fill(p: nn.Parameter, value: torch.Tensor, path: str) -> None:
        if p.shape != value.shape:
            raise ConfigError(f"{path} gives a tensor {list(value.shape)}, but the config asks for {list(p.shape)}.")
        p.copy_(value)

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        if task_ids is None:
            raise ValueError("this prompt differs by task: pass task_ids, one task number for each sample.")
        if bool(((task_ids < 0) | (task_ids >= self.num_tasks)).any()):
            raise ValueError(f"task_ids should be in [0, {self.num_tasks}), got {task_ids.tolist()}.")
        task_ids = task_ids.to(indices.device)
        return self.embedding(indices) * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])


define_prompt(MultitaskPromptEmbedding, MultitaskPromptTuningConfig, prefix="multitask_prompt_tuning_")
