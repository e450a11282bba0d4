"""``peft convert``, ``peft extract``, ``peft resize``: the functions of :mod:`peft.convert`, on files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from peft.cli.command import Command, argument, output_of
from peft.cli.output import Output
from peft.config import Options, option
from peft.errors import ConfigError


@dataclass
class ConvertOptions(Options):
    """What is converted to what."""

    source: str = argument("Adapter: a file or a folder, of any format that is known.")
    to: str = option("peft", "Format to write.")
    output: str | None = option(None, "Folder, or the file where the format is one.")
    base: str | None = option(None, "Folder of the base model, for formats whose names need it.")
    lossy: bool = option(False, "Leave out what the format cannot hold, and say so.")


@dataclass
class Size(Options):
    """How large a result is to be."""

    rank: int | None = option(None, "The most that a layer has.", minimum=1)
    energy: float | None = option(
        None,
        "Share of the squared singular values to keep; ranks are shared out among layers by it.",
        above=0,
        maximum=1,
    )

    def said(self) -> dict[str, Any]:
        """The arguments of the functions that take it.

        Raises:
            ConfigError: neither was said.
        """
        if self.rank is None and self.energy is None:
            raise ConfigError("the size of the result is missing: say it with --rank 16, or --energy 0.95.")
        return {"rank": self.rank, "energy": self.energy}


@dataclass
class ExtractOptions(Size):
    """Which two models."""

    base: str = argument("Base model: a folder with safetensors files.")
    tuned: str = argument("The fine-tuned model, likewise.")
    output: str | None = option(None, "Folder of the adapter.")


@dataclass
class ResizeOptions(Size):
    """Which adapter, and how large it is to be."""

    source: str = argument("Adapter: a folder, or a name on the hub.")
    output: str | None = option(None, "Folder of the result.")


def _convert(options: ConvertOptions, output: Output) -> dict[str, Any]:
    from peft.convert import convert_adapter

    report = convert_adapter(options.source, options.to, output_of(options), base=options.base, lossy=options.lossy)
    return {"ok": True, **dataclasses.asdict(report)}


def _show_conversion(found: dict[str, Any], output: Output) -> None:
    output.print(
        f"{found['output']}: {found['tensors']} tensors, {found['source_format']} -> {found['target_format']}"
    )
    for name, why in found["lost"].items():
        output.print(f"left out: {name}: {why}", "yellow")
    for note in found["notes"]:
        output.print(note)


def _extract(options: ExtractOptions, output: Output) -> dict[str, Any]:
    from peft.convert import extract_adapter

    target = output_of(options)
    report = extract_adapter(options.base, options.tuned, target, **options.said())
    return {"ok": True, **dataclasses.asdict(report)}


def _resize(options: ResizeOptions, output: Output) -> dict[str, Any]:
    from peft.convert import resize_adapter

    report = resize_adapter(options.source, output_of(options), **options.said())
    return {"ok": True, **dataclasses.asdict(report)}


def _show_ranks(found: dict[str, Any], output: Output) -> None:
    """What was kept, and the layers of which the most was cut off."""
    output.print(f"{found['output']}: {found['kept']:.2%} of the energy kept")
    worst = sorted(found["errors"], key=lambda name: -found["errors"][name])[:10]
    rows = [[name, found["ranks"].get(name), found["errors"][name]] for name in worst]
    output.table("largest errors", ["layer", "rank", "error"], rows)


COMMANDS = {
    "convert": Command(
        "convert",
        "Write an adapter of one tool as that of another: peft, kohya, diffusers, GGUF, MLX and more.",
        "  peft convert style.safetensors -o style-peft\n"
        "  peft convert runs/tone/adapter --to gguf --base SmolLM2-135M-Instruct -o tone.gguf",
        ConvertOptions,
        _convert,
        _show_conversion,
    ),
    "extract": Command(
        "extract",
        "The LoRA that turns a base model into a fine-tuned one, as nearly as its rank allows.",
        "  peft extract SmolLM2-135M SmolLM2-135M-Instruct --rank 64 --energy 0.9 -o instruct-lora",
        ExtractOptions,
        _extract,
        _show_ranks,
    ),
    "resize": Command(
        "resize",
        "Give an adapter another rank.",
        "  peft resize runs/style/adapter --energy 0.95 -o runs/style-small",
        ResizeOptions,
        _resize,
        _show_ranks,
    ),
}
