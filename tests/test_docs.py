"""The documents say what the code does: the generated page is up to date, the method of the guide passes the laws."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import peft
from peft.tools.catalogue import methods


TESTS = Path(__file__).resolve().parent
DOCS = TESTS.parent / "docs"
PAPER = r"\d{4}\.\d{4,5}|ICLR|NeurIPS|AAAI|openreview"
NO_PAPER = {"trainable_tokens"}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_methods", DOCS / "build_methods.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_pages_of_methods_are_what_the_registry_says(build: ModuleType) -> None:
    written = {name: DOCS / name for name in build.build()}
    assert sorted(DOCS.glob("methods/*.md")) == sorted(path for path in written.values() if path.parent != DOCS)
    for name, text in build.build().items():
        assert written[name].read_text(encoding="utf-8") == text, f"{name}: run python docs/build_methods.py"


def test_every_method_has_a_page_with_its_paper_and_its_use() -> None:
    overview = (DOCS / "methods.md").read_text(encoding="utf-8")
    for entry in methods():
        assert f"[{entry.words[0]}](methods/{entry.key}.md) | `{entry.config.__name__}`" in overview
        module = sys.modules[entry.tuner.__module__].__doc__ + entry.words[1]
        assert re.search(PAPER, module) or entry.key in NO_PAPER, entry.key
        assert "\n\n" in entry.config.__doc__, f"{entry.config.__name__} does not say when to use it"


def test_the_measured_table_has_every_weight_method(build: ModuleType) -> None:
    laws, costs = (json.loads(path.read_text(encoding="utf-8")) for path in (build.LAWS, build.COSTS))
    wanted = {entry.key for entry in methods() if build.group_of(entry) == "Weights"}
    assert wanted == set(laws["layers"])
    assert wanted <= set(costs["methods"])
    failed = [
        (name, group["places"], operation)
        for name, groups in laws["layers"].items()
        for group in groups
        for operation, value in group["operations"].items()
        if value is False
    ]
    assert failed == []


def test_the_method_of_the_guide_is_the_one_that_the_laws_test() -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", (DOCS / "add_a_method.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code == (Path(peft.__file__).parent / "tuners" / "lora_xs.py").read_text(encoding="utf-8")
    assert sum(map(bool, code.splitlines())) < 45  # but for blank ones
