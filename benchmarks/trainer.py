"""A training as users run it: transformers' ``Trainer``, here and in a reference library, time and memory.

    python benchmarks/trainer.py [--reference-python PATH] [--cases plain,savings] [--steps 2] [--clock cpu]

A model of SmolLM2-135M's shape (30 layers, width 576, a vocabulary of 49,152) with random weights in float32; 8 x 256
tokens, LoRA of rank 16 on all linear layers with dropout 0.05, AdamW. Each run is a process of its own, and the two
libraries take turns. The time is the median of the steps after the first; the memory is by how much the process grows
at most above the built model. ``savings`` is `peft.enable_memory_savings` here and nothing in the reference;
``checkpointing`` is on in both; ``floor`` is the frozen model here, beside LoRA there. Results go to
``benchmarks/RESULTS.md`` (between the marks there) with ``--write``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
SHAPE = {"layers": 30, "width": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "vocab": 49152}
TINY = {"layers": 2, "width": 24, "inner": 32, "heads": 3, "kv_heads": 1, "vocab": 100}


@dataclass
class Case:
    """A row.

    Attributes:
        checkpointing: of the Trainer, in the reference (and here, where there are no savings).
        frozen: here, no adapter: the first norm trains alone, so that the backward pass goes all the way.
        savings: arguments of ``enable_memory_savings`` here, or None.
        memory, time: the largest ratios to the reference aimed at, or None.
    """

    what: str
    checkpointing: bool = False
    frozen: bool = False
    savings: dict[str, Any] | None = None
    memory: float | None = None
    time: float | None = None


CASES = {
    "plain": Case("as it is"),
    "savings": Case(
        "savings with the chunked loss, no checkpointing",
        savings={"checkpointing": False, "chunked_loss": True},
        memory=0.42,
        time=0.62,
    ),
    "checkpointing": Case(
        "all savings; checkpointing in both", checkpointing=True, savings={"chunked_loss": True}, memory=0.5, time=0.8
    ),
    "floor": Case(
        "no adapter here, savings with the chunked loss",
        frozen=True,
        savings={"checkpointing": False, "chunked_loss": True},
    ),
}


def train(case: Case, ours: bool, steps: int, tiny: bool) -> dict[str, float]:
    """Seconds of a step, bytes above the built model, and the last loss, of a run in this process."""
    import torch
    from _common import PeakMemory, keep_freed_memory, llama, seconds, tokens
    from run import adapted
    from transformers import Trainer, TrainingArguments

    keep_freed_memory()
    model = llama(**(TINY if tiny else SHAPE))
    if case.frozen and ours:
        model.requires_grad_(False).model.layers[0].input_layernorm.weight.requires_grad_()
    else:
        model = adapted(model, lora_dropout=0.05)
    savings = case.savings if ours else None
    if savings is not None:
        import peft

        peft.enable_memory_savings(model, **savings)
    length, vocab = (16, 100) if tiny else (256, SHAPE["vocab"])
    data = [{"input_ids": row, "labels": row} for row in tokens(8 * steps, length, vocab)]
    times: list[float] = []

    class Timed(Trainer):
        """Notes how long each step takes, its part of the optimizer aside."""

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            found: list[torch.Tensor] = []
            times.append(seconds(lambda: found.append(super(Timed, self).training_step(*args, **kwargs))))
            return found[0]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_steps=1, gradient_checkpointing=case.checkpointing and savings is None,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        trainer = Timed(model, arguments, train_dataset=data)
        with PeakMemory() as memory:
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": statistics.median(times[1:] or times), "bytes": memory.bytes, "loss": float(losses[-1])}


def run(python: str, name: str, ours: bool, options: argparse.Namespace) -> dict[str, float]:
    """The figures of a case, in a process of its own."""
    from _common import measured_by

    rest = ["--steps", str(options.steps), *["--ours"] * ours, *["--tiny"] * options.tiny]
    found = measured_by(HERE / "trainer.py", python, name, options.threads, ours, *rest)
    if found is None:
        raise SystemExit(1)
    return found


HEADER = """| run | here, a step | memory | reference, a step | memory | time, ratio | memory, ratio | target |
|---|---:|---:|---:|---:|---:|---:|---|"""


def line(case: Case, here: list[dict[str, float]], there: list[dict[str, float]]) -> str:
    """A row of the table in Markdown."""
    from _common import ratio

    def cells(runs: list[dict[str, float]]) -> list[str]:
        if not runs:
            return ["-", "-"]
        middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        return [f"{middle['seconds']:.1f} s", f"{middle['bytes'] / 2**20:,.0f} MiB"]

    ratios = ["-", "-"]
    if there:
        ratios = [f"{ratio((r[k] for r in here), (r[k] for r in there)):.2f}" for k in ("seconds", "bytes")]
    target = "-" if case.time is None else f"time {case.time:g}, memory {case.memory:g} x reference"
    return f"| {' | '.join([case.what, *cells(here), *cells(there), *ratios, target])} |"


def main() -> None:
    """Parse the command line; measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", help="Python of the environment with the reference library")
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of: {','.join(CASES)}")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine with other work")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers: to see that it runs")
    parser.add_argument("--write", action="store_true", help="write the table to RESULTS.md")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(train(CASES[options.worker], options.ours, options.steps, options.tiny)))
        return
    os.environ["BENCHMARK_CLOCK"] = options.clock
    if unknown := sorted(set(options.cases.split(",")) - set(CASES)):
        parser.error(f"unknown cases {unknown}; there are {list(CASES)}")
    lines = [HEADER]
    print(HEADER, flush=True)
    for name in options.cases.split(","):
        here, there = [], []
        for _ in range(options.rounds):
            here.append(run(sys.executable, name, True, options))
            if options.reference_python:
                there.append(run(options.reference_python, name, False, options))
        lines.append(line(CASES[name], here, there))
        print(lines[-1], flush=True)
    if options.write:
        from _common import measured_with, write_section

        clock = "CPU time of both cores" if options.clock == "cpu" else "Wall time"
        about = f"{clock}, {options.rounds} round{'s' * (options.rounds > 1)} of {options.steps} steps."
        write_section(
            "trainer.py", "\n".join([*measured_with(options.reference_python, options.threads), about, "", *lines])
        )


if __name__ == "__main__":
    main()
