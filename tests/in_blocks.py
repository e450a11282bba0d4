"""What tests of methods in the blocks of a transformer have in common."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from architectures import ENCODER_DECODERS, build, inputs
from torch import nn

from peft import PeftModel
from peft.core.model.walk import layers_of


def logits(model: nn.Module, name: str, batch: int = 4, **kwargs: Any) -> torch.Tensor:
    """The output of a model in evaluation mode, without gradients."""
    given = {key: value for key, value in inputs(name, batch).items() if key != "labels"}
    if name in ENCODER_DECODERS:
        given["decoder_input_ids"] = given["input_ids"].flip(1)
    with torch.no_grad():
        return model.eval()(**given, **kwargs).logits


@functools.cache
def unadapted(name: str) -> torch.Tensor:
    """The output of a model without adapters."""
    return logits(build(name), name)


def stir(model: nn.Module, adapter: str = "default", seed: int = 3, size: float = 0.5) -> None:
    """Move an adapter's tensors away from their start, each once."""
    draw, seen = torch.Generator().manual_seed(seed), set()
    with torch.no_grad():
        for _, layer in layers_of(model):
            for p in layer.adapter_parameters(adapter):
                if id(p) not in seen:
                    seen.add(id(p))
                    p.add_(torch.randn(p.shape, generator=draw) * size)


def gives(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def differs(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() > 1e-3


def trains(model: nn.Module, name: str, steps: int = 4, rate: float = 0.1) -> None:
    """The loss falls, every parameter of the adapter gets a gradient within the steps, and no other one has any."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses, moved = [], [False] * len(parameters)
    for _ in range(steps):
        loss = model.eval()(**inputs(name)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        moved = [was or bool(p.grad.abs().max() > 0) for was, p in zip(moved, parameters, strict=True)]
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(moved)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def takes_turns(model: PeftModel, name: str) -> None:
    """The adapters "default" and "other" act alone, row by row in one batch, and without the other one."""
    alone = {"default": logits(model, name), "__base__": unadapted(name)}
    model.set_adapter("other")
    alone["other"] = logits(model, name)
    differs(alone["other"], alone["default"])
    rows = ["other", "__base__", "default", "other"]
    wanted = torch.stack([alone[row][i] for i, row in enumerate(rows)])
    gives(logits(model, name, adapter_names=rows), wanted)
    model.delete_adapter("other")
    gives(logits(model, name), alone["default"])


@contextmanager
def refused(model: nn.Module, message: str, errors: Any = ValueError) -> Iterator[None]:
    """What is done in the context is refused with this message, and leaves the modules of the model as they were."""
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(errors, match=message):
        yield
    assert [name for name, _ in model.named_modules()] == before
