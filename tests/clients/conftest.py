"""What a client's flow gives with peft 0.21.2, kept in tests/data/clients.json and compared with what it gives here.

`record.py` writes that file: the same tests, run in an environment that holds 0.21.2. Its transformers is 5.23, the
last that takes 0.21.2 (5.24 asks for 0.22 in the same code).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


RECORDED = Path(__file__).parents[1] / "data" / "clients.json"
CLIENTS = ("transformers", "accelerate", "trl", "diffusers", "sentence-transformers", "lm_eval")
RECORDING = os.environ.get("PEFT_CLIENTS_RECORD")
"""Path of the file to write, set by `record.py`."""

results: dict[str, Any] = {}


def version(distribution: str) -> str:
    """Major and minor version of an installed distribution; empty where there is none."""
    try:
        return ".".join(importlib.metadata.version(distribution).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ""


def plain(value: Any) -> Any:
    """Tensors as nested lists, so that JSON can keep them."""
    if isinstance(value, torch.Tensor):
        return plain(value.detach().double().flatten()[:24].tolist())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def close(found: Any, wanted: Any, tolerance: float, where: str) -> None:
    """Equal in structure; numbers within the tolerance, relative or absolute."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            close(found[key], wanted[key], tolerance, f"{where}[{key}]")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), f"{where}: {found} and not {wanted}"
        for i, pair in enumerate(zip(found, wanted)):
            close(*pair, tolerance, f"{where}[{i}]")
    elif isinstance(wanted, float):
        assert math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance), f"{where}: {found} and not {wanted}"
    else:
        assert found == wanted, f"{where}: {found} and not {wanted}"


@pytest.fixture
def as_reference(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`as_reference(loss=..., logits=...)`: the values are those of 0.21.2 (the first 24 numbers of a tensor).

    Trainers and pipelines of another client version may compute otherwise: values are compared with its version only.
    """
    name = f"{request.node.path.stem}::{request.node.name}"
    client = request.node.path.stem.removeprefix("test_").replace("sentence_", "sentence-")

    def check(tolerance: float = 2e-5, **values: Any) -> None:
        if RECORDING:
            results[name] = plain(values)
            return
        recorded = json.loads(RECORDED.read_text())
        if client != "transformers" and version(client) != recorded["versions"][client]:
            pytest.skip(f"recorded with {client} {recorded['versions'][client]}")
        close(plain(values), recorded["results"][name], tolerance, name)

    return check


def pytest_sessionfinish(exitstatus: int) -> None:
    """Write what was recorded, beside what a run of other tests has written."""
    if RECORDING and results:
        path = Path(RECORDING)
        kept = json.loads(path.read_text())["results"] if path.exists() else {}
        data = {
            "versions": {name: version(name) for name in CLIENTS},
            "results": dict(sorted({**kept, **results}.items())),
        }
        path.write_text(json.dumps(data, indent=None, separators=(",", ":")).replace('"test_', '\n"test_') + "\n")
