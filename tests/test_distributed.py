"""Every method on every engine that spreads a model over processes: what one process gives, and what it saves.

Two processes wait for work (see ``distributed.py``), and four for a part of it; PEFT_TEST_PROCESSES=4 has four do all
of it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import distributed
import pytest
import torch
from packaging.version import Version


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


@pytest.fixture(scope="module")
def four() -> Iterator[distributed.Crew]:
    with distributed.crew(4) as made:
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
    if engine == "zero3" and Version(version("deepspeed")) <= Version("0.19.0"):
        pytest.skip("DeepSpeed 0.19.0 keeps what it has gathered for a layer")
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
    for method in ("lora", "modules_to_save", "prompt"):
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


@pytest.mark.parametrize("engine", distributed.ENGINES)
def test_four_processes(four: distributed.Crew, folder: str, engine: str) -> None:
    needs(engine)
    for method in ("lora", "ia3"):
        four.run("cell", folder, engine, method)


@pytest.mark.parametrize("engine", distributed.ENGINES)
def test_another_number_of_processes_goes_on(
    crew: distributed.Crew, four: distributed.Crew, folder: str, tmp_path: Path, engine: str
) -> None:
    """Two from a checkpoint of four, and four from one of two; DeepSpeed's is converted to a universal one first."""
    needs(engine)
    zero = engine.startswith("zero")
    for before, after in ((four, crew), (crew, four)):
        for method in ("lora", "modules_to_save"):
            where = str(tmp_path / f"{method} of {len(before.processes)}")
            before.run("break_off", folder, engine, method, where)
            if zero:
                before.run("universal", where)
            after.run("go_on", folder, engine, method, where, False, zero)
