"""The kernels on a GPU, beside plain torch, a reference library and what the card can do.

    python benchmarks/gpu.py [--reference-python PATH]

Prints the card's measured ceilings (products and copies in bfloat16), mixed batches through the Triton kernel and
through a loop, and a training step beside the frozen base model's, here and in the reference's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def milliseconds(action: Callable[[], object], repeats: int = 30) -> float:
    """Median time of a call on the card."""
    for _ in range(5):
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


def ceilings() -> dict[str, float]:
    """TFLOP/s of a large product and GB/s of a large copy, in bfloat16."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(2**29, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(big)
    product, copy = milliseconds(lambda: a @ a), milliseconds(lambda: other.copy_(big))
    return {"TFLOP/s": 2 * 8192**3 / product / 1e9, "GB/s": 2 * big.nbytes / copy / 1e6}


def step() -> dict[str, float]:
    """A bfloat16 training step of a LLaMA-shaped model beside the frozen base's; runs in either library."""
    from _common import floor_step, llama, tokens, training_step
    from run import adapted

    shape = {"layers": 8, "width": 2048, "inner": 5632, "heads": 16, "kv_heads": 4, "vocab": 32000}
    ids = tokens(8, 512, 32000).cuda()
    floor = floor_step(llama(**shape, dtype=torch.bfloat16).cuda().train(), ids)
    ours = training_step(adapted(llama(**shape, dtype=torch.bfloat16)).cuda(), ids)
    return {"step ms": milliseconds(ours), "floor ms": milliseconds(floor)}


def mixed(length: int) -> dict[str, float]:
    """32 rows with 16 adapters of rank 16 in one 4096 x 4096 layer: kernel, loop, and the base layer alone."""
    from torch import nn

    from peft import LoraConfig, get_peft_model
    from peft.kernels import plain

    config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4096, 4096)).to("cuda", torch.bfloat16), config)
    for i in range(1, 16):
        model.add_adapter(f"a{i}", config)
    model.eval()
    x = torch.randn(32, length, 4096, device="cuda", dtype=torch.bfloat16)
    names = ["default" if i % 16 == 0 else f"a{i % 16}" for i in range(32)]
    base = model.base_model.model[0].base_layer
    with torch.no_grad():
        kernel = milliseconds(lambda: model(x, adapter_names=names))
        with plain():
            loop = milliseconds(lambda: model(x, adapter_names=names))
        return {"kernel ms": kernel, "loop ms": loop, "base ms": milliseconds(lambda: base(x))}


def step_in(python: str, ours: bool) -> dict[str, float]:
    """:func:`step` in a fresh process of another environment."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if ours:
        environment["PYTHONPATH"] = str(HERE.parent / "src")
    command = [python, str(HERE / "gpu.py"), "--worker"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=tempfile.gettempdir(), check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", help="Python of the environment with the reference library")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU that torch can use; there is none here.")
    if options.worker:
        print(json.dumps(step()))
        return
    rows = {"card": torch.cuda.get_device_name(), "ceilings": ceilings()}
    rows |= {f"mixed batch, {n} tokens a row": mixed(n) for n in (1, 32, 256)}
    rows["training step, here"] = step_in(sys.executable, True)
    if options.reference_python:
        rows["training step, reference"] = step_in(options.reference_python, False)
    for name, figures in rows.items():
        shown = figures if isinstance(figures, str) else ", ".join(f"{k} {v:.2f}" for k, v in figures.items())
        print(f"{name}: {shown}")


if __name__ == "__main__":
    main()
