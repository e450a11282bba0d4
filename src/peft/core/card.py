"""The model card (README.md) of saved adapters."""

from __future__ import annotations

import os
from typing import Any

from peft._version import __version__


PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}

BODY = """
# Model Card for Model ID

An adapter for {base}, trained with the PEFT library.

## Use

```python
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("path/to/this/folder")
```

## Training

Method: {methods}.

### Framework versions

- PEFT {version}
"""


def create_or_update_model_card(model: Any, output_dir: str | os.PathLike) -> None:
    """Write README.md into a folder, or bring the one that is there up to date.

    The metadata says which library, method and base model the adapter belongs to; text and metadata that a user has
    written stay.

    Args:
        model: a PeftModel.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = os.path.join(output_dir, "README.md")
    configs = list(model.peft_config.values())
    methods = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs})
    base = next((config.base_model_name_or_path for config in configs if config.base_model_name_or_path), None)
    if os.path.exists(path):
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        text = BODY.format(base=base or "a base model", methods=", ".join(methods), version=__version__)
        card = ModelCard.from_template(ModelCardData(), template_str=text)
    data = card.data
    data.library_name = "peft"
    if base and not os.path.isdir(base):
        data.base_model = data.get("base_model") or base
    task = next((config.task_type for config in configs if config.task_type), None)
    pipeline = PIPELINES.get(str(getattr(task, "value", task)))
    if pipeline and not data.get("pipeline_tag"):
        data.pipeline_tag = pipeline
    tags = list(data.get("tags") or [])
    new = [f"base_model:adapter:{base}"] if base else []
    new += [method.lower() for method in methods]
    if hasattr(model.get_base_model(), "config"):
        new.append("transformers")
    data.tags = tags + [tag for tag in new if tag not in tags]
    card.text = _with_version(card.text)
    card.save(path)


def _with_version(text: str) -> str:
    """The text, with our version under "Framework versions"."""
    line = f"- PEFT {__version__}"
    if line in text:
        return text
    lines = text.rstrip("\n").split("\n")
    old = [i for i, entry in enumerate(lines) if entry.startswith("- PEFT ")]
    if old:
        lines[old[-1]] = line
    elif "### Framework versions" in lines:
        lines.insert(lines.index("### Framework versions") + 1, f"\n{line}")
    else:
        lines += ["", "### Framework versions", "", line]
    return "\n".join(lines) + "\n"
