"""The tensors of a whole model's safetensors files, one file or shards and their index, one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from peft.core.files.io import named_by_index
from peft.errors import MissingFileError


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
    files = [source / name for name in named_by_index(index)]
    if lacks := [file.name for file in files if not file.is_file()]:
        raise MissingFileError(f"{source} lacks {lacks[0]}, which its {index.name} names: fetch the model again.")
    return files


# --- writing ------------------------------------------------------------------------------------------------------

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def dtype_of(entry: Entry, wanted: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a tensor; if it is a floating one, the one that is wanted instead.

    Raises:
        ValueError: torch has no such dtype.
    """
    own = _DTYPES.get(entry.dtype)
    if own is None:
        raise ValueError(f"{entry.file} holds tensors of the dtype {entry.dtype}, which is not known here.")
    return wanted if wanted is not None and own.is_floating_point else own


class ShardWriter:
    """A safetensors file whose tensors are written one by one, in the order of ``plan``: name -> (dtype, shape).

    The format is an 8-byte length, a header of JSON, and the bytes of the tensors.
    """

    def __init__(self, file: str, plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.plan, header, end = dict(plan), {}, 0
        for name, (dtype, shape) in plan.items():
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of 8
        self.file = open(file, "wb")  # noqa: SIM115  (closed by __exit__)
        self.file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write the next tensor; returns its bytes.

        Raises:
            ValueError: it is not of the shape that was announced.
        """
        dtype, shape = self.plan[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} when merged, and {shape} in the base's files.")
        # as bytes: numpy has no bfloat16
        flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8)
        self.file.write(memoryview(flat.numpy()))
        return flat.numel()
