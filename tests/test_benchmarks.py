"""The benchmarks that take too long to be run now and then do run: on tiny shapes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from peft.kernels import few


FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark as a module; what it imports from its folder is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_trainer(benchmark):
    trainer = benchmark("trainer")
    runs = {name: trainer.train(case, True, 1, tiny=True) for name, case in trainer.CASES.items()}
    assert len({round(figures["loss"], 3) for name, figures in runs.items() if name != "floor"}) == 1
    row = trainer.line(trainer.CASES["savings"], [runs["savings"]], [runs["plain"]])
    assert row.count("|") == trainer.HEADER.splitlines()[0].count("|")


def test_gpu_dry(benchmark):
    """Every row of the benchmark for GPUs, tiny and on the CPU."""
    gpu = benchmark("gpu")
    here = dict(gpu.work(gpu.Machine(dry=True), True, float("inf")))
    missing = {name: why for name, why in here.items() if not isinstance(why, dict)}
    assert all("not installed" in why or "bitsandbytes" in why for why in missing.values()), missing
    assert len(here) - len(missing) >= 10
    late = dict(gpu.work(gpu.Machine(dry=True), False, 0.0))
    assert set(late) < set(here) and set(late.values()) == {"left out: no time left"}
    lines = gpu.table(here, here)
    assert len(lines) == len(here) + 2 and "1.00" in lines[-1]


@pytest.mark.few
def test_steps_of_ordinary_size_keep_no_more_for_the_limits_of_few_entries(benchmark, monkeypatch):
    """What is left to autograd, whose operations keep more, is small: one block of 576 features, 256 tokens."""
    methods, common = benchmark("methods"), benchmark("_common")
    ids, ratios = common.tokens(rows=2), {}
    for name, (method, fields) in methods.rows().items():
        work, kept = SimpleNamespace(ids=ids, size={"layers": 1}), []
        fields = {**fields, "adapter_layers": 1} if "adapter_layers" in fields else fields
        for entries in (few.ENTRIES, 0):
            with monkeypatch.context() as patch:
                patch.setattr(few, "ENTRIES", entries)
                found = methods.answer(work, method, fields)
            assert "error" not in found, (name, found)
            kept.append(found["bytes"])
        ratios[name] = kept[0] / kept[1]
    assert len(ratios) > 50
    assert {name: ratio for name, ratio in ratios.items() if ratio > 1.03} == {}


def test_parts_of_a_call_tell_thin_products_from_large_ones(benchmark):
    parts = benchmark("parts")
    x, w, a, b, dy = (torch.randn(*shape) for shape in ((512, 100), (90, 100), (8, 100), (90, 8), (512, 90)))
    cases = {
        "large products": (lambda: x @ w.T, lambda: dy @ w),
        "thin products": (lambda: x @ a.T, lambda: dy @ b, lambda: (dy @ b).T @ x, lambda: dy.T @ (x @ a.T)),
    }
    for part, actions in cases.items():
        for action in actions:
            found = parts.parts_of(action, 8)
            assert found[part] == sum(found[name] for name in cases) > 0
