"""Adapters from one tool's files to another's. The format of a source is found by its content."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from peft.convert.formats import FORMATS
from peft.convert.formats.flux import as_in, flux_encoders
from peft.convert.formats.unet import unet_as_in
from peft.convert.held import Held, beyond_pairs, held_of, is_lora, magnitude_of, modules_of, pairs_of
from peft.convert.source import ENDS, WEIGHTS, Base, Bundle, Files, Format, Job, Source
from peft.core.files.io import PREFIX, replacing
from peft.errors import ConfigError, nearest, some


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_adapter` has done.

    Attributes:
        source_format, target_format: their names. output: the file or folder. components: the models that it adapts.
        tensors: how many were read. lost: what the target cannot hold -> why. notes: what else is to be known.
    """

    source_format: str
    target_format: str
    output: str
    components: list[str]
    tensors: int
    lost: dict[str, str]
    notes: list[str]


def format_of(source: str | os.PathLike) -> str:
    """The name of the format of a file or folder, by its content.

    Raises:
        ConfigError: it is of none that is known.
    """
    return _detected(next(iter(Source.each(source).values()))).name


def convert_adapter(
    source: str | os.PathLike,
    target_format: str,
    output: str | os.PathLike,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    lossy: bool = False,
) -> Conversion:
    """Write an adapter of one tool as that of another: the same tensors, the same scale.

    Args:
        source: a file, or a folder with one, or with a folder for each component. target_format: see
            :data:`peft.convert.FORMATS`. output: a folder, or the file where the format is one.
        base: the base model, or a folder with its ``config.json``: names of modules that a format writes without dots
            are then found exactly, and formats that order rows otherwise know the heads.
        lossy: write the result also where something cannot be carried over; the report names it.

    Example::

        convert_adapter("style.safetensors", "peft", "style-peft")
        convert_adapter("runs/tone/adapter", "gguf", "tone.gguf", base="SmolLM2-135M-Instruct")

    Raises:
        ConfigError: an unknown format, a file that cannot be understood, or something that the target cannot hold.
            Nothing is written then.
    """
    target = next((format for format in FORMATS if format.name == target_format), None)
    if target is None:
        names = [format.name for format in FORMATS]
        raise ConfigError(
            f"unknown format {target_format!r}.{nearest(target_format, names)} There are {', '.join(names)}."
        )
    job, bundle = Job(None if base is None else Base.of(base)), {}
    for component, found in Source.each(source).items():
        origin = _detected(found)
        read = origin.read(found, job)
        for name, held in read.items():
            key = f"{component}_{name}" if component and len(read) > 1 else component or name
            bundle[key] = _fitted(held, job)
    bundle = flux_encoders(bundle)
    job.lost.update(_not_in_base(bundle, job))
    if target.name != "peft":
        for held in filter(is_lora, bundle.values()):
            beyond = beyond_pairs(held.config)
            job.lost.update({name: why for name, why in beyond.items() if name not in target.holds})
    files = target.write(bundle, job)
    if job.lost and not lossy:
        listed = "; ".join(f"{name}: {why}" for name, why in list(job.lost.items())[:8])
        raise ConfigError(
            f"{len(job.lost)} things cannot be carried over from {origin.name} to {target.name}: {listed}. "
            "lossy=True leaves them out."
        )
    where = _write(target, files, Path(output))
    count = sum(len(held.tensors) for held in bundle.values())
    return Conversion(origin.name, target.name, where, list(bundle), count, job.lost, job.notes)


def _fitted(held: Held, job: Job) -> Held:
    """The adapter on the modules that the base has, where tools know a model by different ones, or in other shapes."""
    if job.base is None:
        return held
    held = unet_as_in(as_in(held, job.base), job.base)
    return _shaped(held, job.base) if is_lora(held) and not held.config.use_gating else held


def _shaped(held: Held, base: Base) -> Held:
    """Pairs of 1 x 1 convolutions are matrices in some files, and pairs of matrices such convolutions."""
    found, changed = pairs_of(held), False
    for module, pair in found.pairs.items():
        axes = base.axes(module)
        if axes is None or axes == pair.down.dim() or pair.table or any(size > 1 for size in pair.down.shape[2:]):
            continue
        ones = [1] * (axes - 2)
        pair.down, pair.up = (tensor.view(*tensor.shape[:2], *ones) for tensor in (pair.down, pair.up))
        if pair.magnitude is not None:
            pair.magnitude = magnitude_of(pair.magnitude, pair.down)
        changed = True
    return held_of(found, held.config) if changed else held


def _not_in_base(bundle: Bundle, job: Job) -> dict[str, str]:
    """The modules of a LoRA that the base model lacks; of the several adapters of a pipeline they are not asked."""
    held = bundle.get("")
    if job.base is None or held is None or not is_lora(held) or held.config.use_gating:
        return {}
    known = {name for name, _ in job.base.model.named_modules()}
    names = {
        module: ".".join(word for word in module.split(".") if word != "base_layer") for module in modules_of(held)
    }
    return {module: "the base model has no such module" for module, name in names.items() if name not in known}


def _detected(source: Source) -> Format:
    for format in FORMATS:
        if format.matches(source):
            return format
    if source.path.with_name("config.json").is_file() and not source.config:
        raise ConfigError(
            f"{source.path} is of a model, not of an adapter: extract_adapter makes a LoRA of two models."
        )
    if any(name.startswith(PREFIX) for name in source.tensors):
        raise ConfigError(f"{source.path} needs its adapter_config.json beside it, which says method and scale.")
    shown = some(source.tensors, 4) or "nothing"
    raise ConfigError(f"{source.path} is no adapter of a format that is known here; it holds {shown}.")


def _write(target: Format, files: Files, output: Path) -> str:
    """Write the files; those of one folder all or none."""
    if target.single is not None and output.suffix == target.single:
        files, output = {output.name: next(iter(files.values()))}, output.parent
        output.mkdir(parents=True, exist_ok=True)
        where = output / next(iter(files))
    else:
        where = output
        if output.suffix[1:] in ENDS and not output.is_dir():
            what = f"a file that ends in {target.single}" if target.single else "a folder"
            raise ConfigError(f"{target.name} is written as {what}, and the output is called {output}.")
    folders: dict[Path, Files] = {}
    for name, write in files.items():
        folders.setdefault((output / name).parent, {})[os.path.basename(name)] = write
    if target.single is None:
        for folder, inside in folders.items():
            _check_alone(folder, {*inside, "adapter_model.bin"} if target.name == "peft" else {*inside})
    for folder, inside in folders.items():
        with replacing(folder) as path:
            for name, write in inside.items():
                write(path(name))
    return os.fspath(where)


def _check_alone(folder: Path, names: Collection[str]) -> None:
    """Raise ConfigError where a folder holds the weights of another adapter, whose config would be replaced."""
    if others := [name for name in WEIGHTS if name not in names and (folder / name).is_file()]:
        raise ConfigError(
            f"{folder} holds another adapter ({', '.join(others)}), whose adapter_config.json would be replaced: name "
            "another folder."
        )
