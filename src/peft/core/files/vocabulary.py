"""Whether the vocabulary of a model was resized since it was loaded: its new rows are nowhere but in the model."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

from torch import nn


def is_resized(root: nn.Module, config: Any) -> bool:
    """Whether the model's vocabulary has another size than in the config of the base that an adapter's config names.

    Nothing is downloaded: the base's config is that in its folder, or in the local cache of the hub. A warning says so
    where the sizes differ.
    """
    now, name = _size(getattr(root, "config", None)), getattr(config, "base_model_name_or_path", None)
    name = name or root.__dict__.get("name_or_path")
    before = _size(_config_of(name, getattr(config, "revision", None))) if now and name else None
    if before is None or before == now:
        return False
    warnings.warn(
        f"the vocabulary has {now} tokens, and {before} in the config of {name!r}: the embedding layers are saved "
        "with the adapter. save_embedding_layers=False leaves them out."
    )
    return True


def _size(config: Any) -> int | None:
    """The size of the vocabulary in a config, an object or a dict; in that of the text model if it has several."""
    for part in (config, _get(config, "text_config")):
        if isinstance(size := _get(part, "vocab_size"), int):
            return size
    return None


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _config_of(name: str, revision: str | None) -> Any:
    path: Any = os.path.join(name, "config.json")
    if not os.path.isdir(name):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(name, "config.json", revision=revision)
        except HFValidationError:
            return None
    if not isinstance(path, str) or not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None
