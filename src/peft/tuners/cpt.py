"""Context-aware prompt tuning: [E_ctx + D; E(x)] with |D_t| <= eps_t, labels of the context in the loss (2410.17222).

Tokens have types: 1, 2, 3, 4 for the template before an input, the input, the template before a label, and the label;
5 to 8 for those of the next example, and so on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import PromptLearningConfig, option
from peft.core.prompts import ENCODER, VirtualTokens, check_shape, define_prompt, put, weighted_cross_entropy
from peft.errors import ConfigError
from peft.peft_types import PeftType
from peft.tuners.prompt_utils import rows_of


INPUT, LABEL, KINDS = 2, 0, 4  # types modulo 4; the others are templates
FIXED = 1e-10  # the bound of tokens that stay as they are


@dataclass
class CPTConfig(PromptLearningConfig):
    """Config of context-aware prompt tuning.

    For few-shot classification with a decoder: the examples in the prompt are themselves refined, within bounds
    that keep it from overfitting. ``num_virtual_tokens`` is the number of ``cpt_token_ids``.
    """

    METHOD: ClassVar[PeftType] = PeftType.CPT

    cpt_token_ids: list[int] | None = option(
        None, "Token ids of the context: examples with their labels. By default it is the token 0 alone."
    )
    cpt_mask: list[int] | None = option(None, "1 for tokens of the context that are seen, 0 for padding; default: 1.")
    cpt_tokens_type_mask: list[int] | None = option(
        None,
        "Types of those tokens: 1 template before an input, 2 input, 3 template before a label, 4 label, and 4 more "
        "for each further example. By default all are templates.",
    )
    opt_weighted_loss_type: str | None = option(
        "none",
        "'decay': labels count the less, the further they are from the end; 'none': all count the same.",
        choices=("none", "decay", None),
    )
    opt_loss_decay_factor: float | None = option(
        1.0, "What a label counts less for each later label.", minimum=0, needs=("opt_weighted_loss_type", "decay")
    )
    opt_projection_epsilon: float | None = option(
        0.1,
        "How far input tokens may move, for an embedding of width 2048; it grows with the root of the width.",
        minimum=0,
    )
    opt_projection_format_epsilon: float | None = option(0.1, "The same for tokens of templates.", minimum=0)
    tokenizer_name_or_path: str | None = option(None, "The context's tokenizer, for readers of the config.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(f"CPTConfig only supports task_type='CAUSAL_LM', got {self.task_type!r}.")
        self.task_type = self.task_type or "CAUSAL_LM"
        if not self.cpt_token_ids:
            warnings.warn("CPTConfig has no cpt_token_ids, so its context is one token of id 0 that is refined.")
            self.cpt_token_ids = [0]
        count = len(self.cpt_token_ids)
        for field in ("cpt_mask", "cpt_tokens_type_mask"):
            given = getattr(self, field) or [1] * count
            setattr(self, field, given)
            if len(given) != count:
                raise ConfigError(
                    f"CPTConfig: {field} has {len(given)} entries, cpt_token_ids {count}: cpt_token_ids, "
                    "cpt_mask and cpt_tokens_type_mask must have the same length."
                )
        for field, meant in (("num_virtual_tokens", count), ("num_transformer_submodules", 1)):
            if getattr(self, field) not in (None, meant):
                self._tell_vain(field, f"it is {meant}, as cpt_token_ids and a decoder have it.")
            setattr(self, field, meant)


class CPTEmbedding(VirtualTokens):
    """The context's embeddings, frozen, and how far they have moved: both ``[tokens, width]``."""

    frozen: ClassVar[tuple[str, ...]] = ("embedding",)
    inputs: ClassVar[tuple[str, ...]] = ("input_type_mask",)

    def __init__(self, config: CPTConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        self.config = config
        ids, mask, types = (
            torch.tensor(given, device="cpu")
            for given in (config.cpt_token_ids, config.cpt_mask, config.cpt_tokens_type_mask)
        )
        context = rows_of(word_embeddings, ids)
        self.embedding = nn.Embedding.from_pretrained(context, freeze=True)
        self.delta_embedding = nn.Embedding(*context.shape)
        nn.init.zeros_(self.delta_embedding.weight)
        self.types = types
        self.attended = None if bool(mask.all()) else mask
        self.own_labels = torch.where(is_label(types), ids, -100)

    def get_epsilon(self) -> torch.Tensor:
        """How far each token may move, ``[tokens]``."""
        scale = math.sqrt(self.embedding.embedding_dim / 2048)
        inputs, templates = (
            torch.full_like(self.types, max((bound or 0.0) * scale, FIXED), dtype=torch.float32)
            for bound in (self.config.opt_projection_epsilon, self.config.opt_projection_format_epsilon)
        )
        bounds = torch.where(self.types % KINDS == INPUT, inputs, templates)
        return torch.where(self._moves, bounds, FIXED)

    @property
    def _moves(self) -> torch.Tensor:
        return (self.types > 0) & ~is_label(self.types)

    def set_updated_tokens(self) -> None:
        """Let no gradient reach the moves of labels, whatever it comes from; the model's loss gives them none."""
        self.delta_embedding.weight.register_hook(lambda grad: grad * self._moves.to(grad)[:, None])

    def get_projection(self) -> torch.Tensor:
        """The moves, cut to their bounds, ``[tokens, width]``; those of labels get no gradient."""
        delta = self.delta_embedding.weight
        bounds, moves = self.get_epsilon().to(delta)[:, None], self._moves.to(delta.device)[:, None]
        norm = delta.detach().norm(dim=1, keepdim=True).clamp(min=FIXED)
        projected = delta * (bounds / norm).clamp(max=1)
        return torch.where(moves, projected, projected.detach())  # tokens that stay get no gradient

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.embedding(indices) + self.get_projection()[indices]

    def saved(self) -> torch.Tensor:
        if self.delta_embedding.weight.is_meta:  # before a file brings the moves
            return torch.empty_like(self.embedding.weight, device="meta")
        return (self.embedding.weight + self.get_projection()).detach()

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        context = self.embedding.weight
        check_shape(prompt_embeddings, context)
        put(self.delta_embedding, "weight", prompt_embeddings.to(context) - context)

    def adapter_state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        yield "prompt_embeddings", "", self.saved()
        yield f"{ENCODER}delta_embedding.weight", "delta_embedding.weight", self.delta_embedding.weight

    def select_labels(self, labels: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return torch.where(is_label(types.to(labels.device)), labels, -100)

    def label_weights(self, types: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
        if self.config.opt_weighted_loss_type != "decay":
            return None
        text = torch.full((batch, length), KINDS) if types is None else types.cpu()
        text = torch.where(text > 0, text + self.types.max(), text)
        return decayed(torch.cat([self.types.expand(batch, -1), text], 1), self.config.opt_loss_decay_factor or 0.0)

    @staticmethod
    def calculate_loss(
        base_model_output: Any, labels: torch.Tensor, cpt_type_mask: torch.Tensor, config: CPTConfig
    ) -> Any:
        """The output with the loss of its logits ``[batch, length, vocabulary]``.

        Args:
            labels: ``[batch, length]``, -100 for tokens that are not predicted.
            cpt_type_mask: the types of all tokens, ``[batch, length]``.
            config: a :class:`CPTConfig`.
        """
        factor = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
        weights = decayed(cpt_type_mask.cpu(), factor or 0.0)
        base_model_output.loss = weighted_cross_entropy(base_model_output.logits, labels, weights)
        return base_model_output


def is_label(types: torch.Tensor) -> torch.Tensor:
    """Which tokens are labels."""
    return (types > 0) & (types % KINDS == LABEL)


def decayed(types: torch.Tensor, factor: float) -> torch.Tensor:
    """factor ** (number of labels after this one) for tokens of labels, 1 for others, ``[batch, length]``."""
    weights = torch.ones(types.shape)
    for row, kinds in enumerate(types):
        for after, kind in enumerate(reversed(kinds[is_label(kinds)].unique().tolist())):
            weights[row][kinds == kind] = factor**after
    return weights


define_prompt(CPTEmbedding, CPTConfig, prefix="cpt_")
