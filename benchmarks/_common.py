"""What the benchmarks share: models, timing in turn, bytes that autograd keeps, peak memory, machine and versions.

Runs with this library and with any other that has the same public API, so nothing but that is imported here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


HERE = Path(__file__).resolve().parent


def llama(
    layers: int = 6,
    width: int = 576,
    inner: int = 1536,
    heads: int = 9,
    kv_heads: int = 3,
    vocab: int = 2000,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A frozen LLaMA-shaped model with random weights, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def tokens(rows: int = 4, length: int = 128, vocab: int = 2000) -> torch.Tensor:
    """Random token ids ``[rows, length]``, always the same."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def training_step(model: nn.Module, ids: torch.Tensor, **kwargs: Any) -> Callable[[], torch.Tensor]:
    """Forward and backward of a causal LM; the gradients are dropped before the next step."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> torch.Tensor:
        for p in trained:
            p.grad = None
        loss = model(input_ids=ids, labels=ids, **kwargs).loss
        loss.backward()
        return loss

    return step


def floor_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward and backward of a frozen causal LM to its input embeddings: what no training can go below."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> torch.Tensor:
        embeddings.grad = None
        loss = model(inputs_embeds=embeddings, labels=ids).loss
        loss.backward()
        return loss

    return step


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call, or CPU time of this process where the environment says ``BENCHMARK_CLOCK=cpu``."""
    clock = time.process_time if os.environ.get("BENCHMARK_CLOCK") == "cpu" else time.perf_counter
    start = clock()
    action()
    return clock() - start


def keep_freed_memory() -> None:
    """Make the allocator keep what is freed, for the next step to use.

    How much glibc keeps depends on the largest block below 32 MB that the process has ever freed; without one, a step
    spends up to a tenth of its time on pages that it gave back a moment before, by chance in one library or the other.
    """
    torch.ones(31 << 18)


def in_turn(*actions: Callable[[], object], repeats: int = 15, warm: int = 2) -> list[list[float]]:
    """Seconds of each action in each round; a drifting machine slows all of them alike."""
    keep_freed_memory()
    for _ in range(warm):
        for action in actions:
            action()
    rounds = [[seconds(action) for action in actions] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds)]


def ratio(ours: Iterable[float], others: Iterable[float]) -> float:
    """Median of the ratios of what was measured side by side."""
    return statistics.median(a / b for a, b in zip(ours, others))


def saved_bytes(step: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd keeps between forward and backward, the model's own tensors left out, each storage once."""
    kept: dict[int, int] = {}
    holders: list[torch.Tensor] = []  # keeps the storages alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in kept:
                kept[storage.data_ptr()] = storage.nbytes()
                holders.append(part.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


class PeakMemory(AbstractContextManager):
    """Samples this process's resident memory; ``bytes`` is by how much it rose at most."""

    bytes = 0

    def __enter__(self) -> PeakMemory:
        self._start = self._peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.0005):
            self._peak = max(self._peak, resident())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._peak, resident()) - self._start


def resident() -> int:
    """Resident memory of this process in bytes (Linux; 0 elsewhere)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def environment(threads: int, ours: bool) -> dict[str, str]:
    """The environment of a process that measures this library, or another one."""
    values = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    values.pop("PYTHONPATH", None)
    if ours:
        values["PYTHONPATH"] = str(HERE.parent / "src")
    return values


def measured_by(script: Path, python: str, case: str, threads: int, ours: bool, *options: str) -> Any:
    """What a benchmark's ``--worker`` prints last, in a process of its own; None if it fails, and says why.

    Args:
        script: the benchmark's file. case: what it measures. ours: whether it imports this library.
    """
    command = [python, str(script), "--worker", case, "--threads", str(threads), *options]
    done = subprocess.run(
        command, env=environment(threads, ours), capture_output=True, text=True, cwd=tempfile.gettempdir()
    )
    if done.returncode:
        print(f"{case} failed in {python}:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> str:
    """The processor, and how many cores may be used."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def measured_with(reference: str | None, threads: int) -> list[str]:
    """Lines on the day, the machine and the versions, for a report."""
    lines = [
        f"Measured {date.today():%Y-%m-%d} on {machine()}, {threads} thread{'s' * (threads > 1)}.",
        f"Here: {versions('torch', 'transformers', 'bitsandbytes')}.",
    ]
    if reference:
        code = "from _common import versions; print(versions('peft', 'torch', 'transformers', 'bitsandbytes'))"
        done = subprocess.run([reference, "-c", code], capture_output=True, text=True, cwd=HERE)
        lines.append(f"Reference: {done.stdout.strip() or 'unknown versions'}.")
    return lines


def write_section(name: str, text: str) -> None:
    """Put a text between the marks of a section in RESULTS.md; what else stands there is kept."""
    path, start, end = HERE / "RESULTS.md", f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = path.read_text() if path.exists() else "# Results\n"
    if start not in old:
        old = f"{old}\n{start}\n{end}\n"
    before, _, rest = old.partition(start)
    path.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")


def versions(*packages: str) -> str:
    """Versions of the packages that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
