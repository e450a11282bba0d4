"""Trainable tokens: some rows of an embedding are trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from peft.config import PeftConfig, option
from peft.core.model.auxiliary import TrainableTokens
from peft.core.model.registry import define_tuner
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import embeddings_of, walk
from peft.errors import ConfigError
from peft.peft_types import PeftType


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Config of trainable tokens: the vectors of some tokens, in the embedding and in a head tied to it.

    For new special tokens, alone or beside another method (``trainable_token_indices``): megabytes less than a
    copy of the embedding in ``modules_to_save``.
    """

    METHOD: ClassVar[PeftType] = PeftType.TRAINABLE_TOKENS

    token_indices: list[int] = option(list, "Indices of the tokens to train.")
    target_modules: list[str] | str | None = option(
        None, "The embedding, by name or regex; by default the model's input embedding.", names=set
    )
    init_weights: bool = option(
        True, "Start at the present vectors, so that nothing changes; otherwise at random ones."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(type(i) is int and i >= 0 for i in self.token_indices):
            raise ConfigError(
                f"TrainableTokensConfig: token_indices must be token indices, got {self.token_indices!r}."
            )


class TokenVectors(TrainableTokens):
    """Rows of the table are replaced by trained ones, ``trainable_tokens_delta`` ``[n, dim]``."""


class TokensTuner(BaseTuner):
    """Applies trainable tokens, by default to the input embedding."""

    def prepare_config(self, config: Any, model: nn.Module, keys: set[str] | None) -> None:
        embedding = embeddings_of(model)[0]
        if config.target_modules is None and keys is None and embedding is not None:
            config.target_modules = {site.key for site in walk(model) if site.module is embedding}
        super().prepare_config(config, model, keys)


TrainableTokensModel = define_tuner(TokenVectors, TrainableTokensConfig, base=TokensTuner)
