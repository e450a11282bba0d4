"""The tensors of a whole model's safetensors files: one file, or shards and their index."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from peft.utils.error import MissingFileError


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """Where a tensor is and what it is: the file, the dtype as safetensors calls it, the shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """Tensors by name, each read when it is asked for.

    Args:
        source: a folder with ``model.safetensors``, with shards and their index, or with any safetensors files; or
            one file.

    Attributes:
        entries: what the tensors are and where, by name, in the order of the files.

    Raises:
        MissingFileError: if there is no such file, or a shard that the index names is missing.
    """

    def __init__(self, source: str | os.PathLike) -> None:
        files = _files(Path(source))
        if not files:
            raise MissingFileError(
                f"{source} has no safetensors files: give a folder with a model's weights, or a file."
            )
        self.entries: dict[str, Entry] = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no dict)
                    part = tensors.get_slice(name)
                    self.entries[name] = Entry(os.fspath(file), part.get_dtype(), tuple(part.get_shape()))

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.entries[name].file, "pt") as tensors:
            return tensors.get_tensor(name)


def has_weights(folder: str | os.PathLike) -> bool:
    """Whether a folder has a model's safetensors files under the names that transformers gives them."""
    return any(Path(folder, name).is_file() for name in (SINGLE, INDEX))


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source] if source.is_file() else []
    index = next(iter(sorted(source.glob("*.safetensors.index.json"))), None)
    if index is None:
        single = source / SINGLE
        return [single] if single.is_file() else sorted(source.glob("*.safetensors"))
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    files = [source / name for name in sorted(set(names))]
    if lacks := [file.name for file in files if not file.is_file()]:
        raise MissingFileError(f"{source} lacks {lacks[0]}, which its {index.name} names: fetch the model again.")
    return files
