"""Where the time above the floor goes: each case of run.py that has a floor, by torch's profiler.

    python benchmarks/parts.py [--reference-python PATH] [--cases step,mixed-1] [--threads 2] [--write]

Milliseconds of one call, and behind them what of them the floor does not take, in four parts that make the whole:

- large products: those by the base's weights, and whatever else multiplies matrices without a side as narrow as r;
- thin products: those of A and B, with a side of r, 2 r ... 8 r;
- other operations: all else that torch computes: norms, masks, casts, copies, sums;
- between: what is no operation of torch's: Python, autograd's own work, and the profiler itself.

The profiler makes calls longer, so the sums are above run.py's; the case and its floor take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import run  # noqa: E402


CASES: dict[str, tuple[int, Callable[[], run.Pair]]] = {
    "step": (16, run.step_pair),
    "step-dropout": (16, lambda: run.step_pair(lora_dropout=0.05)),
    "step-dropout-2048": (16, lambda: run.step_pair(rows=8, length=256, lora_dropout=0.05)),
    "step-bfloat16": (16, lambda: run.step_pair("bfloat16")),
    "step-dora": (16, lambda: run.step_pair(use_dora=True)),
    "step-qv": (8, lambda: run.step_pair(targets=run.QV, r=8)),
    "nf4": (16, run.nf4_pair),
    "mixed-1": (16, lambda: run.mixed_pair(1)),
    "mixed-32": (16, lambda: run.mixed_pair(32)),
    "one-token": (16, run.one_token_pair),
}
"""Name, as in run.py -> the adapters' rank, and what is measured; one step has as many tokens as in trainer.py."""

TOKENS = (512, 2048)
"""Of training steps."""

PARTS = ("large products", "thin products", "other operations", "between")
PRODUCTS = {"mm": 0, "bmm": 0, "_linear_pointwise": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""An operation -> which of its inputs is the first factor."""


def parts_of(action: Callable[[], object], rank: int) -> dict[str, float]:
    """Milliseconds of one call, by part."""
    from _common import seconds
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        whole = seconds(action) * 1e3
    found = dict.fromkeys(PARTS, 0.0)
    for entry in profiled.key_averages(group_by_input_shape=True):
        space, _, name = entry.key.rpartition("::")
        if not space or space.startswith(("autograd", "torch::autograd")):
            continue  # a function of autograd, perhaps in Python: what it computes is operations of their own
        first = PRODUCTS.get(name)
        thin = first is not None and is_thin(*entry.input_shapes[first : first + 2], rank)
        found[PARTS[2 if first is None else int(thin)]] += entry.self_cpu_time_total / 1e3
    found["between"] = whole - sum(found.values())
    return found


def is_thin(first: list[int], second: list[int], rank: int) -> bool:
    """Whether a product of these shapes has a side of r, or of a few r stacked; a few rows of an input are no side."""
    sides = [
        second[-1],
        first[-1],
        *([first[-2]] if first[-1] in TOKENS else []),
    ]  # those of gradients sum over tokens
    return any(side in range(rank, 8 * rank + 1, rank) for side in sides)


def work(case: str, threads: int) -> None:
    """In the process of a case: its parts and its floor's, medians of calls in turn."""
    import torch
    from _common import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    rank, pair = CASES[case]
    step, floor = pair()
    for _ in range(3):
        step(), floor()
    rounds = [(parts_of(step, rank), parts_of(floor, rank)) for _ in range(7)]
    print(json.dumps([{part: statistics.median(each[i][part] for each in rounds) for part in PARTS} for i in (0, 1)]))


HEADER = f"""| case | | all | {" | ".join(PARTS)} |
|---|---|---:|{"---:|" * len(PARTS)}"""


def line(case: str, side: str, parts: dict[str, float], floor: dict[str, float]) -> str:
    """A row: each part, and what of it the floor does not take."""
    pairs = [(sum(parts.values()), sum(floor.values())), *((parts[part], floor[part]) for part in PARTS)]
    return f"| {case} | {side} | {' | '.join(f'{ours:.1f} ({ours - base:+.1f})' for ours, base in pairs)} |"


def main() -> None:
    """Parse the command line; measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", help="Python of the environment with the reference library")
    parser.add_argument("--cases", default=",".join(CASES), help="some of the cases, with commas between them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the table to RESULTS.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.threads)
    if unknown := sorted(set(options.cases.split(",")) - set(CASES)):
        parser.error(f"unknown cases {unknown}; there are {[*CASES]}")
    from _common import measured_by, measured_with, write_section

    sides = [("here", sys.executable), *([("reference", given)] if (given := options.reference_python) else [])]
    lines = [*measured_with(options.reference_python, options.threads), "", *HEADER.splitlines()]
    print(HEADER, flush=True)
    for case in options.cases.split(","):
        for side, python in sides:
            if found := measured_by(HERE / "parts.py", python, case, options.threads, side == "here"):
                lines.append(line(case, side, *found))
                print(lines[-1], flush=True)
    if options.write:
        write_section("parts.py", "\n".join(lines))
    return None


if __name__ == "__main__":
    main()
