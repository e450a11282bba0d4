"""``peft train``: a recipe, from data to a saved adapter with its metrics, its card and its curve."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from peft.cli.command import Command
from peft.cli.output import Output, shown
from peft.cli.recipe import Recipe
from peft.cli.training import prepare, unfinished, write_json
from peft.core.files.io import replacing
from peft.tools.card import CARD_NAME


ADAPTER = "adapter"


def act(recipe: Recipe, output: Output) -> dict[str, Any]:
    """Train, or go on training; what is found is written to ``metrics.json``, too."""
    from peft.tools.out_of_memory import explain_out_of_memory
    from peft.tools.status import count_parameters

    recipe.require("model.name", "data.train")
    training = prepare(recipe, output)
    last = unfinished(recipe, output)
    trainer, folder = training.trainer, recipe.output
    for remark in training.remarks:
        output.say(remark)
    trainable, total = count_parameters(trainer.model)
    output.say(f"{trainable:,} of {total:,} parameters train ({trainable / total:.3%})")
    begun = time.perf_counter()
    with _shown_progress(trainer, output), explain_out_of_memory(trainer.model):
        result = trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - begun
    metrics = {"steps": trainer.state.global_step, "train_loss": result.training_loss}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses:
        metrics["last_loss"] = losses[-1]
    if trainer.eval_dataset is not None:
        metrics |= {k: v for k, v in trainer.evaluate().items() if not k.endswith(("_second", "_runtime"))}
    metrics |= {"seconds": round(seconds, 2), "trainable": trainable, "parameters": total}
    if training.memory is not None:
        metrics["memory_by_estimate"] = training.memory
    if torch.cuda.is_available():
        metrics["memory_at_most"] = torch.cuda.max_memory_allocated()
    trainer.save_model(os.path.join(folder, ADAPTER))
    found = {"ok": True, "output": folder, "adapter": os.path.join(folder, ADAPTER), "metrics": metrics,
             "remarks": training.remarks, "files": []}  # fmt: skip
    if output.first:
        _finish(trainer, recipe, metrics, found)
    return found


def _finish(trainer: Any, recipe: Recipe, metrics: dict[str, Any], found: dict[str, Any]) -> None:
    """Write what stays of a run beside the adapter; ``metrics.json`` comes last, and says that it is finished."""
    folder = recipe.output
    _complete_card(os.path.join(folder, ADAPTER), recipe, metrics)
    history = trainer.state.log_history
    write_json(folder, "history.json", history)
    curves = {os.path.basename(os.path.abspath(folder)): history}
    drawn = draw(folder, "loss_curves", ["loss.png", "loss.svg"], curves, found)
    found["files"] = [*drawn, "history.json", "recipe.yaml"]
    write_json(folder, "metrics.json", metrics)
    found["files"].append("metrics.json")


def draw(folder: str, kind: str, names: list[str], values: Any, found: dict[str, Any], **more: Any) -> list[str]:
    """Draw a picture of :mod:`peft.tools.plots` in files of a folder; without matplotlib, a remark says what to do.

    Returns:
        The names of the files drawn.
    """
    from peft.tools import plots

    try:
        with replacing(folder) as path:
            getattr(plots, kind)(values, *(path(name) for name in names), **more)
    except (ImportError, ValueError) as error:
        found.setdefault("remarks", []).append(str(error))
        return []
    return names


def _complete_card(folder: str, recipe: Recipe, metrics: dict[str, Any]) -> None:
    """Say in the model card how the adapter was trained."""
    card = Path(folder, CARD_NAME)
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    recipe.save(folder)
    rows = "\n".join(f"| {name} | {shown(value)} |" for name, value in metrics.items())
    told = f"## Training\n\n{recipe.method} by `peft train` with `recipe.yaml`.\n\n| | |\n|---|---|\n{rows}\n"
    mark = "### Framework versions"
    before, found, after = text.partition(mark)
    text = f"{before.rstrip()}\n\n{told}\n{found}{after}" if found else f"{text.rstrip()}\n\n{told}"
    with replacing(folder) as path:
        Path(path(CARD_NAME)).write_text(text, encoding="utf-8")


def _shown_progress(trainer: Any, output: Output) -> Any:
    """A progress bar for a trainer, with lines of its log; a context."""
    import transformers

    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)  # stdout is for the results
    progress = output.progress()
    bar = progress.add_task("training")

    class Shown(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress.update(bar, completed=state.global_step, total=state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            values = {
                k: v for k, v in (logs or {}).items() if k in ("loss", "eval_loss", "eval_accuracy", "grad_norm")
            }
            if values:
                told = "  ".join(f"{k} {float(v):.4g}" for k, v in values.items())
                output.say(f"step {state.global_step:>5}  {told}")

    trainer.add_callback(Shown)
    return progress


def show(found: dict[str, Any], output: Output) -> None:
    """The metrics, and where the files are."""
    output.table(found["output"], ["", "value"], [[name, value] for name, value in found["metrics"].items()])
    output.print(f"adapter: {found['adapter']}; beside it: {', '.join(found['files'])}")


COMMAND = Command(
    "train",
    "Train an adapter from a recipe, or from flags alone. A run that was interrupted goes on where it was.",
    "  peft train recipes/sentiment.yaml --set trainer.steps=50\n"
    "  peft train --model NAME --data data.jsonl --method lora --adapter.r 16 --output runs/mine\n"
    "  accelerate launch --num_processes 2 -m peft train recipes/sentiment.yaml",
    Recipe,
    act,
    show,
    recipe=True,
)
