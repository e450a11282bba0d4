"""The examples in docstrings run, as a user would type them, on a small model and in an empty folder."""

from __future__ import annotations

import doctest
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from toys import tiny_llama

import peft


MODULES = (
    "auto",
    "config",
    "tools.base_state",
    "core.files.io",
    "core.files.state_dict",
    "core.model.tuner",
    "mapping",
    "mapping_func",
    "model_files",
    "peft_model",
    "tools.check_training",
    "tools.memory",
    "tools.out_of_memory",
    "tools.plots",
    "tools.preparation",
    "tools.status",
    "tuners.lora.conversion",
    "tuners.lora.hotswap",
    "tuners.lora.model",
)
"""Modules whose examples need nothing that is not given below."""

TYPED = (
    "ModelFiles.from_pretrained",
    "ModelFiles.load_adapter",
    "ModelFiles.save_pretrained",
    "PeftModel.add_adapter",
    "PeftModel.disable_adapter",
    "check_training",
    "convert_to_lora",
    "estimate_memory",
    "explain_out_of_memory",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "save_as_lora",
    "set_peft_model_state_dict",
)
"""What users type most has an example."""


def examples() -> Iterator[doctest.DocTest]:
    """Each docstring of the modules that has an example."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        module = importlib.import_module(f"peft.{name}")
        yield from (test for test in finder.find(module, f"peft.{name}") if test.examples)


FOUND = list(examples())


@pytest.mark.parametrize("example", FOUND, ids=lambda example: example.name)
def test_an_example_runs(example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ".plots." in example.name:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    base = tiny_llama()
    ids = torch.tensor([[3, 4, 5, 6]])
    given = {name: getattr(peft, name) for name in ("LoraConfig", "IA3Config", "PeftModel", "get_peft_model")}
    given |= {"nn": nn, "torch": torch, "os": os, "base": base, "batch": {"input_ids": ids, "labels": ids}}
    given |= {"AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    given["model"] = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    example.globs.update(given)
    told: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert failed == 0, "".join(told)


def test_what_users_type_has_an_example() -> None:
    have = {example.name for example in FOUND}
    assert [name for name in TYPED if not any(other.endswith(f".{name}") for other in have)] == []
