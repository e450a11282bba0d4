"""The model card: README.md beside a saved adapter, with the facts that the hub reads."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

from torch import nn

from peft._version import __version__
from peft.core.files.io import replacing
from peft.core.files.renaming import is_of_transformers
from peft.options import value_of


CARD_NAME = "README.md"
_BASE_TAG = "base_model:adapter:"
_VERSIONS = "### Framework versions"
_QUANTIZATION = "The following quantization config was used during training:"
_PIPELINES = {"CAUSAL_LM": "text-generation"}


def create_or_update_model_card(model: nn.Module, output_dir: str | os.PathLike) -> None:
    """Write README.md, or bring the facts in it up to date; a user's own text and fields are kept.

    A card that cannot be read stays as it is, with a warning. Nothing is downloaded.

    Args:
        model: a :class:`PeftModel`.
        output_dir: the folder; made if need be.
    """
    from huggingface_hub import ModelCard

    file = os.path.join(output_dir, CARD_NAME)
    if os.path.isfile(file):
        try:
            card = ModelCard.load(file, ignore_metadata_errors=True)
        except Exception as error:
            warnings.warn(f"{file} cannot be read as a model card ({error}); it is left as it is.")
            return
    else:
        card = ModelCard(_blank(), ignore_metadata_errors=True)
    for name, value in _facts(model, list(card.data.get("tags") or ())).items():
        card.data[name] = value
    card.text = _with_versions(_with_quantization(card.text, model))
    # Without `newline`, the line ends that a user's card has would be translated.
    with replacing(output_dir) as path, open(path(CARD_NAME), "w", encoding="utf-8", newline="") as out:
        out.write(str(card))


@functools.cache
def _blank() -> str:
    """An empty card; rendering its template takes longer than all else in a save."""
    from huggingface_hub import ModelCard, ModelCardData

    return str(ModelCard.from_template(ModelCardData()))


def _facts(model: Any, tags: list[str]) -> dict[str, Any]:
    """Fields of the card's head: name -> value."""
    base = model.get_base_model()
    configs = list(model.peft_config.values())
    known = hasattr(base, "config")  # a model of one's own is none that the hub could link to
    named = [name for config in configs if known and (name := config.base_model_name_or_path)]
    origin = next(iter(named), None) or vars(base).get("name_or_path") or None
    new = [_BASE_TAG + origin] if origin else []
    new += dict.fromkeys(c.method_name.lower() for c in configs)
    new += [tag for tag in getattr(base, "model_tags", None) or () if tag not in new]  # of trainers
    new += ["transformers"] if is_of_transformers(base) else []
    own = [tag for tag in tags if tag not in new and not (origin and tag.startswith(_BASE_TAG))]
    facts: dict[str, Any] = {"base_model": origin} if origin else {}
    facts["library_name"] = "peft"
    task = next((str(value_of(c.task_type)) for c in configs if c.task_type), None)
    if task in _PIPELINES:
        facts["pipeline_tag"] = _PIPELINES[task]
    facts["tags"] = [*own, *new]
    return facts


def _with_quantization(text: str, model: Any) -> str:
    """The card's text with how the base model is quantised, if it is; written once."""
    config = getattr(getattr(model.get_base_model(), "config", None), "quantization_config", None)
    if config is None or _QUANTIZATION in text:
        return text
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    lines = "\n".join(f"- {name}: {value}" for name, value in values.items())
    section = f"## Training procedure\n\n{_QUANTIZATION}\n{lines}\n"
    before, found, after = text.rpartition(_VERSIONS)
    return f"{before}{section}\n{found}{after}" if found else f"{text.rstrip()}\n\n{section}"


def _with_versions(text: str) -> str:
    """The card's text with this version in the section of versions, which is appended if there is none."""
    line = f"- PEFT {__version__}"
    before, found, after = text.rpartition(_VERSIONS)
    if not found:
        return f"{text.rstrip()}\n\n{_VERSIONS}\n\n{line}\n"
    lines = after.split("\n")
    end = next((i for i, other in enumerate(lines) if other.startswith("#")), len(lines))
    old = next((i for i in range(end) if lines[i].startswith("- PEFT ")), None)
    if old is not None:
        lines[old] = line
    else:
        first = next((i for i in range(1, end) if lines[i].strip()), end)
        lines[first:first] = [line]
    return before + found + "\n".join(lines)
