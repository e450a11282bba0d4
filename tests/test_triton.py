"""The Triton kernel equals plain torch, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


SCRIPT = """
import torch
from peft.kernels import gpu
from peft.kernels.grouped import GroupedLowRank

torch.manual_seed(0)
for tokens, inner, outer, rank in ((1, 70, 20, 3), (40, 24, 130, 17)):
    index = torch.tensor([0, 2, 1, 2])
    x = torch.randn(4, tokens, inner, requires_grad=True)
    down, up = torch.randn(3, rank, inner, requires_grad=True), torch.randn(3, rank, outer, requires_grad=True)
    y = torch.randn(4, tokens, outer)
    assert gpu.can_run(x, down)
    got = GroupedLowRank.apply(x, y.clone(), down, up, index, None)
    wanted = y + x @ down[index].mT @ up[index]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), (x, down, up))
    theirs = torch.autograd.grad((wanted * weights).sum(), (x, down, up))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)
print("equal")
"""


def test_grouped_products_and_their_gradients():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("equal"), done.stderr[-2000:]
