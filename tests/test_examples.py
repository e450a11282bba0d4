"""The examples run from end to end, on a random tiny model, and write what they found."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs an example by its name, as its command line would; gives its module and the results it wrote."""
    monkeypatch.syspath_prepend(EXAMPLES)
    support = importlib.import_module("_support")
    monkeypatch.setattr(support, "fetch_model", functools.partial(support.fetch_model, cache=tmp_path / "cache"))

    def job(name: str, results: str, *options: str) -> dict[str, Any]:
        module = importlib.import_module(name)
        if hasattr(module, "apart"):  # here, not in a process of its own
            monkeypatch.setattr(module, "apart", lambda function, *arguments: function(*arguments))
        module.main(module.parse_arguments(["--tiny", "--output-dir", str(tmp_path / "output"), *options]))
        return json.loads((tmp_path / "output" / results).read_text(encoding="utf-8"))

    return job


def test_sentiment(run: Any, capsys: pytest.CaptureFixture) -> None:
    results = run("sentiment", "results.json")
    assert results["held_out"] == 32
    assert results["same_answers"] == {"reloaded": 32, "merged": 32}
    assert results["mixed_batch_difference"] < 1e-4
    assert "32 held-out reviews" in capsys.readouterr().out


def test_qlora(run: Any, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    results = run("qlora", "qlora.json", "--steps", "2")
    sizes = results["bytes"]["qlora"]
    assert sizes["held"] < sizes["sixteen"]  # by little: the scales of layers this small weigh as much
    assert {"lora", "qlora", "reloaded on 4 bits", "merged, dense"} <= set(results["accuracy"])
    assert "QLoRA, 4 bits" in capsys.readouterr().out


def test_tutorial(run: Any, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    results = run("tutorial", "tutorial.json", "--steps", "2", "--rows", "16")
    names = ["LoRA", "IA3", "prefix tuning", "prompt tuning", "LLaMA-Adapter", "bottleneck"]
    assert list(results["methods"]) == names and results["steps"] == 2
    assert results["held_out"] == 16 and results["base_is_as_it_was"]
    table = capsys.readouterr().out
    for name, found in results["methods"].items():
        folder = tmp_path / "output" / name.lower().replace(" ", "-")
        assert found["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
        assert found["trainable"] > 0 and f"{found['bytes']:,}" in table


@pytest.mark.parametrize("name", ["sentiment", "qlora", "tutorial"])
def test_options_that_cannot_be(run: Any, name: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_arguments(["--steps", "0", "--output-dir", str(tmp_path)])
    assert "--steps must be at least 1, not 0" in capsys.readouterr().err


def test_the_benchmark_of_starts(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows with something to prepare, another optimizer or another loss; what the file has is not run again."""
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    starts = importlib.import_module("starts")
    rows = ["plain", "EVA", "CorDA", "LoRA-GA", "LoRA-FA", "KaSA"]
    options = ["--tiny", "--steps", "2", "--held-out", "8", "--output", str(tmp_path / "starts.json")]
    for chosen in (rows[:1], rows):
        starts.main([*options, "--rows", ",".join(chosen)])
    results = json.loads((tmp_path / "starts.json").read_text(encoding="utf-8"))
    assert list(results["rows"]) == rows
    for found in results["rows"].values():
        assert found["base_is_as_it_was"] and len(found["runs"]) == len(starts.RATES)
        assert len(starts.best_of(found)[1]["two_words"]) == 8
    text = starts.page(results)
    assert all(f"| {name} | " in text for name in rows) and "Beat plain LoRA here" in text


def test_the_page_of_starts_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    starts = importlib.import_module("starts")
    results = json.loads(starts.OUTPUT.read_text(encoding="utf-8"))
    assert list(results["rows"]) == list(starts.ROWS)
    assert starts.PAGE.read_text(encoding="utf-8") == starts.page(results)
