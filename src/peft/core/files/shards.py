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
        places: name -> file, in the order of the files.

    Raises:
        MissingFileError: if there is no such file, or a shard that the index names is missing.
    """

    def __init__(self, source: str | os.PathLike) -> None:
        folder = Path(source)
        files = _files(folder)
        if not files or not all(file.is_file() for file in files):
            lacks = next((file.name for file in files if not file.is_file()), None)
            raise MissingFileError(
                f"{source} has no safetensors files: give a folder with a model's weights, or a file."
                if lacks is None or not folder.is_dir()
                else f"{folder} lacks {lacks}, which its index names: fetch the model again."
            )
        self.places: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                self.places.update(dict.fromkeys(tensors.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.places[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def entries(self) -> dict[str, Entry]:
        """What the tensors are, by name; none is read."""
        found = {}
        for path in dict.fromkeys(self.places.values()):
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no dict)
                    part = tensors.get_slice(name)
                    found[name] = Entry(os.fspath(path), part.get_dtype(), tuple(part.get_shape()))
        return found


def has_weights(folder: str | os.PathLike) -> bool:
    """Whether a folder has a model's safetensors files under the names that transformers gives them."""
    return any(Path(folder, name).is_file() for name in (SINGLE, INDEX))


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    index = next(iter(sorted(source.glob("*.safetensors.index.json"))), None)
    if index is not None:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [source / name for name in sorted(set(names))]
    single = source / SINGLE
    return [single] if single.is_file() else sorted(source.glob("*.safetensors"))
