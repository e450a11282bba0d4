"""``peft estimate``: the memory of a training, from a config alone."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import Any

from peft.cli.command import Command, argument
from peft.cli.output import Output, shown
from peft.cli.recipe import config_class, resolve
from peft.config import Options, option
from peft.errors import ConfigError


_BITS = {"none": None, "nf4": 4, "fp4": 4, "int8": 8}
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
SETTINGS = ("method", "quantization", "checkpointing", "length", "batch")
PARTS = ("weights", "gradients", "optimizer", "activations")


@dataclass
class EstimateOptions(Options):
    """What is estimated. Lists give a row for each combination."""

    model: str = argument("Model: a folder with its config.json, or a name on the hub. No weights are read.")
    method: list[str] | str = option("lora", "Methods, one or a list, as in lora,ia3.")
    adapter: dict = option(dict, "Fields of the methods' configs, as in {r: 16}; each takes those it has.")
    batch: list[int] | int = option(1, "Batch sizes, one or a list.")
    length: list[int] | int = option(512, "Tokens of a sample, one or a list.")
    quantization: list[str] | str = option("none", "How the base is kept: none, nf4, fp4, int8, or a list.")
    checkpointing: list[bool] | bool = option(False, "With gradient checkpointing: true, false, or [false,true].")
    optimizer: str = option("adamw", "adamw, adamw_8bit, momentum or sgd.")
    dtype: str | None = option(None, "Dtype of the base; the config's if left out.",
                               choices=("float32", "bfloat16", "float16"))  # fmt: skip
    device: str = option("cuda", "Device that trains.", choices=("cuda", "cpu"))
    memory: str | None = option(None, "Memory that there is, as in 24GB: the largest batch that fits is found.")
    plot: str | None = option(None, "Picture to draw, such as memory.png.")


def act(options: EstimateOptions, output: Output) -> dict[str, Any]:
    """An estimate for each setting."""
    from peft.cli.models import load_config
    from peft.cli.recipe import ModelOptions

    limit = None if options.memory is None else size_of(options.memory)
    config = load_config(ModelOptions(name=options.model))
    values = [v if isinstance(v := getattr(options, name), list) else [v] for name in SETTINGS]
    rows, largest = [], {}
    for each in itertools.product(*values):
        setting = dict(zip(SETTINGS, each))
        found = _estimate(config, options, setting)
        row = {**setting, **{part: getattr(found, part) for part in (*PARTS, "total", "trained", "parameters")}}
        if limit is not None:
            if each[:-1] not in largest:  # the batch comes last
                largest[each[:-1]] = _largest(config, options, setting, limit)
            row["largest_batch"] = largest[each[:-1]]
        rows.append(row)
    found = {"ok": limit is None or any(row["largest_batch"] for row in rows), "model": options.model,
             "limit": limit, "settings": rows}  # fmt: skip
    if options.plot is not None:
        from peft.tools import plots

        bars = {_name(row, rows): {part: row[part] for part in PARTS} for row in rows}
        plots.memory_bars(bars, options.plot, limit=limit)
    return found


def size_of(text: str) -> float:
    """Bytes of a size such as ``24GB`` or ``16GiB``.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None:
        raise ConfigError(f"{text!r} is no size; write 24GB, or 16GiB.")
    return float(match[1]) * _UNITS[match[2]]


def _estimate(config: Any, options: EstimateOptions, setting: dict[str, Any]) -> Any:
    import torch

    from peft.tools.memory import estimate_memory

    if setting["quantization"] not in _BITS:
        raise ConfigError(f"quantization={setting['quantization']!r} is unknown; there are {', '.join(_BITS)}.")
    cls = config_class(setting["method"])
    known = {field.name for field in dataclasses.fields(cls)}
    fields = {**resolve(setting["method"])[1], **{k: v for k, v in options.adapter.items() if k in known}}
    return estimate_memory(
        config,
        cls(**fields, task_type="CAUSAL_LM"),
        setting["batch"],
        setting["length"],
        gradient_checkpointing=setting["checkpointing"],
        bits=_BITS[setting["quantization"]],
        optimizer=options.optimizer,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        device=options.device,
    )


def _largest(config: Any, options: EstimateOptions, setting: dict[str, Any], limit: float) -> int:
    """The largest batch within the limit: what a sample takes is the same for each, and the guess is made sure."""

    def total(batch: int) -> int:
        return _estimate(config, options, {**setting, "batch": batch}).total

    one, two = total(1), total(2)
    if one > limit:
        return 0
    # Memory is nearly linear in the batch: a guess a little above, and down from there.
    guess = max(1, int((limit - one) // max(1, two - one)) + 1)
    while guess > 1 and total(guess) > limit:
        guess -= max(1, guess // 100)
    return guess


def _name(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What tells a setting from the others."""
    telling = [key for key in SETTINGS if len({str(other[key]) for other in rows}) > 1] or ["method"]
    return ", ".join(row[k] if isinstance(row[k], str) else f"{k} {shown(row[k])}" for k in telling)


def show(found: dict[str, Any], output: Output) -> None:
    """A table, a row for each setting."""
    from peft.tools.footprint import readable

    rows = found["settings"]
    keys = [key for key in SETTINGS if len({str(row[key]) for row in rows}) > 1] or ["method"]
    same = [f"{key} {shown(rows[0][key])}" for key in SETTINGS if key not in keys]
    columns = [*keys, *PARTS, "total", *(["fits"] if found["limit"] else [])]
    cells = []
    for row in rows:
        sizes = [readable(row[part]) for part in (*PARTS, "total")]
        more = [f"{row['largest_batch']}"] if found["limit"] else []
        cells.append([*(row[key] for key in keys), *sizes, *more])
    output.table(f"{found['model']}: {', '.join(same)}", columns, cells)
    if found["limit"]:
        output.print(f"fits: the largest batch in {readable(found['limit'])}.")
    output.print("Not in it: the library's own context, fragments, and buffers of single operations.")


COMMAND = Command(
    "estimate",
    "The memory of a training step, by part, from the config of a model alone.",
    "  peft estimate HuggingFaceTB/SmolLM2-1.7B --method lora,dora --adapter '{r: 16}' --batch 1,8 --memory 24GB",
    EstimateOptions,
    act,
    show,
)
