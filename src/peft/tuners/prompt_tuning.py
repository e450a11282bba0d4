"""Prompt tuning: the model reads [P; E(x)] with trained rows P (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.core.prompts import define_prompt
from peft.peft_types import PeftType
from peft.tuners.prompt_utils import PromptStart, StartedPrompt


class PromptTuningInit(str, enum.Enum):
    """How a prompt starts: as the embeddings of a text, of random tokens of the vocabulary, or at random numbers."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptStart):
    """Config of prompt tuning.

    For very large models and many tasks: an adapter is a few rows, and a batch may mix them. It needs a large
    learning rate, 1e-2 to 0.3, and many steps; start from a text (TEXT) where the task can be told in words.
    """

    METHOD: ClassVar[PeftType] = PeftType.PROMPT_TUNING
    STARTS: ClassVar[Any] = PromptTuningInit


class PromptEmbedding(StartedPrompt):
    """The rows P, ``[stacks * tokens, width]``."""


define_prompt(PromptEmbedding, PromptTuningConfig, prefix="prompt_tuning_")
