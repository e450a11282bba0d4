"""Pictures of trainings and adapters, by matplotlib (``pip install 'peft[plots]'``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], file: str | os.PathLike) -> None:
    """Draw the losses of runs over their steps.

    Args:
        runs: name -> a trainer's ``log_history``: entries with "step" and "loss" or "eval_loss".
        file: where to; its ending says the format, such as png or svg.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, history in runs.items():
        for key, style in (("loss", "-"), ("eval_loss", "o--")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                label = name if key == "loss" else f"{name}, held out"
                axes.plot(*zip(*points), style, label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(file, dpi=150)
