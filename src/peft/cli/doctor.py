"""``peft doctor``: what is wrong with an environment, a recipe, or a run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from dataclasses import dataclass
from typing import Any

from packaging.requirements import Requirement

from peft.cli import training
from peft.cli.command import Command, argument
from peft.cli.output import Output
from peft.cli.recipe import Recipe
from peft.config import Options, option
from peft.errors import PeftError
from peft.tools.learning_rates import learning_rate_of


@dataclass
class DoctorOptions(Options):
    """What is looked at."""

    target: str | None = argument("A recipe, or the folder of a run; the environment alone if left out.", "?")
    step: bool = option(True, "Load the model of a recipe, and run one step.")


def act(options: DoctorOptions, output: Output) -> dict[str, Any]:
    """Look; findings make the exit status 1."""
    found: dict[str, Any] = {"environment": _environment(), "libraries": _libraries(), "findings": []}
    findings = found["findings"]
    wrong = [f"{lib['name']} {lib['version']} is here; {lib['needs']} is needed: pip install '{lib['install']}'"
             for lib in found["libraries"] if lib["version"] and not lib["fits"]]  # fmt: skip
    findings += wrong
    if options.target is not None:
        recipe = Recipe.load(options.target)
        if os.path.isdir(options.target):
            findings += _of_history(_history(options.target), recipe)
        findings += _of_rate(recipe)
        if options.step:
            try:
                with_remarks = training.prepare(recipe, output).remarks
                findings += [remark for remark in with_remarks if not remark.startswith("memory by estimate")]
            except (PeftError, ValueError, OSError) as error:
                findings.append(str(error))
    return {"ok": not findings, **found}


def _environment() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    free = training.free_memory(torch.device("cpu"))
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "free memory": free,
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
        "bfloat16": torch.cuda.is_bf16_supported() if gpus else True,
    }


def _libraries() -> list[dict[str, Any]]:
    """The libraries that the package's metadata name, with what is installed of them."""
    found = []
    for line in importlib.metadata.requires("peft") or ():
        requirement = Requirement(line)
        extra = str(requirement.marker).partition('extra == "')[2].rstrip('"') if "extra ==" in line else None
        if requirement.name == "peft" or extra == "dev" or extra == "clients":
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        found.append({"name": requirement.name, "version": version, "needs": str(requirement.specifier) or "any",
                      "fits": fits, "install": f"peft[{extra}]" if extra else "peft", "extra": extra})  # fmt: skip
    return found


def _history(folder: str) -> list[dict[str, Any]]:
    """The log of a run: whole, or that of its last checkpoint."""
    last = training.last_checkpoint(os.path.join(folder, training.CHECKPOINTS))
    files = [os.path.join(folder, "history.json"), *([os.path.join(last, "trainer_state.json")] if last else [])]
    for file in files:
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as stream:
                found = json.load(stream)
            return found if isinstance(found, list) else found["log_history"]
    return []


def _of_history(history: list[dict[str, Any]], recipe: Recipe) -> list[str]:
    """What the losses of a run tell."""
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    norms = [float(entry["grad_norm"]) for entry in history if entry.get("grad_norm") is not None]
    if not losses:
        return ["the run has no losses: it was interrupted before the first checkpoint. Start it again to go on."]
    found = []
    if any(not math.isfinite(loss) for loss in losses):
        found.append("the loss is not finite: a smaller trainer.learning_rate, and bf16 instead of fp16, help.")
        return found
    third = max(1, len(losses) // 3)
    first, last = sum(losses[:third]) / third, sum(losses[-third:]) / third
    if len(losses) >= 3 and last > 1.02 * first:
        found.append(f"the loss rises, from {first:.4g} to {last:.4g}: a third of the learning rate may help.")
    elif len(losses) >= 3 and last > 0.98 * first:
        found.append(
            f"the loss stays, from {first:.4g} to {last:.4g}: a larger trainer.learning_rate (now "
            f"{float(recipe.trainer.learning_rate):g}), more steps, or more that trains (adapter.r, "
            "adapter.target_modules=all-linear) may help."
        )
    held = [float(entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if len(held) >= 2 and held[-1] > 1.02 * min(held):
        found.append(f"the loss on held-out data rises again, from {min(held):.4g} to {held[-1]:.4g}: fewer steps.")
    if norms and max(norms) == 0:
        found.append("all gradients are zero: see whether labels are masked, and whether the adapter is active.")
    return found


def _of_rate(recipe: Recipe) -> list[str]:
    """A learning rate far from the usual for the method."""
    rate = recipe.trainer.learning_rate
    if isinstance(rate, str):
        return []
    usual = learning_rate_of(recipe.adapter_config(), recipe.task)
    if usual.value / 20 <= rate <= usual.value * 20:
        return []
    way = "small" if rate < usual.value else "large"
    return [f"a learning rate of {rate:g} is {way} for {recipe.method}; {usual.value:g} is usual ({usual.source})."]


def show(found: dict[str, Any], output: Output) -> None:
    """The environment, the libraries, the findings."""
    from peft.tools.footprint import readable

    facts = dict(found["environment"])
    facts["free memory"] = None if facts["free memory"] is None else readable(facts["free memory"])
    facts["gpus"] = "; ".join(facts["gpus"]) or "none"
    output.table("environment", ["", "value"], list(facts.items()))
    rows = [[lib["name"], lib["version"], lib["needs"], lib["install"]] for lib in found["libraries"]]
    output.table("libraries", ["library", "here", "needed", "comes with"], rows)
    for finding in found["findings"]:
        output.print(f"- {finding}", "yellow")
    if not found["findings"]:
        output.print("nothing wrong was found")


COMMAND = Command(
    "doctor",
    "What is wrong with an environment, with a recipe, or with a run whose loss does not fall.",
    "  peft doctor\n  peft doctor recipes/sentiment.yaml\n  peft doctor runs/sentiment",
    DoctorOptions,
    act,
    show,
)
