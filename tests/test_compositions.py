"""Compositions of adapters: what each expression means, on layers of every method, with rows, files and training."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, inputs
from in_blocks import differs, gives, logits, refused, stir
from laws import BATCH, Cell, cells, gradient, layers, over, parameters_of
from torch import nn

from peft import (
    Average,
    BatchSplit,
    CompositionConfig,
    Fuse,
    LoraConfig,
    Parallel,
    PeftModel,
    Stack,
    get_peft_model,
)
from peft.core.composition.expressions import from_dict
from peft.core.layer.composed import Fused
from peft.utils.error import ConfigError


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model cards take most of the time of a save, and are tested elsewhere."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)


def even(model: nn.Module, name: str) -> None:
    """Give a fusion uniform attention, and V = I."""
    with torch.no_grad():
        for _, layer in layers(model):
            fused = layer.adapters.get(name)
            for attention in fused.fusion.values() if isinstance(fused, Fused) else ():
                attention.query.weight.zero_()
                attention.query.bias.zero_()
                if attention.value is not None:
                    attention.value.weight.copy_(torch.eye(len(attention.value.weight)))


# --- laws of weights, over the registry ---------------------------------------------------------------------------

EVERY = 1 if os.environ.get("LAWS") == "all" else 9
CELLS = cells("several", "mixed", precisions=("float32", "bfloat16"), each_layer=False)


def whole(cell: Cell) -> bool:
    """Whether its adapters take the place of a module, of which one can act."""
    return cell.method.layer_cls.adapter_cls.any_module


@over(CELLS[::EVERY])
def test_the_laws_of_compositions(cell: Cell) -> None:
    model = cell.adapted("one", "two")
    alone = {"one": cell.run(model)}
    model.set_adapter("two")
    alone["two"] = cell.run(model)
    model.set_adapter(["one", "two"])
    both = cell.run(model)
    with model.disable_adapter():
        base = alone["__base__"] = cell.run(model)

    def run(expression: Any) -> torch.Tensor:
        model.set_adapter(expression)
        return cell.run(model)

    cell.near(run(Stack()), base, "an empty stack is the base")
    cell.near(run(Stack("one", "two")), both, "a stack of weights is the list")
    cell.near(run(Stack("one", Stack("two"))), both, "a stack in a stack")
    rows = run(BatchSplit("two", Stack("one", "two"), "__base__", batch_sizes=[1, 3, 2]))
    cell.near(rows[:1], alone["two"][:1], "a row is what it is alone")
    cell.near(rows[1:4], both[1:4], "a row of a stack", factor=2)
    cell.near(rows[4:], base[4:], "a row of the base")
    parts = Parallel("one", Stack("one", "two"), "__base__")
    for found, wanted in zip(parts.apart(run(parts)), (alone["one"], both, base)):
        cell.near(found, wanted, "a member of a Parallel", factor=2)
    if whole(cell):
        with pytest.raises(ValueError, match="copies of the whole module"):
            model.set_adapter(Average("one", "two"))
        return
    cell.near(run(Average("one")), alone["one"], "an average of one is that one")
    cell.near(run(Average("one", "two", weights=[1, 0])), alone["one"], "a weight of 1")
    if cell.place.affine and not cell.place.deep:
        mean = 0.75 * alone["one"] + 0.25 * alone["two"]
        cell.near(run(Average("one", "two", weights=[3, 1])), mean, "an average of outputs", factor=2)
    average = run(Average("one", "two"))
    if not cell.unmergeable:
        model.merge_adapter()
        cell.near(cell.run(model), average, "merged", factor=3)
        model.unmerge_adapter()
        cell.near(cell.run(model), average, "unmerged")
    try:
        model.add_composition("fused", Fuse("one", "two"), autocast_adapter_dtype=cell.autocast)
    except ValueError as error:
        assert "read by another computation" in str(error)
        return
    even(model, "fused")
    cell.near(run("fused"), average, "a fusion with uniform attention is the mean", factor=3)
    cell.near(run(Parallel("two", "fused"))[BATCH:], average, "in rows", factor=3)
    model.set_adapter("fused")
    with pytest.raises(ValueError, match="depends on the sample"):
        model.merge_adapter()


@over([cell for cell in CELLS if cell.precision == "float32" and not whole(cell)][4 % EVERY :: EVERY])
def test_rows_of_compositions_have_the_gradients_that_they_have_alone(cell: Cell) -> None:
    model = cell.adapted("one", "two")
    model.train(not any(type(layer.adapters["one"]).random_in_training for _, layer in layers(model)))
    mean = Average("one", "two", weights=[3, 1])
    found = {}
    for what in (Parallel("two", mean), "two", mean):
        model.set_adapter(what)
        model.set_requires_grad(["one", "two"], True)
        model.zero_grad()
        cell.loss(model).backward() if not isinstance(what, Parallel) else _twice(cell, model).backward()
        found[what] = [gradient(p).clone() for name in ("one", "two") for p in parameters_of(model, name)]
    together, *apart = found.values()
    for grad, first, second in zip(together, *apart):
        cell.near(grad, first + second, "gradient", factor=3)


def _twice(cell: Cell, model: nn.Module) -> torch.Tensor:
    """The loss of :meth:`Cell.loss` for each half of the rows."""
    output = model(*cell.inputs())
    half = len(output) // 2
    weight = torch.randn(output[:half].shape, generator=torch.Generator().manual_seed(5))
    return sum((part.float() * weight).flatten(1).mean(1).sum() for part in (output[:half], output[half:]))
