"""This library's own format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import os

from peft.config import PeftConfig
from peft.convert.held import Held
from peft.convert.source import Bundle, Files, Format, Job, Source
from peft.core.files.io import SAFETENSORS_WEIGHTS_NAME, write_adapter


def _matches(source: Source) -> bool:
    return "peft_type" in source.config


def _read(source: Source, job: Job) -> Bundle:
    config = PeftConfig.from_pretrained(os.fspath(source.path.parent))
    return {"": Held(config, source.tensors)}


def _write(bundle: Bundle, job: Job) -> Files:
    """One folder, or one for each component."""
    files: Files = {}
    for component, held in bundle.items():
        name = os.path.join(component, SAFETENSORS_WEIGHTS_NAME) if len(bundle) > 1 else SAFETENSORS_WEIGHTS_NAME
        files[name] = _writer(held)
    return files


def _writer(held: Held):  # type: ignore[no-untyped-def]
    return lambda path: write_adapter(os.path.dirname(path), held.tensors, held.config)


PEFT = Format("peft", _matches, _read, _write)
