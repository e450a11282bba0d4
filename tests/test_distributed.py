"""Every method on every engine that spreads a model over processes: what one process gives, and what it saves.

Two processes wait for work (see ``distributed.py``); PEFT_TEST_PROCESSES=4 starts four.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import distributed
import pytest
import torch


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

SIZE = int(os.environ.get("PEFT_TEST_PROCESSES", "2"))
NEEDS = {"zero2": "deepspeed", "zero3": "deepspeed", "fsdp2_nf4": "bitsandbytes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("base"))
    distributed.save_base(path)
    return path


@pytest.fixture(scope="module")
def crew() -> Iterator[distributed.Crew]:
    with distributed.crew(SIZE) as made:
        yield made


@pytest.mark.parametrize("engine", distributed.ENGINES)
def test_three_steps(crew: distributed.Crew, folder: str, engine: str) -> None:
    """Losses, and the saved adapter, of each method."""
    if engine in NEEDS and importlib.util.find_spec(NEEDS[engine]) is None:
        pytest.skip(f"{NEEDS[engine]} is not installed")
    if engine == "tp" and SIZE > 2:
        pytest.skip("the base has two heads of keys")
    for method in distributed.METHODS:
        crew.run("cell", folder, engine, method)


@pytest.mark.parametrize("engine, method", [("ddp", "lora"), ("fsdp2", "lora"), ("fsdp2", "modules_to_save")])
def test_a_break_changes_nothing(crew: distributed.Crew, folder: str, tmp_path, engine: str, method: str) -> None:
    crew.run("resume", folder, engine, method, str(tmp_path))


@pytest.mark.parametrize("engine", ["fsdp2", "tp"])
def test_no_gathered_weight_stays(crew: distributed.Crew, folder: str, engine: str) -> None:
    for method in ("lora", "dora", "hira", "oft"):
        crew.run("gathers", folder, engine, method)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_each_process_has_rows_of_another_adapter(crew: distributed.Crew, folder: str, engine: str) -> None:
    crew.run("rows_of_each", folder, engine)


def test_processes_start_from_one_adapter(crew: distributed.Crew, folder: str) -> None:
    crew.run("starts_alike", folder)


@pytest.mark.parametrize("engine", ["fsdp2", "tp"])
def test_files_know_no_number_of_processes(crew: distributed.Crew, folder: str, tmp_path, engine: str) -> None:
    crew.run("files", folder, engine, str(tmp_path))


def test_memory_is_what_the_estimate_says(crew: distributed.Crew, folder: str) -> None:
    crew.run("bytes_of_each", folder)
