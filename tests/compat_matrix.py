"""Adapter files between this package and other releases of `peft`, both ways, as a table.

    python tests/compat_matrix.py --python here=.venv/bin/python --python 0.21.2=REFENV/bin/python \
        --python 0.5.0=... [--write docs/compatibility.md] [--keep FOLDER]

Each environment writes an adapter for each golden case that its release knows, with the outputs of its model; then
this package reads what the others wrote, and they read what this package wrote. Not a test, as it needs those
environments.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any


GOLDEN = Path(__file__).parent / "golden"
OLD_CASES = ("lora_", "ia3_", "prompt_", "prefix_", "ptuning_", "multitask_prompt", "adaption_prompt")
"""Releases before 0.21 are asked for these."""
TOLERANCE = 2e-4
MEANS = {
    "ok": "read, and the outputs are equal (to 2e-4)",
    "-": "the release does not have the method, or not these arguments",
    "x": "the release cannot run that model or method in its environment",
    "own": "the release does not read its own file back either",
    "field": "the release refuses configs with fields that it does not know, as it refuses those of 0.21.2",
    "fails": "not read; the message is below",
}


def describe(case: str) -> dict[str, Any]:
    """What `golden/README.md` says of a case."""
    return json.loads((GOLDEN / "cases" / case / "case.json").read_text())


def build_base(record: dict[str, Any]) -> Any:
    """The base model of a case, in evaluation mode."""
    import transformers
    from safetensors.torch import load_file

    folder = GOLDEN / "models" / record["arch"]
    if record["arch"] == "convnet":
        sys.path.insert(0, str(Path(__file__).parent))
        from golden.convnet import ConvNet

        model = ConvNet()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()
    names = {"CAUSAL_LM": "CausalLM", "SEQ_CLS": "SequenceClassification", "SEQ_2_SEQ_LM": "Seq2SeqLM"}
    auto = getattr(transformers, f"AutoModelFor{names[record['task_type']]}")
    return auto.from_pretrained(str(folder)).float().eval()


def outputs(model: Any, case: str) -> Any:
    """Logits on the recorded inputs."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(GOLDEN / "cases" / case / "expected.safetensors")
    with torch.no_grad():
        result = model(**{key[3:]: value for key, value in tensors.items() if key.startswith("in.")})
    return result if isinstance(result, torch.Tensor) else result.logits


def known(record: dict[str, Any]) -> Any:
    """The config class of a case, if this release has it and all its arguments."""
    import peft

    cls = getattr(peft, record["config_class"], None)
    types = {field.name: str(field.type) for field in dataclasses.fields(cls)} if cls else {}
    start = record["config_kwargs"].get("init_lora_weights")  # a release takes one that it does not know for True
    if isinstance(start, str) and start not in types.get("init_lora_weights", ""):
        return None
    return cls if set(record["config_kwargs"]) <= set(types) else None


def write_case(case: str, folder: Path) -> str:
    """Save an adapter with noise in its tensors, and the outputs with it."""
    import torch
    from safetensors.torch import save_file

    import peft

    record = describe(case)
    cls = known(record)
    if cls is None:
        return "-"
    torch.manual_seed(0)
    dropout = {"lora_dropout": 0.0} if hasattr(cls, "lora_dropout") else {}  # 0.2 has None there, and fails on it
    kwargs = {"task_type": record["task_type"], **dropout, **record["config_kwargs"]}
    model = peft.get_peft_model(build_base(record), cls(**kwargs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    model.save_pretrained(str(folder / case))
    if folder.name == "here":  # releases before 0.3 read nothing else
        model.save_pretrained(str(folder / "here as pickles" / case), safe_serialization=False)
        shutil.copy(folder / "here as pickles" / case / "adapter_model.bin", folder / case)
    save_file({"logits": outputs(model, case).contiguous()}, str(folder / case / "outputs.safetensors"))
    return "ok"


def read_case(case: str, folder: Path) -> str:
    """Load an adapter and compare the outputs."""
    from safetensors.torch import load_file

    import peft

    record = describe(case)
    if known(record) is None:
        return "-"
    base = build_base(record)
    try:
        outputs(base, case)
    except Exception as error:
        return f"x: the base model alone: {type(error).__name__}: {error}"
    model = peft.PeftModel.from_pretrained(base, str(folder / case)).eval()
    difference = (outputs(model, case) - load_file(str(folder / case / "outputs.safetensors"))["logits"]).abs().max()
    return "ok" if difference < TOLERANCE else f"off by {difference:.1g}"


def work(action: str, folder: Path, cases: list[str]) -> None:
    """Run in one of the environments: one line of JSON a case."""
    import warnings

    warnings.simplefilter("ignore")
    function = {"write": write_case, "read": read_case}[action]
    for case in cases:
        if action == "read" and not (folder / case / "outputs.safetensors").exists():
            continue
        try:
            result = function(case, folder)
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            word = {"read": "fails", "write": "x"}[action]
            result = "field" if "unexpected keyword" in message else f"{word}: {type(error).__name__}: {message}"
        print("RESULT " + json.dumps([case, result]), flush=True)


def ask(python: str, action: str, folder: Path, cases: list[str], source: str | None) -> dict[str, str]:
    """The results of one environment."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if source:
        environment["PYTHONPATH"] = source
    command = [python, __file__, "--work", action, str(folder), *cases]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line[7:] for line in found.stdout.splitlines() if line.startswith("RESULT ")]
    if found.returncode:
        print(found.stderr[-2000:], file=sys.stderr)
    return dict(json.loads(line) for line in lines)


def versions(python: str) -> str:
    """What an environment holds."""
    code = "from importlib.metadata import version as v; print(v('transformers'), v('torch'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    transformers, torch = found.stdout.split()
    return f"transformers {transformers}, torch {torch.partition('+')[0]}"


def matrix(environments: dict[str, str], folder: Path) -> tuple[list[str], dict[str, dict[str, tuple[str, str]]]]:
    """Case -> release -> (read here, read there)."""
    cases = sorted(path.name for path in (GOLDEN / "cases").iterdir())
    source = str(Path(__file__).parents[1] / "src")
    here = environments.pop("here")
    ask(here, "write", folder / "here", cases, source)
    table: dict[str, dict[str, tuple[str, str]]] = {case: {} for case in cases}
    for release, python in environments.items():
        wanted = cases if release.startswith("0.21") else [case for case in cases if case.startswith(OLD_CASES)]
        written = ask(python, "write", folder / release, wanted, None)
        forth = ask(here, "read", folder / release, wanted, source)
        back = ask(python, "read", folder / "here", wanted, None)
        own = ask(python, "read", folder / release, wanted, None)
        for case in wanted:
            to, fro = forth.get(case, written.get(case, "x")), back.get(case, "x")
            if to != "ok" and written.get(case) == "ok" and own[case] != "ok":
                to = "own"
            table[case][release] = (to, written[case].partition(":")[0] if written.get(case, "x")[0] == "x" else fro)
        print(release, "done", file=sys.stderr)
    return list(environments), table


def render(releases: list[str], table: dict[str, dict[str, tuple[str, str]]], held: dict[str, str]) -> str:
    """The table in markdown, with what is not equal spelled out below it."""
    lines = ["| case | " + " | ".join(f"{r} to here | here to {r}" for r in releases) + " |"]
    lines.append("|---|" + "---|" * (2 * len(releases)))
    notes = []
    for case, row in table.items():
        if not row:
            continue
        cells = []
        for release in releases:
            for direction, result in zip(("to here", "from here"), row.get(release, ("", ""))):
                word = result.partition(":")[0]
                cells.append(word)
                if word not in ("ok", "-", "", "own", "field") and result != "x":
                    notes.append(f"- {case}, {release} {direction}: {result}")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- `{word}`: {text}." for word, text in MEANS.items()), "", "Environments:", ""]
    lines += [f"- {release}: {text}" for release, text in held.items()]
    return "\n".join([*lines, "", "What is not equal:", "", *notes, ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", action="append", default=[], help="NAME=PATH; NAME is `here` or a release")
    parser.add_argument("--write", type=Path, help="replace the part of this file below its line of dashes")
    parser.add_argument("--keep", type=Path, help="leave the adapters in this folder")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        action, folder, *cases = options.work
        return work(action, Path(folder), cases)
    environments = dict(pair.split("=", 1) for pair in options.python)
    held = {name: versions(python) for name, python in environments.items()}
    folder = options.keep or Path(tempfile.mkdtemp())
    text = render(*matrix(environments, folder), held)
    if not options.keep:
        shutil.rmtree(folder)
    if options.write:
        head = options.write.read_text().partition("\n----\n")[0]
        text = f"{head}\n----\n\nAs of {datetime.date.today()}.\n\n{text}"
        options.write.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
