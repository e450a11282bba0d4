"""Every method on every engine that spreads a model over processes: what one process gives, and what it saves.

Two processes wait for work (see ``distributed.py``); PEFT_TEST_PROCESSES=4 starts four.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

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


def needs(engine: str) -> None:
    if engine in NEEDS and importlib.util.find_spec(NEEDS[engine]) is None:
        pytest.skip(f"{NEEDS[engine]} is not installed")


@pytest.mark.parametrize("engine", distributed.ENGINES)
def test_three_steps(crew: distributed.Crew, folder: str, engine: str) -> None:
    """Losses, and the saved adapter, of each method."""
    needs(engine)
    for method in distributed.METHODS:
        crew.run("cell", folder, engine, method)


@pytest.mark.parametrize("engine", distributed.ENGINES)
def test_a_break_changes_nothing(crew: distributed.Crew, folder: str, tmp_path: Path, engine: str) -> None:
    """A checkpoint of torch's after two steps, the third from it: on as many processes, and on one."""
    needs(engine)
    for method in ("lora", "modules_to_save", "ia3"):
        where = str(tmp_path / method)
        crew.run("break_off", folder, engine, method, where)
        crew.run("go_on", folder, engine, method, where)
        if not engine.startswith("zero"):  # whose checkpoints are its own
            crew.run("go_on", folder, engine, method, where, True)


@pytest.mark.parametrize("engine", [name for name in distributed.ENGINES if name not in ("ddp", "zero2")])
def test_no_gathered_weight_stays(crew: distributed.Crew, folder: str, engine: str) -> None:
    needs(engine)
    for method in ("lora", "dora", "hira", "oft"):
        crew.run("gathers", folder, engine, method)


@pytest.mark.parametrize("engine", distributed.ENGINES)
def test_savings_change_nothing(crew: distributed.Crew, folder: str, engine: str) -> None:
    needs(engine)
    crew.run("savings", folder, engine, "lora")


@pytest.mark.parametrize("engine", distributed.TRAINERS)
def test_the_trainer(crew: distributed.Crew, folder: str, tmp_path: Path, engine: str) -> None:
    """By `fsdp`, `fsdp_config` and `deepspeed` of its arguments, as accelerate does it on accelerators."""
    needs(engine)
    for method in ("lora", "modules_to_save"):
        crew.run("trainer", folder, engine, method, str(tmp_path / method))


def test_values_on_the_first_process_alone(crew: distributed.Crew, folder: str) -> None:
    """By ``set_model_state_dict(broadcast_from_rank0=True)``; the others have the base on the meta device."""
    for method in ("lora", "dora", "modules_to_save", "prompt"):
        for emptied in (False, True):
            crew.run("loaded_by_the_first", folder, method, emptied)


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


def test_four_processes(crew: distributed.Crew, folder: str, tmp_path: Path) -> None:
    """Engines of every kind, and what four have saved goes on in two."""
    with distributed.crew(4) as four:
        for engine, method in (("fsdp2", "dora"), ("tp", "lora"), ("tp", "ia3")):
            four.run("cell", folder, engine, method)
        if importlib.util.find_spec("bitsandbytes") is not None:
            four.run("cell", folder, "fsdp2_nf4", "lora")
        for engine in ("fsdp1", "fsdp2"):
            four.run("break_off", folder, engine, "lora", str(tmp_path / engine))
    for engine in ("fsdp1", "fsdp2"):
        crew.run("go_on", folder, engine, "lora", str(tmp_path / engine))
