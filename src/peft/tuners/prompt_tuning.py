"""Prompt tuning: the model reads [P; E(x)] with trained rows P (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import PromptLearningConfig, option
from peft.core.prompts import VirtualTokens, define_prompt, rows_of_text, rows_of_vocabulary
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


class PromptTuningInit(str, enum.Enum):
    """How a prompt starts: as the embeddings of a text, of random tokens of the vocabulary, or at random numbers."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Config of prompt tuning."""

    METHOD: ClassVar[PeftType] = PeftType.PROMPT_TUNING
    INITS: ClassVar[Any] = PromptTuningInit

    prompt_tuning_init: PromptTuningInit | str = option(
        PromptTuningInit.RANDOM,
        "How the prompt starts: 'TEXT', the embeddings of prompt_tuning_init_text; 'SAMPLE_VOCAB', those of random "
        "tokens; 'RANDOM', normal random numbers.",
    )
    prompt_tuning_init_text: str | None = option(
        None, "The text that a prompt starts as, cut or repeated to its length; for 'TEXT'."
    )
    tokenizer_name_or_path: str | None = option(None, "The tokenizer of that text; for 'TEXT'.")
    tokenizer_kwargs: dict | None = option(None, "Options of the tokenizer's from_pretrained; for 'TEXT'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        name, known = type(self).__name__, [member.value for member in self.INITS]
        if getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init) not in known:
            raise ConfigError(
                f"{name}: prompt_tuning_init={self.prompt_tuning_init!r} is not valid; it can be {', '.join(known)}."
            )
        self.prompt_tuning_init = self.INITS(self.prompt_tuning_init)
        if self.prompt_tuning_init == "TEXT":
            for field in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, field):
                    raise ConfigError(f"{name}: {field} can't be None when prompt_tuning_init is 'TEXT'; set it.")
        elif self.tokenizer_kwargs:
            raise ConfigError(f"{name}: tokenizer_kwargs is only valid when prompt_tuning_init is 'TEXT'.")


class PromptEmbedding(VirtualTokens):
    """The rows P, ``[stacks * tokens, width]``."""

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.count(config), config.token_dim)
        if config.inference_mode:
            return
        rows = initial_rows(config, word_embeddings, self.count(config))
        if rows is not None:
            self.embedding.weight = nn.Parameter(rows)


def initial_rows(config: Any, word_embeddings: nn.Module, count: int) -> torch.Tensor | None:
    """What the config starts from, ``[count, width]``; None for random numbers."""
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return rows_of_vocabulary(word_embeddings, count)
    if config.prompt_tuning_init == "TEXT":
        text, tokenizer = config.prompt_tuning_init_text, config.tokenizer_name_or_path
        return rows_of_text(word_embeddings, count, text, tokenizer, config.tokenizer_kwargs)
    return None


define_prompt(PromptEmbedding, PromptTuningConfig, prefix="prompt_tuning_")
