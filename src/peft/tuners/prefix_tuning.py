"""Prefix tuning: attention over [K_p; K(x)], [V_p; V(x)]; K_p, V_p are trained (Li, Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import PromptLearningConfig, option
from peft.core.prompts import VirtualTokens, define_prompt
from peft.peft_types import PeftType


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Config of prefix tuning: trained keys and values before those of the text, in every attention layer.

    For generation from one frozen model with a prefix for each task or user: stronger than a prompt, as each
    layer has vectors of its own. 10 to 200 tokens; a learning rate near 1e-2.
    """

    METHOD: ClassVar[PeftType] = PeftType.PREFIX_TUNING

    init_weights: str | None = option(
        None, "How the prefix starts: at random numbers (None) or at 'zero'.", choices=(None, "zero")
    )
    encoder_hidden_size: int = option(None, "Width of the network that makes the prefix.", minimum=1)
    prefix_projection: bool = option(
        False, "Make the prefix by a network from token embeddings, instead of training it directly."
    )
    use_gating: bool = option(
        False,
        "Multiply the prefix in each layer by a gate for each sample: the mean over its tokens of sigmoid(w h + b), h "
        "what the attention reads (UniPELT, arXiv 2110.07577).",
        own=True,
    )
    shared_gating: bool = option(True, "One gate for keys and values, not one for each.", own=True, needs="use_gating")

    def __post_init__(self) -> None:
        super().__post_init__()
        # Files have the model's width here, whether there is a network or not.
        if not self.prefix_projection and self.encoder_hidden_size not in (None, self.token_dim):
            self._tell_vain("encoder_hidden_size", "it counts only with prefix_projection.")


class PrefixEncoder(VirtualTokens):
    """The table ``[tokens, 2 layers width]``, or W2 tanh(W1 E + b1) + b2 of a table E ``[tokens, width]``."""

    as_prefix: ClassVar[bool] = True
    network: ClassVar[tuple[str, ...]] = ("transform",)

    def __init__(self, config: PrefixTuningConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        out = 2 * int(config.num_layers or 0) * config.token_dim
        # A file holds what the network gave, so that none is made for inference.
        self.prefix_projection = config.prefix_projection and not config.inference_mode
        self.gates_each = (1 if config.shared_gating else 2) if config.use_gating else 0
        if self.prefix_projection:
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
            self.transform = nn.Sequential(
                nn.Linear(config.token_dim, config.encoder_hidden_size),
                nn.Tanh(),
                nn.Linear(config.encoder_hidden_size, out),
            )
        else:
            self.embedding = nn.Embedding(config.num_virtual_tokens, out)
        if config.init_weights == "zero":
            last = self.transform[-1] if self.prefix_projection else self.embedding
            for p in last.parameters():
                nn.init.zeros_(p)

    @classmethod
    def prepare_config(cls, config: PrefixTuningConfig) -> None:
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        rows = self.embedding(indices)
        return self.transform(rows) if self.prefix_projection else rows


define_prompt(PrefixEncoder, PrefixTuningConfig, prefix="prefix_tuning_")
