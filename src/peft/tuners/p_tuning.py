"""P-tuning: [P; E(x)] where P = MLP(E_p), or MLP(LSTM(E_p)), of a table E_p (Liu et al. 2021, arXiv 2103.10385)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import PromptLearningConfig, option
from peft.core.prompts import VirtualTokens, define_prompt
from peft.peft_types import PeftType
from peft.tuners.prompt_utils import choice


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that makes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


LSTM = ("encoder_reparameterization_type", PromptEncoderReparameterizationType.LSTM)


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Config of P-tuning.

    For understanding tasks with small models, where a prompt that is trained directly is unstable: a network
    makes it, and after training only its output is needed.
    """

    METHOD: ClassVar[PeftType] = PeftType.P_TUNING

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = option(
        PromptEncoderReparameterizationType.MLP,
        "The network that makes the prompt: 'MLP', of three layers, or 'LSTM', in both directions, with two layers "
        "after it.",
    )
    encoder_hidden_size: int = option(None, "Width of that network; by default the embedding's.", minimum=1)
    encoder_num_layers: int = option(2, "Layers of the LSTM; an MLP always has three.", minimum=1, needs=LSTM)
    encoder_dropout: float = option(0.0, "Dropout between the layers of the LSTM.", minimum=0, below=1, needs=LSTM)

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = choice(self, "encoder_reparameterization_type", PromptEncoderReparameterizationType)
        self.encoder_reparameterization_type = kind


class PromptEncoder(VirtualTokens):
    """The table ``[stacks * tokens, width]`` and its network; where only the result was saved, that is the table."""

    network: ClassVar[tuple[str, ...]] = ("mlp_head", "lstm_head")

    def __init__(self, config: PromptEncoderConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
        self.embedding = nn.Embedding(self.count(config), width)
        if config.inference_mode:  # its file holds what the network gave, not the network
            return
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(
                width, hidden, num_layers=layers, dropout=dropout, bidirectional=True, batch_first=True
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
            return
        self.mlp_head = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    @classmethod
    def prepare_config(cls, config: PromptEncoderConfig) -> None:
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        rows = self.embedding(indices)
        if hasattr(self, "lstm_head"):
            rows = self.lstm_head(rows)[0]
        return self.mlp_head(rows) if self.has_network else rows


define_prompt(PromptEncoder, PromptEncoderConfig, prefix="p_tuning_")
