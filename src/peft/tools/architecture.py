"""The class that a config of transformers names, and a model of it without the weights of any file."""

from __future__ import annotations

from typing import Any

from torch import nn


AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task -> the class of transformers that loads a model for it."""


def class_of(config: Any, name: str | None = None) -> Any:
    """The class called ``name`` in transformers; by default the first architecture of the config, else AutoModel."""
    import transformers

    return getattr(transformers, name or (config.architectures or ["AutoModel"])[0], transformers.AutoModel)


def build(config: Any, name: str | None = None, **options: Any) -> nn.Module:
    """A model of that class, with initial values, on the device that is the default at the time."""
    cls = class_of(config, name)
    return (cls.from_config if hasattr(cls, "from_config") else cls._from_config)(config, **options)
