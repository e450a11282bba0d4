"""Adapter files that releases 0.2 to 0.17 wrote: `compat_matrix.py` made them, with the outputs of their models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compat_matrix import GOLDEN, build_base, describe, outputs
from safetensors.torch import load_file

from peft import PeftModel


OLD = GOLDEN / "old"
FILES = sorted(path.parent for path in OLD.glob("*/*/outputs.safetensors"))


def test_the_files_are_there():
    assert {folder.parent.name for folder in FILES} == {"0.2.0", "0.5.0", "0.8.2", "0.11.1", "0.14.0", "0.17.1"}


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("folder", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_old_file_gives_the_outputs_that_it_gave(folder: Path, low: bool):
    model = PeftModel.from_pretrained(build_base(describe(folder.name)), folder, low_cpu_mem_usage=low).eval()
    want = load_file(folder / "outputs.safetensors")["logits"]
    torch.testing.assert_close(outputs(model, folder.name), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("folder", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_old_file_is_written_anew(folder: Path, tmp_path: Path):
    record = describe(folder.name)
    model = PeftModel.from_pretrained(build_base(record), folder).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_base(record), tmp_path).eval()
    torch.testing.assert_close(outputs(again, folder.name), outputs(model, folder.name), rtol=0, atol=0)
