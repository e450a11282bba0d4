"""`accelerate launch` with each configuration file of `examples/distributed`: the adapter that is saved loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


FOLDER = Path(__file__).parents[1] / "examples" / "distributed"
GPU_ONLY = {
    "fsdp1": "accelerate's FSDP 1 refuses to run without an accelerator",
    "zero2": "without an accelerator, accelerate counts one process where DeepSpeed has two",
    "zero3": "without an accelerator, accelerate counts one process where DeepSpeed has two",
}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("file", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_configuration_file(tmp_path: Path, file: str) -> None:
    if file in GPU_ONLY:
        pytest.skip(GPU_ONLY[file])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{file}.yaml")]
    command += ["--main_process_port=0", str(FOLDER / "train.py"), "--output", str(tmp_path), "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # accelerate shards by FSDP on accelerators only
    assert "2 processes (MULTI_CPU)" in done.stdout, "the file did not start two processes that work together"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 8 and all(t.shape in ((4, 16), (16, 4), (8, 4)) for t in tensors.values())
    assert any(t.any() for name, t in tensors.items() if "lora_B" in name), "it has learnt nothing"
