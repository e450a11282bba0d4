"""The config of prefix tuning (Li and Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft.config import PromptLearningConfig, option
from peft.utils.peft_types import PeftType


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Config of prefix tuning: trained keys and values before those of the text, in every attention layer."""

    METHOD: ClassVar[PeftType] = PeftType.PREFIX_TUNING

    init_weights: str | None = option(
        None, "How the prefix starts: at random numbers (None) or at 'zero'.", choices=(None, "zero")
    )
    encoder_hidden_size: int = option(None, "Width of the network that makes the prefix.", minimum=1)
    prefix_projection: bool = option(
        False, "Make the prefix by a network from token embeddings, instead of training it directly."
    )
