"""What a training step costs with each weight method, as a ratio to the frozen base model's step.

    python benchmarks/methods.py [--reference-python PATH] [--methods lora,oft] [--json FILE] [--threads 2]

The table goes to ``benchmarks/RESULTS.md`` (between the marks there) unless ``--methods`` picks some rows: those are
printed only, or written too with ``--write``, and take the place of what the file of ``--json`` has of them.
``--clock cpu`` measures CPU time, for machines with other work. ``--tiny`` measures what the calls cost instead: see
`TINY`.

All weight methods, and the methods of blocks and prompts that need no more than a config, on a LLaMA-shaped model of 6
layers, width 576, 9 heads (3 key-value), 1,536 inner, a vocabulary of 2,000, float32, with random weights; 4 x 128
tokens; the method on all linear layers of the blocks, with the hyperparameters of its paper (`HYPERPARAMETERS`,
`METHODS`). The floor is the frozen model's forward and backward to its input embeddings. Each library measures in a
process of its own, and the two take turns. "here / reference" is the median of the ratios of neighbouring steps, by
that of all floors of the two processes, which are the same work: what differs between two processes by chance does not
count. The range behind it holds the true median with 95 % certainty; repetitions stop where it is narrow, or clear of
1. Methods that one side does not have, or that cannot be on such layers, have no figures there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "lora_alpha": 32},
    "abba": {"r1": 8, "r2": 8},
    "adalora": {"init_r": 12, "target_r": 8, "total_step": 1000, "tinit": 0, "tfinal": 0},
    "adamss": {"r": 100, "num_subspaces": 5, "subspace_rank": 1},
    "boft": {"boft_block_size": 4, "boft_n_butterfly_factor": 1},
    "c3a": {"block_size": 96},
    "comol": {"r": 16, "alpha": 32, "num_experts": 4},
    "delora": {"r": 32},
    "dylora": {"r": 16, "alpha": 32},
    "fourierft": {"n_frequency": 1000},
    "frod": {},
    "gralora": {"r": 32, "alpha": 64, "gralora_k": 2},
    "hira": {"r": 32},
    "hra": {"r": 8},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "lily": {"r": 32, "stride_A": 2, "num_B": 3},
    "loha": {"r": 8, "alpha": 16},
    "lokr": {"r": 8, "alpha": 16},
    "lora_xs": {"r": 64, "alpha": 64},
    "miss": {"r": 64},
    "mix_lora": {"r": 8, "alpha": 16, "num_experts": 4},
    "mtl_lora": {"r": 8, "alpha": 16, "n_tasks": 4, "n_up_projection": 3},
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

WHOLE = {"target_modules": None}
"""For methods that choose their places themselves, or act on no layer."""

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [7]},
    "kasa": {"kasa_config": {}},
    "bdlora": {
        "use_bdlora": {
            "target_modules_bd_a": ["o_proj", "down_proj"],
            "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
            "nblocks": 2,
        }
    },
    "monteclora": {"monteclora_config": {}},
    "velora": {"velora_config": {"num_groups": 32}},
    "mica": {"init_lora_weights": "mica"},
    "rslora": {"use_rslora": True},
    "qalora": {"use_qalora": True},
}
"""Of LoRA, each with the rank of plain LoRA. (What 0.21.2 takes for QA-LoRA here is plain LoRA.)"""

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"lora[{name}]": ("lora", {**HYPERPARAMETERS["lora"], **fields}) for name, fields in VARIANTS.items()},
    "boft[factors]": ("boft", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "miss[bat]": ("miss", {"r": 64, "init_weights": "bat"}),
    "bottleneck[houlsby]": ("bottleneck", {"preset": "houlsby", **WHOLE}),
    "prompt_tuning": ("prompt_tuning", {"num_virtual_tokens": 20, **WHOLE}),
    "p_tuning": ("p_tuning", {"num_virtual_tokens": 20, "encoder_hidden_size": 128, **WHOLE}),
    "prefix_tuning": ("prefix_tuning", {"num_virtual_tokens": 20, **WHOLE}),
    "lora[arrow]": ("arrow", HYPERPARAMETERS["lora"]),
    "ln_tuning": ("ln_tuning", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "trainable_tokens": ("trainable_tokens", {"token_indices": list(range(10)), "target_modules": ["embed_tokens"]}),
    "union[mam]": ("union", {"ready": "MAMConfig", **WHOLE}),
    "union[unipelt]": ("union", {"ready": "UniPELTConfig", **WHOLE}),
}
"""Rows of their own: what is measured -> registered method and fields."""

ELSEWHERE: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_len": 10, "adapter_layers": 6, **WHOLE},
    "beft": {"target_modules": ["v_proj"]},
    "bottleneck": WHOLE,
    "reft": {"r": 4, "prefix_positions": 5, "suffix_positions": 5, **WHOLE},
    "compacter": {"reduction_factor": 24, **WHOLE},
    "invertible": WHOLE,
    "shadow": WHOLE,
    "xlora": {"hidden_size": 576, **WHOLE},
}
"""Methods whose paper puts them on other layers; X-LoRA weighs two LoRAs on all linear layers."""


TINY: dict[str, int] = {"layers": 6, "width": 64, "inner": 128, "heads": 4, "kv_heads": 2, "vocab": 100}
"""A model whose arithmetic takes no time, for ``--tiny``: one row of 8 tokens in training, and a single token without
gradients, as in generation. What a step costs above the floor is then the calls that a method makes."""

SMALLER: dict[str, dict[str, Any]] = {
    "adamss": {"r": 16},
    "c3a": {"block_size": 16},
    "compacter": {"reduction_factor": 8},
    "lora_xs": {"r": 16},
    "lora[velora]": {"velora_config": {"num_groups": 8}},
    "miss": {"r": 16},
    "miss[bat]": {"r": 16},
    "psoft": {"r": 16},
    "pvera": {"r": 32},
    "randlora": {"r": 8},
    "road": {"variant": "road_1", "group_size": 32},
    "shira": {"r": 4},
    "unilora": {"theta_d_length": 1000},
    "vblora": {"vector_length": 16},
    "vera": {"r": 32},
    "waveft": {"n_frequency": 256},
    "xlora": {"hidden_size": 64},
}
"""Fields that the layers of the tiny model are too narrow for."""


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every registered weight method, and the rows above: name -> registered method and fields of its config."""
    import peft.tuners  # noqa: F401
    from peft.core.model.tuner import BaseTuner
    from peft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING

    found = {}
    for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if isinstance(tuner, type) and issubclass(tuner, BaseTuner) and not tuner.mixes:
            name = str(getattr(key, "value", key)).lower()
            found[name] = name, {**HYPERPARAMETERS.get(name, {}), **ELSEWHERE.get(name, {})}
    return {**found, **METHODS}


def adapted(method: str, fields: dict[str, Any], size: dict[str, int]) -> Any:
    """The model of a size with one adapter in training, moved off its start so that no factor is zero."""
    import torch
    from _common import llama

    import peft
    from peft import get_peft_config, get_peft_model

    given = {"target_modules": LINEARS, **fields}
    if given["target_modules"] is None:
        del given["target_modules"]
    base = llama(**size)
    if method == "arrow":
        return routed(base, given)
    with tempfile.TemporaryDirectory() as folder:
        if method == "xlora":
            given["adapters"] = {str(i): saved_lora(f"{folder}/{i}", size) for i in range(2)}
            base.config.use_cache = False
        ready = given.pop("ready", None)  # a union that has a name of its own
        config = (
            getattr(peft, ready)(task_type="CAUSAL_LM")
            if ready
            else get_peft_config({"peft_type": method.upper(), "task_type": "CAUSAL_LM", **given})
        )
        model = get_peft_model(base, config).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.01)
    return model


def routed(base: Any, fields: dict[str, Any]) -> Any:
    """The model with an Arrow router that chooses two of eight LoRAs; nothing trains."""
    import torch

    from peft import ArrowConfig, LoraConfig, get_peft_model

    experts = {f"task_{i}": LoraConfig(**fields) for i in range(8)}
    model = get_peft_model(base, experts["task_0"], "task_0")
    for name in [*experts][1:]:
        model.add_adapter(name, experts[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.01)
    options = ArrowConfig(top_k=2)
    options.task_adapter_names = [*experts]
    model.add_adapter("arrow_router", LoraConfig(**fields, arrow_config=options))
    model.set_adapter("arrow_router")
    return model.requires_grad_(False).train()


def saved_lora(folder: str, size: dict[str, int]) -> str:
    """The folder, with a LoRA in it."""
    adapted("lora", HYPERPARAMETERS["lora"], size).save_pretrained(folder)
    return folder


def answer(work: Work, method: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Bytes and counts of a method, whose model and training step the work takes up; an error where it cannot."""
    import torch
    from _common import floor_step, saved_bytes, training_step

    ids = work.ids
    try:
        work.model = model = adapted(method, fields, work.size)
        extra = {"task_ids": torch.zeros(len(ids), dtype=torch.long)} if "n_tasks" in fields else {}
        trains = any(p.requires_grad for p in model.parameters())
        work.step = training_step(model, ids, **extra) if trains else floor_step(model, ids)
        work.forward = forward(model, ids, **extra)
        work.step()
    except Exception as error:
        traceback.print_exc()
        work.step = None
        return {"error": f"{type(error).__name__}: {error}"}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trainable": trained, "bytes": saved_bytes(work.step, model)}


def forward(model: Any, ids: Any, **kwargs: Any) -> Callable[[], object]:
    """A call with the first token of each row, without gradients, as a step of generation is one."""
    import torch

    def call() -> object:
        with torch.no_grad():
            return model(input_ids=ids[:, :1], **kwargs)

    return call


class Work:
    """What a process measures: the steps of one method after another, and those of the frozen model."""

    step: Callable[[], object] | None = None
    model: Any = None

    def __init__(self, tiny: bool) -> None:
        from _common import floor_step, llama, saved_bytes, tokens

        self.size = TINY if tiny else {}
        self.ids = tokens(1, 8, TINY["vocab"]) if tiny else tokens()
        self.base = llama(**self.size).train()
        self.floor, self.bare = floor_step(self.base, self.ids), forward(self.base, self.ids)
        self.floor()
        self.floor_bytes = saved_bytes(self.floor, self.base)

    def times(self) -> dict[str, float]:
        """Seconds of one step each; of the tiny model, whose steps are short, the least of several."""
        from _common import seconds

        if not self.size:
            return {"step": seconds(self.step), "floor": seconds(self.floor)}
        found = {}
        for mode, pair in ((True, ("step", "floor")), (False, ("forward", "bare"))):
            self.model.train(mode)
            self.base.train(mode)
            rounds = [[seconds(getattr(self, name)) for name in pair] for _ in range(12)]
            found |= {name: min(times) for name, times in zip(pair, zip(*rounds[2:]))}
        return found


def work(threads: int, tiny: bool) -> None:
    """In the process of a library: a line of input names a method, or is empty and asks for a pair of times."""
    import torch
    from _common import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    work = Work(tiny)
    for line in sys.stdin:
        if line.strip():
            work.model = work.step = work.forward = None
            gc.collect()
            print(json.dumps({**answer(work, *json.loads(line)), "floor_bytes": work.floor_bytes}), flush=True)
        elif work.step is not None:
            print(json.dumps(work.times()), flush=True)


class Library:
    """A process that measures with one library."""

    def __init__(self, python: str, ours: bool, threads: int, tiny: bool = False) -> None:
        from _common import environment

        self.tiny = tiny
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self.process = subprocess.Popen(
            [python, str(HERE / "methods.py"), "--worker", "--threads", str(threads), *["--tiny"] * tiny],
            env=environment(threads, ours),
            cwd=tempfile.gettempdir(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.facts: dict[str, Any] = {}
        self.steps: list[float] = []  # seconds, of the method
        self.floors: list[float] = []  # of all methods so far
        self.times: list[dict[str, float]] = []  # all that was measured of the method

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for reply in self.process.stdout:
            if reply.startswith("{"):
                return json.loads(reply)
        self.log.seek(0)
        raise RuntimeError("a measuring process ended:\n" + self.log.read()[-2000:])

    def take(self, method: str, fields: dict[str, Any]) -> bool:
        """Turn to a method; whether it can be measured."""
        self.steps, self.times, self.facts = [], [], self._ask(json.dumps([method, fields]))
        return "error" not in self.facts

    def measure(self) -> None:
        """One more repetition."""
        times = self._ask("")
        self.times.append(times)
        self.steps.append(times["step"])
        self.floors.append(times["floor"])

    def figures(self) -> dict[str, Any]:
        """What came out for the method."""
        from _common import ratio

        if "error" in self.facts:
            return self.facts
        if "bare" in self.times[0]:
            least = {key: min(times[key] for times in self.times) for key in self.times[0]}
            return {"step": least["step"] - least["floor"], "forward": least["forward"] - least["bare"]}
        return {
            "trainable": self.facts["trainable"],
            "seconds": statistics.median(self.steps),
            "step": ratio(self.steps, self.floors[-len(self.steps) :]),
            "bytes": self.facts["bytes"] / self.facts["floor_bytes"],
        }

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.log.close()


ENOUGH = 7
"""Repetitions at least, where more are allowed."""


def measured(
    libraries: dict[str, Library], method: str, fields: dict[str, Any], repeats: int
) -> dict[str, dict[str, Any]]:
    """Figures of the libraries ("here", "reference"), whose repetitions take turns; ``repeats`` at most."""
    working = {name: library for name, library in libraries.items() if library.take(method, fields)}
    there_too, tiny = len(working) == 2, libraries["here"].tiny
    for i in range(repeats if "here" in working else 0):
        for library in list(working.values())[:: 1 if i % 2 else -1]:
            library.measure()
        if i + 1 >= ENOUGH and (tiny or not there_too or is_settled(*compared(*working.values())[1:])):
            break
    figures = {name: libraries[name].figures() for name in libraries}
    if there_too and tiny:
        for one, floor in (("step", "floor"), ("forward", "bare")):
            sides = ([t[one] / t[floor] - 1 for t in library.times] for library in working.values())
            figures["here"][f"{one}_to_reference"] = statistics.median(a / b for a, b in zip(*sides))
    elif there_too:
        middle, low, high = compared(*working.values())
        figures["here"] |= {"to_reference": middle, "between": [low, high]}
    return figures


def compared(here: Library, reference: Library) -> tuple[float, float, float]:
    """The ratio of the steps of two libraries, and what it lies between with 95 % certainty."""
    from _common import ratio

    shift = ratio(here.floors, reference.floors)
    ratios = sorted(a / b / shift for a, b in zip(here.steps, reference.steps))
    # as many of n are below their median as heads among n coins
    n, k, chance = len(ratios), 0, 0.0
    while (chance := chance + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    k = max(k, 1)
    return statistics.median(ratios), ratios[k - 1], ratios[n - k]


def is_settled(low: float, high: float) -> bool:
    """Whether a range is narrow enough: within 2 % either way, or clear of 1."""
    return high / low < 1.04 or high < 0.95


TINY_HEADER = """| method | step above floor | reference | here / reference | forward above | reference | ratio |
|---|---:|---:|---:|---:|---:|---:|"""


def tiny_line(row: str, figures: dict[str, dict[str, Any]]) -> str:
    """A row of the table of ``--tiny``."""
    here, other = figures["here"], figures.get("reference", {})
    cells = [row]
    for key in ("step", "forward"):
        cells += [f"{side[key] * 1e3:.2f} ms" if key in side else "-" for side in (here, other)]
        cells.append(f"{here[f'{key}_to_reference']:.2f}" if f"{key}_to_reference" in here else "-")
    return f"| {' | '.join(cells)} |" if "error" not in here else f"| {row} | {here['error']} | | | | | |"


HEADER = """| method | trained | step / floor | reference | here / reference | bytes / floor | reference |
|---|---:|---:|---:|---:|---:|---:|"""


def line(row: str, figures: dict[str, dict[str, Any]]) -> str:
    """A row of the table in Markdown."""
    here, other = figures["here"], figures.get("reference", {})
    if "error" in here:
        return f"| {row} | {here['error'].splitlines()[0]} | | | | | |"

    def cell(values: dict[str, Any], key: str) -> str:
        return f"{values[key]:.2f}" if key in values else "-"

    compared_with = cell(here, "to_reference")
    if "between" in here:
        low, high = here["between"]
        compared_with += f" ({low:.2f} to {high:.2f})"
    cells = [row, f"{here['trainable']:,}", cell(here, "step"), cell(other, "step"), compared_with]
    return f"| {' | '.join([*cells, cell(here, 'bytes'), cell(other, 'bytes')])} |"


def main() -> None:
    """Parse the command line; measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", help="Python of the environment with the reference library")
    parser.add_argument("--methods", help="some of the rows, with commas between them")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=45, help="repetitions of a row at most")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine with other work")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md although not all rows are measured")
    parser.add_argument("--tiny", action="store_true", help="what the calls cost: a model whose arithmetic is none")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.threads, options.tiny)
        return
    os.environ["BENCHMARK_CLOCK"] = options.clock
    sys.path.insert(0, str(HERE.parent / "src"))
    known = rows()
    chosen = options.methods.split(",") if options.methods else list(known)
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"unknown methods {unknown}; there are {sorted(known)}")
    found = measure_all({row: known[row] for row in chosen}, options)
    if options.write or not options.methods:
        from _common import write_section

        write_section("methods.py --tiny" if options.tiny else "methods.py", report(found, options))


def measure_all(chosen: dict[str, tuple[str, dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of these rows, which are printed (and written to ``--json``) as they come."""
    from _common import machine, versions

    head, as_line = (TINY_HEADER, tiny_line) if options.tiny else (HEADER, line)
    libraries = {"here": Library(sys.executable, True, options.threads, options.tiny)}
    if options.reference_python:
        libraries["reference"] = Library(options.reference_python, False, options.threads, options.tiny)
    facts = {"machine": machine(), "threads": options.threads, "versions": versions("torch", "transformers")}
    figures: dict[str, Any] = {}
    if options.methods and options.json and options.json.exists():
        figures = json.loads(options.json.read_text())["methods"]
    print(head, flush=True)
    for row, (method, fields) in chosen.items():
        fields = {**fields, **SMALLER.get(row, {})} if options.tiny else fields
        result = measured(libraries, method, fields, options.repeats)
        figures[row] = {"method": method, "fields": fields, "repeats": len(libraries["here"].steps), **result}
        print(as_line(row, result), flush=True)
        if options.json:
            options.json.write_text(json.dumps({**facts, "methods": figures}, indent=1) + "\n")
    for library in libraries.values():
        library.close()
    return figures


def report(figures: dict[str, Any], options: argparse.Namespace) -> str:
    """The table in Markdown, with the machine and the versions."""
    from _common import measured_with

    head = measured_with(options.reference_python, options.threads)
    clock = "CPU time" if options.clock == "cpu" else "Wall time"
    repeats = [result["repeats"] for result in figures.values() if result["repeats"]]
    about = f"{clock}, medians of {min(repeats)} to {max(repeats)} repetitions in turn."
    columns, as_line = (TINY_HEADER, tiny_line) if options.tiny else (HEADER, line)
    return "\n".join([*head, about, "", columns, *(as_line(row, result) for row, result in figures.items())])


if __name__ == "__main__":
    main()
