"""``peft compare``: the same data and steps by several methods and learning rates."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from dataclasses import dataclass
from typing import Any

from peft.cli import train
from peft.cli.command import Command
from peft.cli.output import Output
from peft.cli.recipe import Recipe, config_class
from peft.cli.training import check_same, choose_rate, write_json
from peft.config import option
from peft.errors import ConfigError, PeftError


@dataclass
class CompareOptions(Recipe):
    """A recipe, and what varies."""

    methods: list[str] = option(lambda: ["lora"], "Methods, as in lora,dora,ia3.")
    rates: list[float | str] = option(lambda: ["auto"], "Learning rates for each, as in [auto,1e-3].")


def act(options: CompareOptions, output: Output) -> dict[str, Any]:
    """Train all of them, each in a folder of its own; what is finished is not trained again."""
    options.require("model.name", "data.train")
    if not options.methods:
        raise ConfigError("no methods to compare: say --methods lora,ia3.")
    for name in options.methods:
        config_class(name)  # a name that is wrong is told before anything is trained
    rows = []
    for method in options.methods:
        for rate in options.rates:
            name = method if len(options.rates) == 1 else f"{method} {rate}"
            output.say(f"== {name}", "bold")
            rows.append({"name": name, **_run(options, method, rate, output)})
            gc.collect()  # a model goes before the next one comes
    failed = [row["name"] for row in rows if "error" in row]
    found: dict[str, Any] = {"ok": len(failed) < len(rows), "output": options.output, "runs": rows, "files": []}
    if output.first:
        _finish(options, rows, found)
    return found


def _run(options: CompareOptions, method: str, rate: float | str, output: Output) -> dict[str, Any]:
    """One training; its metrics, or the error with which it failed."""
    folder = os.path.join(options.output, f"{method}-{rate}")
    finished = os.path.join(folder, "metrics.json")
    names = {field.name for field in dataclasses.fields(Recipe)}
    values = {name: value for name, value in dataclasses.asdict(options).items() if name in names}
    known = {field.name for field in dataclasses.fields(config_class(method))}
    values.update(method=method, output=folder)
    values["adapter"] = {name: value for name, value in options.adapter.items() if name in known}
    values["trainer"]["learning_rate"] = rate
    recipe = Recipe(**values)
    if not options.restart and os.path.isfile(finished):
        choose_rate(recipe, output)
        check_same(recipe)
        output.say("finished before")
        with open(finished, encoding="utf-8") as file:
            return {"folder": folder, **json.load(file)}
    try:
        return {"folder": folder, **train.act(recipe, output)["metrics"]}
    except (PeftError, ValueError, RuntimeError) as error:  # out of memory too: the others may do
        output.warn(f"{method}: {error}")
        return {"folder": folder, "error": str(error)}


def _finish(options: CompareOptions, rows: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """Write the table and the pictures."""
    os.makedirs(options.output, exist_ok=True)
    write_json(options.output, "comparison.json", rows)
    found["files"].append("comparison.json")
    key, label = _quality(rows)
    drawn = [
        {"name": row["name"], "quality": row[key], "parameters": row["trainable"], "seconds": row["seconds"],
         "bytes": row.get("memory_at_most") or row.get("memory_by_estimate")}
        for row in rows if "error" not in row
    ]  # fmt: skip
    pictures = ["comparison.png", "comparison.svg"]
    if drawn:
        found["files"] += train.draw(options.output, "comparison", pictures, drawn, found, quality=label)
    histories = {}
    for row in rows:
        file = os.path.join(row["folder"], "history.json")
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as stream:
                histories[row["name"]] = json.load(stream)
    if histories:
        found["files"] += train.draw(options.output, "loss_curves", ["loss.png", "loss.svg"], histories, found)


def _quality(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """What the methods are compared by: the best measure that all have."""
    done = [row for row in rows if "error" not in row]
    for key, label in (("eval_accuracy", "accuracy on held-out data"), ("eval_loss", "loss on held-out data")):
        if done and all(key in row for row in done):
            return key, label
    return "train_loss", "mean training loss"


def show(found: dict[str, Any], output: Output) -> None:
    """A table, a row for each run."""
    keys = ["trainable", "train_loss", "eval_loss", "eval_accuracy", "eval_mean_token_accuracy", "seconds"]
    there = [key for key in keys if any(key in row for row in found["runs"])]
    output.table(found["output"], ["", *there], [[r["name"], *(r.get(k) for k in there)] for r in found["runs"]])
    for row in found["runs"]:
        if "error" in row:
            output.print(f"{row['name']} failed: {row['error']}", "red")
    output.print(f"beside the runs: {', '.join(found['files'])}")


COMMAND = Command(
    "compare",
    "Train several methods on the same data for the same steps: one table, one picture. Goes on if interrupted.",
    "  peft compare recipes/sentiment.yaml --methods lora,dora,ia3 --set trainer.steps=30 --output runs/compared",
    CompareOptions,
    act,
    show,
    recipe=True,
)
