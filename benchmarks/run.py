"""Each case of the table of targets, here and in a reference library, in turn and in fresh processes.

    python benchmarks/run.py --reference-python PATH [--cases step,load-30th] [--rounds 3] [--threads 2] [--clock cpu]

``PATH`` is the Python of an environment that has the reference. Without it only this library is measured. Results
go to ``benchmarks/RESULTS.md`` (between the marks there) unless ``--cases`` picks some: those are printed only,
or written too with ``--write``. A case is a function below that returns named figures; those called ``floor...`` are
what the same process measured on the frozen base model (or on the same batch with one adapter).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
Figures = dict[str, float]


@dataclass
class Case:
    """One row of the table: how it is measured, and what is aimed at.

    Attributes:
        measure: returns ``value`` (seconds; bytes where ``unit`` is "B") and perhaps ``floor`` of the same process.
        to_floor, to_reference: the largest ratios aimed at, or None.
    """

    name: str
    what: str
    measure: Callable[[], Figures]
    unit: str = "s"
    to_floor: float | None = None
    to_reference: float | None = None


# --- steps and bytes -----------------------------------------------------------------------------------------
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]


def adapted(base: Any, targets: list[str] = LINEARS, **options: Any) -> Any:
    """The base model with one LoRA whose B is not zero."""
    import torch

    from peft import LoraConfig, get_peft_model

    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, **options}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **settings))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model.train()


Pair = tuple[Callable[[], object], Callable[[], object]]
"""What is measured, and its floor."""


def step_pair(dtype: str = "float32", rows: int = 4, length: int = 128, **options: Any) -> Pair:
    """A training step, and the frozen model's forward and backward to its input embeddings."""
    import torch
    from _common import floor_step, llama, tokens, training_step

    kind, ids = getattr(torch, dtype), tokens(rows, length)
    floor = floor_step(llama(dtype=kind).train(), ids)
    return training_step(adapted(llama(dtype=kind), **options), ids), floor


def beside_floor(pair: Callable[[], Pair], **turns: int) -> Callable[[], Figures]:
    """The case of a pair, measured in turn."""

    def measure() -> Figures:
        from _common import in_turn, ratio

        ours, floor = in_turn(*pair(), **turns)
        return {"value": statistics.median(ours), "floor": statistics.median(ours) / ratio(ours, floor)}

    return measure


def step_case(dtype: str = "float32", **options: Any) -> Callable[[], Figures]:
    turns = {} if dtype == "float32" else {"repeats": 3, "warm": 1}
    return beside_floor(lambda: step_pair(dtype, **options), **turns)


def bytes_case(dtype: str = "float32", **options: Any) -> Callable[[], Figures]:
    """Bytes that autograd keeps for a training step, and for the frozen model's."""

    def measure() -> Figures:
        import torch
        from _common import floor_step, llama, saved_bytes, tokens, training_step

        base = llama(dtype=getattr(torch, dtype)).train()
        ids = tokens()
        floor = saved_bytes(floor_step(base, ids), base)
        model = adapted(base, **options)
        return {"value": saved_bytes(training_step(model, ids), model), "floor": floor}

    return measure


def nf4_pair() -> Pair:
    """A training step on a base in NF4, and that of the frozen base."""
    import torch
    from _common import floor_step, llama, tokens, training_step
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        base, frozen = (
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)
            for _ in range(2)
        )
    return training_step(adapted(base), tokens()), floor_step(frozen.train(), tokens())


def step_compiled() -> Figures:
    """A step of one block, compiled whole for any length, of texts of two lengths; the floor is the eager step."""
    import torch
    from _common import in_turn, llama, ratio, tokens, training_step

    models = [adapted(llama(layers=1)) for _ in range(2)]
    models[1] = torch.compile(models[1], fullgraph=True, dynamic=True)
    steps = [[training_step(model, tokens(4, length)) for length in (128, 96)] for model in models]
    eager, compiled = (lambda pair=pair: [step() for step in pair] for pair in steps)
    found = in_turn(compiled, eager, warm=3)
    return {"value": statistics.median(found[0]), "floor": statistics.median(found[0]) / ratio(*found)}


# --- life cycle ----------------------------------------------------------------------------------------------
def saved_adapter(folder: str, **shape: Any) -> None:
    """A LoRA of rank 8 on all linear layers of a LLaMA-shaped model, on disk."""
    from _common import llama

    adapted(llama(**shape), r=8).save_pretrained(folder)


DEEP = {"layers": 24, "width": 256, "inner": 688, "heads": 8, "kv_heads": 8, "vocab": 1000}


def with_adapters(count: int, **shape: Any) -> tuple[Any, list[float]]:
    """A model with ``count`` adapters loaded from disk, and the seconds that each took."""
    import torch
    from _common import llama, seconds

    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        saved_adapter(folder, **shape)
        base, found = llama(**shape), []
        times = [seconds(lambda: found.append(PeftModel.from_pretrained(base, folder, adapter_name="a0")))]
        model = found[0]
        for i in range(1, count):
            times.append(seconds(lambda i=i: model.load_adapter(folder, f"a{i}")))
    torch.manual_seed(2)
    return model, times


def load_first() -> Figures:
    """The first adapter, onto 168 modules."""
    return {"value": statistics.median(with_adapters(1, **DEEP)[1][0] for _ in range(4))}


def load_thirtieth() -> Figures:
    """The thirtieth adapter beside 29 others."""
    return {"value": statistics.median(with_adapters(31, **DEEP)[1][28:])}


def switch() -> Figures:
    """Switching between two of 31 adapters."""
    from _common import seconds

    model, _ = with_adapters(31, **DEEP)
    times = []
    for i in range(30):
        times.append(seconds(lambda i=i: model.set_adapter(f"a{i % 31}")))
    return {"value": statistics.median(times)}


def step_many() -> Figures:
    """A training step with 29 inactive adapters beside the active one; the floor is the same step without them."""
    from _common import in_turn, ratio, tokens, training_step

    few, many = (with_adapters(count, **{**DEEP, "layers": 8})[0].train() for count in (1, 30))
    for model in (few, many):
        model.set_adapter("a0")
    ids = tokens(2, 64, 1000)
    times = in_turn(training_step(many, ids), training_step(few, ids), repeats=31)
    return {"value": statistics.median(times[0]), "floor": statistics.median(times[0]) / ratio(*times)}


def delete() -> Figures:
    """Deleting an inactive adapter of 31."""
    from _common import seconds

    model, _ = with_adapters(31, **DEEP)
    return {"value": statistics.median(seconds(lambda i=i: model.delete_adapter(f"a{i}")) for i in range(10, 20))}


def inject() -> Figures:
    """A LoRA on 560 modules."""
    from _common import llama, seconds

    from peft import LoraConfig, get_peft_model

    times = []
    for _ in range(4):
        base = llama(layers=80, width=64, inner=128, heads=4, kv_heads=4, vocab=100)
        config = LoraConfig(r=8, target_modules=LINEARS, task_type="CAUSAL_LM")
        times.append(seconds(lambda base=base, config=config: get_peft_model(base, config)))
    return {"value": statistics.median(times[1:])}


def merge_time() -> Figures:
    """merge_and_unload of 168 modules."""
    from _common import llama, seconds

    times = []
    for _ in range(3):
        model = adapted(llama(layers=24))
        times.append(seconds(model.merge_and_unload))
    return {"value": statistics.median(times)}


def merge_memory() -> Figures:
    """By how much the process grows while 168 modules are merged."""
    from _common import PeakMemory, llama

    model = adapted(llama(layers=24))
    with PeakMemory() as memory:
        model.merge_and_unload()
    return {"value": max(memory.bytes, 1)}


def import_time() -> Figures:
    """``import peft`` where torch is imported already."""
    import torch  # noqa: F401

    start = time.perf_counter()
    import peft  # noqa: F401

    return {"value": time.perf_counter() - start}


# --- inference -----------------------------------------------------------------------------------------------
def inference_model() -> Any:
    """Eight adapters of rank 16 on all linear layers."""
    import torch
    from _common import llama

    from peft import LoraConfig

    model = adapted(llama())
    for i in range(1, 8):
        model.add_adapter(
            f"a{i}", LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"), False
        )
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model.eval()


def mixed_pair(length: int) -> Pair:
    """Sixteen rows of ``length`` tokens, two for each of eight adapters, and the same rows with one adapter."""
    import torch
    from _common import tokens

    model, ids = inference_model(), tokens(16, length)
    names = [("default" if i % 8 == 0 else f"a{i % 8}") for i in range(16)]
    no_grad = torch.no_grad()
    return no_grad(lambda: model(input_ids=ids, adapter_names=names)), no_grad(lambda: model(input_ids=ids))


def mixed_case(length: int) -> Callable[[], Figures]:
    return beside_floor(lambda: mixed_pair(length), repeats=41, warm=4)


def one_token_pair() -> Pair:
    """One token for one row with an unmerged adapter, and by the base model."""
    import torch
    from _common import llama, tokens

    base, model, ids = llama().eval(), inference_model(), tokens(1, 1)
    no_grad = torch.no_grad()
    return no_grad(lambda: model(input_ids=ids)), no_grad(lambda: base(input_ids=ids))


one_token = beside_floor(one_token_pair, repeats=81, warm=6)


def of_many(function: str, *given: Any) -> Callable[[], Figures]:
    """A case of many.py, which imports what not every case needs."""

    def measure() -> Figures:
        import many

        return getattr(many, function)(*given)

    return measure


CASES = [
    Case("step", "step, r 16 on all linear layers", step_case(), to_floor=1.08, to_reference=0.93),
    Case("step-dropout", "the same with dropout 0.05", step_case(lora_dropout=0.05), to_floor=1.18),
    Case("step-bfloat16", "the same in bfloat16", step_case("bfloat16"), to_floor=1.15),
    Case("step-dora", "the same with DoRA", step_case(use_dora=True), to_floor=1.22),
    Case("step-qv", "step, r 8 on q and v", step_case(targets=["q_proj", "v_proj"], r=8), to_floor=1.02),
    Case("bytes", "bytes saved by autograd, r 16 on all linear layers", bytes_case(), "B", to_floor=1.25),
    Case("bytes-dropout", "the same with dropout 0.05", bytes_case(lora_dropout=0.05), "B", to_floor=1.25),
    Case("bytes-bfloat16", "the same in bfloat16", bytes_case("bfloat16"), "B", to_floor=1.3),
    Case("bytes-dora", "the same with DoRA", bytes_case(use_dora=True), "B", to_floor=1.25),
    Case("step-nf4", "NF4 base, step, r 16 on all linear layers", beside_floor(nf4_pair), to_reference=0.97),
    Case("step-compiled", "step of one block, compiled; floor: eager", step_compiled, to_floor=1.0),
    Case("load-first", "load the first adapter (24 layers, 168 modules)", load_first, to_reference=0.2),
    Case("load-30th", "load the 30th adapter", load_thirtieth, to_reference=0.03),
    Case("switch", "switch among 31 adapters", switch, to_reference=0.1),
    Case("step-many", "step with 30 adapters present; floor: with one", step_many, to_floor=1.03),
    Case("delete", "delete one of 31 adapters", delete),
    Case("inject", "inject into 560 modules", inject, to_reference=0.35),
    Case("merge", "merge_and_unload, 168 modules", merge_time),
    Case("merge-memory", "memory that merge_and_unload takes, 168 modules", merge_memory, "B"),
    Case("import", "import peft after torch", import_time),
    Case("mixed-1", "mixed batch, 16 rows, 8 adapters, one token", mixed_case(1), to_floor=1.5, to_reference=0.5),
    Case("mixed-32", "mixed batch, 16 rows, 8 adapters, 32 tokens", mixed_case(32), to_floor=1.15),
    Case("one-token", "one token, one adapter, unmerged", one_token, to_floor=1.15),
    Case(
        "together-32",
        "8 adapters trained together, 32 tokens of each; floor: alone",
        of_many("together", 32),
        to_floor=0.67,
    ),
    Case("together-128", "the same, 128 tokens of each", of_many("together", 128), to_floor=0.67),
    Case(
        "pool-1",
        "64 of 2,000 adapters (q and v), 64 rows, one token; floor: one adapter",
        of_many("served", 1, QV),
        to_floor=1.6,
    ),
    Case("pool-16", "the same, 16 tokens", of_many("served", 16, QV), to_floor=1.6),
    Case("pool-all", "the same, adapters on all linear layers", of_many("served", 16, LINEARS), to_floor=1.6),
    Case(
        "pool-load",
        "an adapter into a full pool; reference: its 30th",
        of_many("brought", load_thirtieth, DEEP),
        to_reference=0.03,
    ),
]


# --- running -------------------------------------------------------------------------------------------------
def run_case(python: str, case: str, threads: int, ours: bool) -> Figures:
    """The figures of a case, measured in a process of its own; none if it fails."""
    from _common import measured_by

    return measured_by(HERE / "run.py", python, case, threads, ours) or {}


def work(case: str, threads: int) -> None:
    """In the process of a case: measure it and print the figures."""
    if case != "import":
        import torch

        torch.set_num_threads(threads)
    figures = next(c for c in CASES if c.name == case).measure()
    print(json.dumps(figures))


@dataclass
class Row:
    """The measured ratios of a case, medians over the rounds."""

    case: Case
    ours: float
    reference: float | None
    to_reference: float | None
    to_floor: float | None
    reference_to_floor: float | None

    def met(self) -> str:
        """Whether every target is met; a dash where there is none or it was not measured."""
        pairs = [(self.to_floor, self.case.to_floor), (self.to_reference, self.case.to_reference)]
        checks = [got <= target for got, target in pairs if got is not None and target is not None]
        return "-" if not checks else "yes" if all(checks) else "no"

    def line(self) -> str:
        """The row in Markdown."""
        targets = [(self.case.to_floor, "x floor"), (self.case.to_reference, "x reference")]
        target = ", ".join(f"{t:g} {name}" for t, name in targets if t is not None) or "-"
        cells = [self.case.what, target, amount(self.ours, self.case.unit), amount(self.reference, self.case.unit)]
        cells += [number(self.to_reference), number(self.to_floor), number(self.reference_to_floor), self.met()]
        return f"| {' | '.join(cells)} |"


def amount(value: float | None, unit: str) -> str:
    """Seconds or bytes for a reader."""
    if value is None:
        return "-"
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def number(value: float | None) -> str:
    """A ratio for a reader."""
    return "-" if value is None else f"{value:.3g}" if value < 0.1 else f"{value:.2f}"


def measured(case: Case, reference: str | None, rounds: int, threads: int) -> Row | None:
    """A case in both libraries, in turn; None if it fails here."""
    pairs = []
    for _ in range(1 if case.unit == "B" and case.name != "merge-memory" else rounds):
        ours = run_case(sys.executable, case.name, threads, True)
        if not ours:
            return None
        pairs.append((ours, run_case(reference, case.name, threads, False) if reference else {}))

    def middle(values: list[float]) -> float | None:
        return statistics.median(values) if values else None

    theirs = [b for _, b in pairs if b]
    return Row(
        case,
        statistics.median(a["value"] for a, _ in pairs),
        middle([b["value"] for b in theirs]),
        middle([a["value"] / b["value"] for a, b in pairs if b]),
        middle([a["value"] / a["floor"] for a, _ in pairs if "floor" in a]),
        middle([b["value"] / b["floor"] for b in theirs if "floor" in b]),
    )


HEADER = """| case | target | here | reference | here / reference | here / floor | reference / floor | met |
|---|---|---:|---:|---:|---:|---:|---|"""


def report(rows: list[Row], options: argparse.Namespace) -> str:
    """The table in Markdown, with the machine and the versions."""
    from _common import measured_with

    head = measured_with(options.reference_python, options.threads)
    about = f"{options.rounds} round{'s' * (options.rounds > 1)} of fresh processes in turn."
    return "\n".join([*head, about, "", HEADER, *(row.line() for row in rows)])


def main() -> None:
    """Parse the command line; measure, print and write."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", help="Python of the environment with the reference library")
    parser.add_argument("--cases", help=f"some of: {','.join(names)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], help="cpu: CPU time, on a machine with other work")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md although not all cases are measured")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clock:
        os.environ["BENCHMARK_CLOCK"] = options.clock
    if options.worker:
        work(options.worker, options.threads)
        return
    chosen = options.cases.split(",") if options.cases else names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"unknown cases {unknown}; there are {names}")
    rows = []
    print(HEADER, flush=True)
    for case in (c for c in CASES if c.name in chosen):
        row = measured(case, options.reference_python, options.rounds, options.threads)
        if row is not None:
            rows.append(row)
            print(row.line(), flush=True)
    if options.write or not options.cases:
        from _common import write_section

        write_section("run.py", report(rows, options))


if __name__ == "__main__":
    main()
