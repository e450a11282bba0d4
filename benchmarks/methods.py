"""What a training step costs with each weight method, as a ratio to the frozen base model's step.

    python benchmarks/methods.py [--reference-python PATH] [--methods lora,oft] [--json FILE] [--threads 2]

A LLaMA-shaped model of 6 layers, width 576, 9 heads (3 key-value), 1,536 inner, a vocabulary of 2,000, float32, with
random weights; 4 x 128 tokens; the method on all linear layers of the blocks, with the hyperparameters of its paper
(`HYPERPARAMETERS`, `METHODS`). The floor is the frozen model's forward and backward to its input embeddings. Each
library measures in a process of its own, and the two take turns, repetition by repetition. Methods that one side does
not have, or that cannot be on such layers, have no figures there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "lora_alpha": 32},
    "adalora": {"init_r": 12, "target_r": 8, "total_step": 1000, "tinit": 0, "tfinal": 0},
    "adamss": {"r": 100, "num_subspaces": 5, "subspace_rank": 1},
    "boft": {"boft_block_size": 4, "boft_n_butterfly_factor": 1},
    "c3a": {"block_size": 96},
    "delora": {"r": 32},
    "fourierft": {"n_frequency": 1000},
    "frod": {},
    "gralora": {"r": 32, "alpha": 64, "gralora_k": 2},
    "hira": {"r": 32},
    "hra": {"r": 8},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "lily": {"r": 32, "stride_A": 2, "num_B": 3},
    "loha": {"r": 8, "alpha": 16},
    "lokr": {"r": 8, "alpha": 16},
    "miss": {"r": 64},
    "oft": {"oft_block_size": 32},
    "osf": {},
    "peanut": {"r": 32, "depth": 0},
    "poly": {"r": 8, "n_tasks": 4, "n_skills": 4},
    "psoft": {"r": 46, "psoft_alpha": 46},
    "pvera": {"r": 256},
    "randlora": {"r": 32, "randlora_alpha": 640},
    "road": {"variant": "road_1"},
    "shira": {"r": 32},
    "supertuning": {"sparsity": 0.99},
    "tinylora": {"r": 2, "u": 64},
    "unilora": {"r": 4, "theta_d_length": 23040},
    "vblora": {"r": 4, "num_vectors": 90, "vector_length": 96},
    "vera": {"r": 256},
    "waveft": {"n_frequency": 2592},
}
"""Fields of a method's config where its defaults are not those of its paper, or stand here to be seen."""

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora[dora]": ("lora", {**HYPERPARAMETERS["lora"], "use_dora": True}),
    "boft[factors]": ("boft", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "miss[bat]": ("miss", {"r": 64, "init_weights": "bat"}),
    "ln_tuning": ("ln_tuning", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "trainable_tokens": ("trainable_tokens", {"token_indices": list(range(10)), "target_modules": ["embed_tokens"]}),
}
"""Rows of their own: what is measured -> registered method and fields."""

OFTEN_ELSEWHERE = {"beft": {"target_modules": ["v_proj"]}}
"""Methods whose paper puts them on other layers."""


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every registered weight method, and the rows above: name -> registered method and fields of its config."""
    import peft.tuners  # noqa: F401
    from peft.core.tuner import BaseTuner
    from peft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING

    found = {}
    for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if isinstance(tuner, type) and issubclass(tuner, BaseTuner) and key != "XLORA":  # it weighs other adapters
            name = str(getattr(key, "value", key)).lower()
            found[name] = name, {**HYPERPARAMETERS.get(name, {}), **OFTEN_ELSEWHERE.get(name, {})}
    return {**found, **{row: what for row, what in METHODS.items() if what[0] in found}}


def adapted(method: str, fields: dict[str, Any]) -> Any:
    """The model with one adapter in training, moved off its start so that no factor is zero."""
    import torch
    from _common import llama

    from peft import get_peft_config, get_peft_model

    config = get_peft_config(
        {"peft_type": method.upper(), "task_type": "CAUSAL_LM", "target_modules": LINEARS, **fields}
    )
    model = get_peft_model(llama(), config).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.01)
    return model


def work(method: str, fields: dict[str, Any], threads: int) -> None:
    """In a process of one library: the bytes and counts once, then a pair of times for each line of input."""
    import torch
    from _common import floor_step, llama, saved_bytes, seconds, tokens, training_step

    torch.set_num_threads(threads)
    ids, base = tokens(), llama().train()
    floor = floor_step(base, ids)
    try:
        model = adapted(method, fields)
        extra = {"task_ids": torch.zeros(len(ids), dtype=torch.long)} if method == "poly" else {}
        step = training_step(model, ids, **extra)
        step()
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    figures = {"trainable": trained, "bytes": saved_bytes(step, model), "floor_bytes": saved_bytes(floor, base)}
    floor()
    print(json.dumps(figures), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"step": seconds(step), "floor": seconds(floor)}), flush=True)


class Library:
    """A process that measures one method with one library."""

    def __init__(self, python: str, ours: bool, method: str, fields: dict[str, Any], threads: int) -> None:
        from _common import environment

        command = [python, str(HERE / "methods.py"), "--worker", json.dumps([method, fields])]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            env=environment(threads, ours),
            cwd=tempfile.gettempdir(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.facts = self._read()
        self.times: list[dict[str, float]] = []

    def _read(self) -> dict[str, Any]:
        for line in self.process.stdout or ():
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        return {"error": (self.log.read().strip().splitlines() or ["ended without a word"])[-1]}

    @property
    def works(self) -> bool:
        return "error" not in self.facts

    def measure(self) -> None:
        """One more repetition."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.times.append(self._read())

    def close(self) -> dict[str, Any]:
        """End the process; its figures."""
        from _common import ratio

        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.log.close()
        if not self.works:
            return self.facts
        steps, floors = ([each[key] for each in self.times] for key in ("step", "floor"))
        return {
            "trainable": self.facts["trainable"],
            "seconds": statistics.median(steps),
            "step": ratio(steps, floors),
            "bytes": self.facts["bytes"] / self.facts["floor_bytes"],
        }


def measured(
    method: str, fields: dict[str, Any], reference: str | None, threads: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Figures of both libraries ("here", "reference"), whose repetitions take turns."""
    from _common import ratio

    here = Library(sys.executable, True, method, fields, threads)
    libraries = {"here": here}
    if reference and here.works:
        libraries["reference"] = Library(reference, False, method, fields, threads)
    working = [library for library in libraries.values() if library.works]
    for _ in range(repeats if here.works else 0):
        for library in working:
            library.measure()
    figures = {name: library.close() for name, library in libraries.items()}
    if len(working) == 2:
        first, second = ([each["step"] for each in library.times] for library in working)
        figures["here"]["to_reference"] = ratio(first, second)
    return figures


HEADER = """| method | trained | step / floor | reference | here / reference | bytes / floor | reference |
|---|---:|---:|---:|---:|---:|---:|"""


def line(row: str, figures: dict[str, dict[str, Any]]) -> str:
    """A row of the table in Markdown."""
    here, other = figures["here"], figures.get("reference", {})
    if "error" in here:
        return f"| {row} | {here['error'].splitlines()[0]} | | | | | |"

    def cell(values: dict[str, Any], key: str) -> str:
        return f"{values[key]:.2f}" if key in values else "-"

    cells = [row, f"{here['trainable']:,}", cell(here, "step"), cell(other, "step"), cell(here, "to_reference")]
    return f"| {' | '.join([*cells, cell(here, 'bytes'), cell(other, 'bytes')])} |"


def main() -> None:
    """Parse the command line; measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", help="Python of the environment with the reference library")
    parser.add_argument("--methods", help="some of the rows, with commas between them")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*json.loads(options.worker), options.threads)
        return
    sys.path.insert(0, str(HERE.parent / "src"))
    from _common import machine, versions

    known = rows()
    chosen = options.methods.split(",") if options.methods else list(known)
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"unknown methods {unknown}; there are {sorted(known)}")
    head = {"machine": machine(), "threads": options.threads, "versions": versions("torch", "transformers")}
    figures: dict[str, Any] = {**head, "methods": {}}
    print(f"{head['machine']}, {options.threads} threads; {head['versions']}\n\n{HEADER}", flush=True)
    for row in chosen:
        method, fields = known[row]
        result = measured(method, fields, options.reference_python, options.threads, options.repeats)
        figures["methods"][row] = {"method": method, "fields": fields, **result}
        print(line(row, result), flush=True)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
