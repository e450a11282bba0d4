"""``peft inspect``: what an adapter is, and what it does."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from peft.cli.command import Command, argument
from peft.cli.output import Output
from peft.config import Options, option


@dataclass
class InspectOptions(Options):
    """Which adapter, and on what."""

    adapter: str = argument("Adapter: a folder, or a name on the hub.")
    base: str | None = option(None, "Base model; the one that the adapter names, where that is a folder here.")
    plot: str | None = option(None, "Folder for pictures: a heat map of the updates, and their spectra.")
    all: bool = option(False, "Show every layer, and not only those with the largest and the smallest updates.")


def act(options: InspectOptions, output: Output) -> dict[str, Any]:
    """Look at it; NaN and a base that it does not fit are wrong."""
    from peft.convert import check_serving
    from peft.tools.inspection import inspect_adapter

    report = inspect_adapter(options.adapter, options.base)
    # Nothing is downloaded unasked.
    if options.base is None and report.base is not None and os.path.isdir(report.base):
        report = inspect_adapter(options.adapter, report.base)
    servers = {name: dataclasses.asdict(found) for name, found in check_serving(options.adapter).items()}
    found = {"ok": not report.broken and report.fits is not False, "adapter": options.adapter, "all": options.all,
             **report.to_dict(), "servers": servers, "files": []}  # fmt: skip
    if options.plot is not None:
        from peft.cli.train import draw

        layers = [layer for layer in report.layers if layer.relative is not None]
        updates = {layer.name: layer.relative for layer in layers}
        spectra = {layer.name: layer.spectrum for layer in layers}
        found["files"] += draw(options.plot, "update_map", ["updates.png"], updates, found)
        found["files"] += draw(options.plot, "spectra", ["spectra.png"], spectra, found)
    return found


def show(found: dict[str, Any], output: Output) -> None:
    """The facts, then the layers."""
    from peft.tools.footprint import readable

    facts = {
        "method": found["method"], "base": found["base"], "task": found["task"],
        **{name: _short(value) for name, value in found["settings"].items()},
        "parameters": found["parameters"], "size": readable(found["bytes"]), "dtype": ", ".join(found["dtypes"]),
        "tensors with NaN": len(found["broken"]), "tensors of zeros": len(found["zero"]),
        "fits the base": found["fits"],
    }  # fmt: skip
    output.table(found["adapter"], ["", "value"], list(facts.items()))
    for name in found["broken"][:5]:
        output.print(f"NaN or infinite: {name}", "red")
    if found["why_not"]:
        output.print(f"does not fit: {found['why_not']}", "red")
    layers = [layer for layer in found["layers"] if layer["relative"] is not None]
    layers.sort(key=lambda layer: -layer["relative"])
    rows = layers if found["all"] or len(layers) <= 12 else [*layers[:6], *layers[-6:]]
    if rows:
        title = "updates, the largest first" + (
            "" if rows is layers else f" (12 of {len(layers)}; --all true for all)"
        )
        keys = ("relative", "effective_rank", "largest", "smallest")
        output.table(title, ["layer", "|dW| / |W|", "effective rank", "largest singular value", "smallest"],
                     [[layer["name"], *(layer[key] for key in keys)] for layer in rows])  # fmt: skip
    reasons = {layer["reason"] for layer in found["layers"] if layer["reason"]}
    for reason in sorted(reasons):
        output.print(f"no change of a weight: {reason}")
    rows = [
        [name, s["loads"], "; ".join([*s["problems"], *s["needs"]]) or "-"] for name, s in found["servers"].items()
    ]
    output.table("servers", ["server", "loads it", "why not, or what it needs"], rows)
    for remark in found.get("remarks", ()):
        output.print(remark)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 70 else text[:70] + " ..."


COMMAND = Command(
    "inspect",
    "What an adapter is: method, targets, sizes, broken tensors; and what it does to each layer of its base.",
    "  peft inspect runs/sentiment/adapter --base HuggingFaceTB/SmolLM2-135M-Instruct --plot pictures",
    InspectOptions,
    act,
    show,
)
