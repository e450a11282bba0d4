"""`accelerate launch` with each configuration file of `examples/distributed`: the adapter that is saved loads."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft import get_peft_model_state_dict


FOLDER = Path(__file__).parents[1] / "examples" / "distributed"
ENGINES = {"ddp": "MULTI_CPU", "fsdp1": "FSDP", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    """The adapter after two steps of one process, which has the rows of two in each."""
    script = runpy.run_path(str(FOLDER / "train.py"))
    net = script["model"]()
    optimizer = script["optimizer_of"](net)
    for ids in script["data"](2).split(4):
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return get_peft_model_state_dict(net)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("file", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_configuration_file(tmp_path: Path, alone: dict[str, torch.Tensor], file: str) -> None:
    """Two processes train on the engine that it names, and save what one process makes."""
    if ENGINES[file] == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{file}.yaml")]
    command += ["--main_process_port=0", "--mixed_precision=no"]
    if ENGINES[file] != "MULTI_CPU":  # accelerate offers the others to processes with an accelerator
        command.append(str(Path(__file__).with_name("as_accelerators.py")))
    command += [str(FOLDER / "train.py"), "--output", str(tmp_path), "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"2 processes ({ENGINES[file]})" in done.stdout, "the file did not start two processes on its engine"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == set(alone)
    for name, tensor in alone.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert any(t.any() for name, t in tensors.items() if "lora_B" in name), "it has learnt nothing"
