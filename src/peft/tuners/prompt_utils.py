"""How prompts start: at random numbers, as embeddings of random tokens, or as those of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import PromptLearningConfig, option
from peft.core.base.storage import device_of
from peft.core.prompts import VirtualTokens
from peft.errors import ConfigError
from peft.options import value_of


def choice(config: Any, field: str, kind: Any) -> Any:
    """The member of ``kind`` that a field of a config names.

    Raises:
        ValueError: if it names none; the message lists them.
    """
    value, known = getattr(config, field), [member.value for member in kind]
    if value_of(value) not in known:
        name = type(config).__name__
        raise ConfigError(f"{name}: {field}={value!r} is not valid; it can be {', '.join(map(str, known))}.")
    return kind(value)


@dataclass
class PromptStart(PromptLearningConfig):
    """Fields of methods whose virtual tokens can start as a text. ``STARTS`` are the ways to start."""

    STARTS: ClassVar[Any]

    prompt_tuning_init: Any = option(
        "RANDOM",
        "How the prompt starts: 'TEXT', the embeddings of prompt_tuning_init_text; 'SAMPLE_VOCAB', those of random "
        "tokens; 'RANDOM', normal random numbers.",
    )
    prompt_tuning_init_text: str | None = option(
        None,
        "The text that a prompt starts as, cut or repeated to its length; for 'TEXT'.",
        needs=("prompt_tuning_init", "TEXT"),
    )
    tokenizer_name_or_path: str | None = option(
        None, "The tokenizer of that text; for 'TEXT'.", needs=("prompt_tuning_init", "TEXT")
    )
    tokenizer_kwargs: dict | None = option(None, "Options of the tokenizer's from_pretrained; for 'TEXT'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = choice(self, "prompt_tuning_init", self.STARTS)
        if self.prompt_tuning_init == "TEXT":
            for field in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, field):
                    raise ConfigError(f"{type(self).__name__}: prompt_tuning_init='TEXT' needs {field}.")
        elif self.tokenizer_kwargs:
            raise ConfigError(f"{type(self).__name__}: tokenizer_kwargs is for prompt_tuning_init='TEXT' only.")


class StartedPrompt(VirtualTokens):
    """A table of virtual tokens ``[stacks * tokens, width]``, filled as the config's start says."""

    def __init__(self, config: PromptStart, word_embeddings: nn.Module) -> None:
        super().__init__()
        count = self.count(config)
        self.embedding = nn.Embedding(count, config.token_dim)
        if config.inference_mode:  # the file brings the rows
            return
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, word_embeddings.weight.shape[0], (count,))
        elif config.prompt_tuning_init == "TEXT":
            ids = tokens_of(str(config.prompt_tuning_init_text), count, config)
        else:
            return
        self.embedding.weight = nn.Parameter(rows_of(word_embeddings, ids))


def rows_of(word_embeddings: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of token ids ``[n]`` as the model reads them, ``[n, width]`` in float32."""
    if ids.is_meta:  # a skeleton, whose rows a file brings
        return torch.empty(len(ids), word_embeddings.weight.shape[1], device="meta")
    with torch.no_grad():
        return word_embeddings(ids.to(device_of(word_embeddings))).detach().float().clone()


def tokens_of(text: str, count: int, config: Any) -> torch.Tensor:
    """The ids of a text, cut or repeated to ``count``, ``[count]``.

    Raises:
        ValueError: if the text has no tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ConfigError(f"the text {text!r}, which a prompt should start as, has no tokens.")
    return torch.tensor((ids * -(-count // len(ids)))[:count])
