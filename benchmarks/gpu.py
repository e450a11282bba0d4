"""Steps, mixed batches, decoding and losses on a GPU: the frozen model, this library, a reference library.

    python benchmarks/gpu.py [--reference-python PATH] [--seconds 540] [--write]
    python benchmarks/gpu.py --dry      # every row once, on the CPU, with tiny shapes: to see that it runs

Layers of the shapes of Llama 3.2 1B and Llama 3.1 8B (as many as `SHAPES` says) with random weights in bfloat16,
4 x 1,024 tokens, adapters on all linear layers. Times are medians between events of the card, memory is the most that
was allocated in a step. Each library measures in one process, this one first; rows that begin after ``--seconds`` are
left out, and say so. ``floor`` is the frozen model's step to its input embeddings; decoding is one token of one row,
called and as a CUDA graph. With ``--write`` the table goes to ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
Figures = dict[str, float]
SHAPES: dict[str, dict[str, int]] = {
    "1B": {"layers": 16, "width": 2048, "inner": 8192, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "8B, 8 layers": {"layers": 8, "width": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256},
}
TINY = {"layers": 2, "width": 64, "inner": 96, "heads": 4, "kv_heads": 2, "vocab": 100}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, dropout 0.05": {"lora_dropout": 0.05},
    "DoRA": {"use_dora": True},
}


class Machine:
    """Where it runs: a GPU, or the CPU with tiny shapes (``dry``)."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.device = dry, torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.shapes = {"tiny": TINY} if dry else SHAPES
        self.batch = (2, 8) if dry else (4, 1024)

    def milliseconds(self, action: Callable[[], object], repeats: int = 12) -> float:
        """Median time of a call."""
        if self.dry:
            start = time.perf_counter()
            action()
            return (time.perf_counter() - start) * 1e3
        for _ in range(3):
            action()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def measured(self, action: Callable[[], object]) -> Figures:
        """Milliseconds of a call, and the most memory that it allocates above what there was."""
        figures = {"ms": self.milliseconds(action)}
        if not self.dry:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            action()
            figures["MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return figures

    def model(self, shape: dict[str, int]) -> Any:
        """A frozen model, made where it runs."""
        from _common import llama

        with self.device:
            return llama(**shape, dtype=self.dtype).to(self.device)

    def tokens(self, shape: dict[str, int], rows: int = 0, length: int = 0) -> torch.Tensor:
        """Random ids of a batch."""
        from _common import tokens

        return tokens(rows or self.batch[0], length or self.batch[1], shape["vocab"]).to(self.device)


def ceilings(m: Machine) -> Figures:
    """TFLOP/s of a large product and GB/s of a large copy."""
    size, count = (64, 2**12) if m.dry else (8192, 2**29)
    a = torch.randn(size, size, device=m.device, dtype=m.dtype)
    big = torch.empty(count, device=m.device, dtype=m.dtype)
    other = torch.empty_like(big)
    product, copy = m.milliseconds(lambda: a @ a), m.milliseconds(lambda: other.copy_(big))
    return {"TFLOP/s": 2 * size**3 / product / 1e9, "GB/s": 2 * big.nbytes / copy / 1e6}


def floor(m: Machine, shape: dict[str, int]) -> Figures:
    """The frozen model's step to its input embeddings."""
    from _common import floor_step

    return m.measured(floor_step(m.model(shape).train(), m.tokens(shape)))


def step(m: Machine, shape: dict[str, int], options: dict[str, Any]) -> Figures:
    """A training step."""
    from _common import training_step
    from run import adapted

    model = adapted(m.model(shape), **options).to(m.device)
    return m.measured(training_step(model, m.tokens(shape)))


def saving_step(m: Machine, shape: dict[str, int]) -> Figures:
    """A training step with all savings of memory."""
    from _common import training_step
    from run import adapted

    import peft

    model = adapted(m.model(shape), lora_dropout=0.05).to(m.device)
    peft.enable_memory_savings(model, chunked_loss=True)
    return m.measured(training_step(model, m.tokens(shape)))


def nf4(m: Machine, shape: dict[str, int]) -> Figures:
    """A training step on a base in NF4."""
    from _common import training_step
    from run import adapted
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        m.model(shape).save_pretrained(folder)
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=m.dtype,
            bnb_4bit_use_double_quant=True,
        )
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantisation, dtype=m.dtype, device_map={"": str(m.device)}
        )
    return m.measured(training_step(adapted(base).to(m.device), m.tokens(shape)))


def decode(m: Machine, shape: dict[str, int], with_adapter: bool) -> Figures:
    """One token of one row, called and as a CUDA graph."""
    from run import adapted

    base = m.model(shape)
    model = (adapted(base) if with_adapter else base).to(m.device).eval()
    ids = m.tokens(shape, 1, 1)

    def call() -> Any:
        return model(input_ids=ids, use_cache=False).logits

    with torch.no_grad():
        figures = {"ms": m.milliseconds(call)}
        if not m.dry:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            figures["graph ms"] = m.milliseconds(graph.replay)
    return figures


def mixed(m: Machine, length: int) -> Figures:
    """32 rows with 16 adapters of rank 16 in one layer: with its kernel, one adapter after another, the base alone."""
    from torch import nn

    from peft import LoraConfig, get_peft_model
    from peft.kernels import plain

    rows, count, width = (4, 3, 32) if m.dry else (32, 16, 4096)
    config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(width, width)).to(m.device, m.dtype), config)
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    model.to(m.device).eval()
    x = torch.randn(rows, length, width, device=m.device, dtype=m.dtype)
    names = ["default" if i % count == 0 else f"a{i % count}" for i in range(rows)]
    base = model.base_model.model[0].base_layer
    with torch.no_grad():
        kernel = m.milliseconds(lambda: model(x, adapter_names=names))
        with plain():
            loop = m.milliseconds(lambda: model(x, adapter_names=names))
        return {"ms": kernel, "loop ms": loop, "base ms": m.milliseconds(lambda: base(x))}


def loss(m: Machine, own: bool) -> Figures:
    """The loss of a batch from its hidden states, forward and backward: in chunks here, or by Liger's kernel."""
    from peft.kernels import loss as chunked

    (shape,) = list(m.shapes.values())[:1]
    n, d, vocab = m.batch[0] * m.batch[1], shape["width"], shape["vocab"]
    hidden = torch.randn(n, d, device=m.device, dtype=m.dtype, requires_grad=True)
    weight = torch.randn(vocab, d, device=m.device, dtype=m.dtype) * 0.02
    labels = torch.randint(vocab, (n,), device=m.device)
    found = chunked._liger
    if not own and found() is None:
        raise ImportError("liger-kernel is not installed")
    chunked._liger = (lambda: None) if own else found
    try:
        return m.measured(lambda: chunked.chunked_cross_entropy(hidden, weight, labels).backward())
    finally:
        chunked._liger = found


def cases(m: Machine, ours: bool) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """The rows of a library, the dear ones last."""
    if ours:
        yield "ceilings", lambda: ceilings(m)
        for length in (1, 32, 256):
            yield f"mixed batch, {length} tokens a row", lambda length=length: mixed(m, length)
        for own, name in ((True, "in chunks"), (False, "Liger")):
            yield f"loss, {name}", lambda own=own: loss(m, own)
    for name, shape in m.shapes.items():
        if ours:
            yield f"{name}: floor", lambda shape=shape: floor(m, shape)
            yield f"{name}: token, base", lambda shape=shape: decode(m, shape, False)
        yield f"{name}: token, LoRA", lambda shape=shape: decode(m, shape, True)
        for method, options in METHODS.items():
            yield f"{name}: {method}", lambda shape=shape, options=options: step(m, shape, options)
        yield f"{name}: LoRA on NF4", lambda shape=shape: nf4(m, shape)
        if ours:
            yield f"{name}: LoRA, dropout 0.05, all savings", lambda shape=shape: saving_step(m, shape)


def work(m: Machine, ours: bool, until: float) -> Iterator[tuple[str, Figures | str]]:
    """Measure the rows of a library; a row that fails says why, and the others go on."""
    for name, measure in cases(m, ours):
        if time.time() > until:
            yield name, "left out: no time left"
            continue
        try:
            yield name, measure()
        except Exception as error:
            yield name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not m.dry:
            torch.cuda.empty_cache()


def rows_of(python: str, ours: bool, dry: bool, until: float) -> Iterator[tuple[str, Figures | str]]:
    """The rows of a library, from a process of its own, as they come."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if ours:
        environment["PYTHONPATH"] = str(HERE.parent / "src")
    command = [python, str(HERE / "gpu.py"), "--worker", str(until)] + ["--ours"] * ours + ["--dry"] * dry
    process = subprocess.Popen(command, env=environment, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("["):
            name, figures = json.loads(line)
            yield name, figures
    if process.wait():
        yield f"the process of {python}", f"ended with {process.returncode}"


def table(here: dict[str, Figures | str], there: dict[str, Figures | str]) -> list[str]:
    """The rows in Markdown, with the ratio of milliseconds to the reference's."""

    def shown(figures: Figures | str | None) -> str:
        if not isinstance(figures, dict):
            return figures or "-"
        return ", ".join(f"{value:,.2f} {unit}" for unit, value in figures.items())

    lines = ["| case | here | reference | here / reference |", "|---|---|---|---:|"]
    for name in [*here, *(name for name in there if name not in here)]:
        a, b = here.get(name), there.get(name)
        times = [figures.get("ms") if isinstance(figures, dict) else None for figures in (a, b)]
        ratio = f"{times[0] / times[1]:.2f}" if times[0] and times[1] else "-"
        lines.append(f"| {name} | {shown(a)} | {shown(b)} | {ratio} |")
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", help="Python of the environment with the reference library")
    parser.add_argument("--seconds", type=float, default=540, help="for all rows; what begins later is left out")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes, each row once")
    parser.add_argument("--write", action="store_true", help="write the table to RESULTS.md")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU that torch can use; there is none here. --dry runs without.")
    if options.worker is not None:
        for row in work(Machine(options.dry), options.ours, options.worker):
            print(json.dumps(row), flush=True)
        return
    start = time.time()
    half = options.seconds * (0.6 if options.reference_python else 1)
    found: list[dict[str, Figures | str]] = [{}, {}]
    for i, python in enumerate((sys.executable, options.reference_python)):
        until = start + (half if i == 0 else options.seconds)
        for name, figures in rows_of(python, i == 0, options.dry, until) if python else ():
            found[i][name] = figures
            print("here" if i == 0 else "reference", name, figures, flush=True)
    card = "the CPU, dry" if options.dry else torch.cuda.get_device_name()
    lines = [f"On {card}.", "", *table(*found)]
    print("\n".join(lines))
    if options.write:
        from _common import write_section

        write_section("gpu.py", "\n".join(lines))


if __name__ == "__main__":
    main()
