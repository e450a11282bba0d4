"""What the formats read and write: a file of another tool, a base model's names, and adapters by component."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from peft.config import read_json
from peft.convert.extract import skeleton
from peft.convert.held import Held
from peft.core.files.io import checked_tensors, torch_load
from peft.core.model.walk import embeddings_of, shares_embeddings
from peft.errors import CheckpointError, ConfigError, damaged
from peft.tools.shards import Shards, has_weights


# The weights that a folder is looked through for, the best known names first.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "adapter.safetensors",
          "pytorch_adapter.bin", "pytorch_model_adapter_fusion.bin", "model_adapter_fusion.safetensors",
          "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
          "adapter_model.pt")  # fmt: skip
_CONFIGS = ("adapter_config.json", "adapter_fusion_config.json")
ENDS = ("safetensors", "sft", "gguf", "bin", "pt", "pth", "ckpt")
Bundle = dict[str, Held]  # by component of a pipeline: "unet", "text_encoder", ...; "" where there is one model
Files = dict[str, Callable[[str], None]]  # name of a file -> what writes it to a path


@dataclass
class Source:
    """A file of weights, with what stands beside it.

    Attributes:
        path: of the weights. tensors: in them; of a GGUF file none. metadata: of the safetensors header. config: what
            the JSON beside it says.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]
    gguf: bool = False

    @classmethod
    def open(cls, where: str | os.PathLike) -> Source:
        """Read a file, or the one file of weights in a folder.

        Raises:
            ConfigError: there is none, or there are several; or the config beside it is damaged.
            CheckpointError: the file is damaged, or none of weights.
        """
        path = _weights_in(Path(where))
        config: dict[str, Any] = {}
        for name in _CONFIGS:
            if (file := path.with_name(name)).is_file():
                config = read_json(os.fspath(file))
        if path.name.endswith(".index.json"):
            shards = Shards(path.parent)
            return cls(path, {name: shards[name] for name in shards.entries}, {}, config)
        with open(path, "rb") as opened:
            start = opened.read(9)  # a file's first bytes tell its format; its name may lie
        if start.startswith(b"GGUF"):
            return cls(path, {}, {}, config, gguf=True)
        return cls(path, *_tensors_of(path, start), config)

    @classmethod
    def each(cls, where: str | os.PathLike) -> dict[str, Source]:
        """The sources in a folder, by the components of a pipeline as this library writes them; else one, as ""."""
        folder = Path(where)
        inside = sorted({file.parent for name in _CONFIGS for file in folder.glob(f"*/{name}")})
        if not inside or any((folder / name).is_file() for name in _CONFIGS):
            return {"": cls.open(where)}
        return {path.name: cls.open(path) for path in inside}


def _tensors_of(path: Path, start: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file and the metadata of its header, whatever it is called."""
    if not start:
        raise CheckpointError(f"{path} is empty.")
    if start[8:] != b"{" and not start.startswith((b"PK", b"\x80")):  # archives, and pickles
        raise CheckpointError(f"{path} is no file of weights: neither safetensors, a pickle of tensors nor GGUF.")
    try:
        if start[8:] == b"{":  # after its length the header of safetensors begins
            with safe_open(path, "pt") as opened:
                names = opened.keys()
                return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
        found = torch_load(path, map_location="cpu")
    except Exception as error:
        raise damaged(str(path), error) from error
    nested = found.get("state_dict") if isinstance(found, dict) else None  # as training checkpoints keep it
    return checked_tensors(str(path), nested if isinstance(nested, dict) else found), {}


def _weights_in(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{path} is neither a file nor a folder.")
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    if index := next(iter(sorted(path.glob("*.safetensors.index.json"))), None):
        return index
    found = sorted(file for end in ENDS for file in path.glob(f"*.{end}"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ConfigError(f"{path} should hold one file of adapter weights, and there are: {names}. Name the file.")
    return found[0]


@dataclass
class Base:
    """A base model's module names, config and, if it is asked for them, weights.

    Attributes:
        model: with or without memory. folder: where its weights are, if it has none.
    """

    model: nn.Module
    config: dict[str, Any]
    folder: str | None = None

    @classmethod
    def of(cls, base: nn.Module | str | os.PathLike) -> Base:
        """From a model, or from a folder with a ``config.json``; no weights are read yet."""
        if isinstance(base, nn.Module):
            config: Any = getattr(base, "config", None) or {}
            return cls(base, config.to_dict() if hasattr(config, "to_dict") else dict(config))
        made = skeleton(base, None)
        return cls(made, made.config.to_dict(), os.fspath(base))

    @property
    def names(self) -> list[str]:
        """Names of all modules that have a weight."""
        return [name for name, module in self.model.named_modules() if "weight" in module._parameters]

    def tensor(self, module: str, name: str) -> torch.Tensor:
        """A parameter of a module, such as its weight.

        Raises:
            ConfigError: neither the model nor its folder has it.
        """
        found = self.model.get_submodule(module)._parameters.get(name)
        if found is not None and not found.is_meta:
            return found.detach()
        key = f"{module}.{name}"
        shards = Shards(self.folder) if self.folder is not None and has_weights(self.folder) else None
        if shards is None or key not in shards.entries:
            raise ConfigError(f"the {name} of {module} is needed, and base={self.folder or 'the model'} has none.")
        return shards[key]

    def axes(self, module: str) -> int | None:
        """How many axes the weight of a module has; None if there is no such module."""
        weight = next((m for name, m in self.model.named_modules() if name == module), nn.Identity())._parameters
        return weight["weight"].dim() if weight.get("weight") is not None else None

    @property
    def tied(self) -> tuple[str, str] | None:
        """The names of the input and the output embedding, if these share their weight."""
        if not shares_embeddings(self.model):
            return None
        first, last = embeddings_of(self.model)
        names = {module: name for name, module in self.model.named_modules()}
        return (names[first], names[last]) if first in names and last in names else None

    def has_bias(self, module: str) -> bool:
        """Whether a module has a bias."""
        return self.model.get_submodule(module)._parameters.get("bias") is not None

    def number(self, *keys: str) -> int:
        """The first of some entries of the config.

        Raises:
            ConfigError: it has none of them.
        """
        for key in keys:
            if self.config.get(key) is not None:
                return int(self.config[key])
        raise ConfigError(f"the base model's config has no {keys[0]}, which this format needs.")


@dataclass
class Job:
    """What a conversion knows and notes on its way.

    Attributes:
        base: the base model, where given. lost: what the target cannot hold, with the reason. notes: what else is to
            be known of the result. name: what a written adapter is called, where a format names it.
    """

    base: Base | None = None
    lost: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = "adapter"

    def need_base(self, why: str) -> Base:
        """The base model.

        Raises:
            ConfigError: it was not given.
        """
        if self.base is None:
            raise ConfigError(f"{why}: give the base model, base=FOLDER (its config.json is enough) or the model.")
        return self.base


@dataclass(frozen=True)
class Format:
    """A file format: how it is known by its content, read and written.

    Attributes:
        name: what users say. matches: whether a source is of it. read: to adapters of this library. write: from them,
            the files of the result. single: the extension of the one file that it is, if it is one file. holds:
            fields of a LoRA's config beyond its A and B that it has a place for, see :func:`beyond_pairs`.
    """

    name: str
    matches: Callable[[Source], bool]
    read: Callable[[Source, Job], Bundle]
    write: Callable[[Bundle, Job], Files]
    single: str | None = None
    holds: frozenset[str] = frozenset()


def one(bundle: Bundle, what: str) -> Held:
    """The adapter of a bundle that has one.

    Raises:
        ConfigError: there are several.
    """
    if len(bundle) != 1:
        raise ConfigError(f"{what} holds one model's adapter, and this source has several: {', '.join(bundle)}.")
    return next(iter(bundle.values()))
