"""The laws of `peft.testing` over every method, kind of layer and dtype: see `laws.py` for the table.

A test is one law; its cells are generated from the registry. Cells without meaning are tested to be refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import APART, COMBINED, REWRITING, cells, fields_of, methods, params
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.testing.cells import Cell, perturb
from peft.testing.checking import beside
from peft.testing.laws import IN_ONE_MODEL, LAWS, Law
from peft.tuners.lora import VARIANTS as VARIANTS_OF_LORA


def test_every_weight_method_of_the_registry_is_here() -> None:
    names = {method.name for method in methods()}
    assert {"lora", "ia3", "oft", "vera", "hira", "ln_tuning", "trainable_tokens"} <= names
    assert {cell.method.name for cell in cells()} == names


def _test_of(law: Law) -> Callable[[Cell], None]:
    def test(cell: Cell) -> None:
        law.run(cell)

    found = [cell for cell in cells(*law.operations, **law.which) if law.when(cell)]
    return pytest.mark.parametrize("cell", params(f"test_{law.name}", found))(test)


for _law in LAWS:
    globals()[f"test_{_law.name}"] = _test_of(_law)


def _pairs() -> list[Any]:
    """Each method inside and outside a LoRA, and around the next method of the registry."""
    found = cells(*IN_ONE_MODEL.operations, **IN_ONE_MODEL.which)
    (lora,) = (method for method in methods() if method.name == "lora")
    pairs = [pair for method in methods() for pair in beside(method, lora, found)]
    linear = [c for c in found if c.place.name == "Linear" and c.mixes]
    pairs += list(zip(linear, linear[1:]))
    named = {f"{first.method.name}-{second.id}": (first, second) for first, second in pairs}
    return [pytest.param(*pair, id=name) for name, pair in named.items()]


@pytest.mark.parametrize(("first", "second"), _pairs())
def test_adapters_of_two_methods_live_in_one_model(first: Cell, second: Cell) -> None:
    IN_ONE_MODEL.run(first, second)


# --- the variants of LoRA together ----------------------------------------------------------------------------


@pytest.mark.parametrize("combination", APART)
def test_variants_that_mean_nothing_together_are_refused(combination: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    with pytest.raises(ValueError, match=APART[combination]):
        get_peft_model(model, LoraConfig(target_modules=["0"], r=4, **fields_of(combination)))
    assert type(model[0]) is nn.Linear


REWRITABLE = ("rslora", "dora", "velora", "monteclora", "bias")
"""Variants that act on what such a start has left of the weight."""


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("variant", REWRITABLE)
def test_a_start_that_rewrites_the_base_leaves_the_output_of_a_variant(variant: str, start: str) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 12)), torch.randn(5, 8)
    fields = fields_of(variant) | {"init_lora_weights": start}
    with torch.no_grad():
        wanted, weight = base(x), base[0].weight.clone()
        model = get_peft_model(base, LoraConfig(target_modules=["0"], r=4, **fields)).eval()
        torch.testing.assert_close(model(x), wanted)
        layer = model.base_model.model[0]
        assert not torch.allclose(layer.base_layer.weight, weight)
        perturb(model, "default", 3)
        changed = model(x)
        assert not torch.allclose(changed, wanted, atol=0.1)
        model.merge_adapter()
        torch.testing.assert_close(model(x), changed)
        torch.testing.assert_close(model.unload()[0].weight, weight, rtol=0, atol=0)


def test_any_two_variants_are_combined_or_refused() -> None:
    names = ("dora", "alora", "mica", "bdlora", "kasa", "monteclora", "velora", "qalora", "arrow", "gated", "rslora")
    known = {frozenset(x.removesuffix("-a") for x in pair.split("+")) for pair in (*COMBINED, *APART)}
    elsewhere = {frozenset({"alora", "arrow"}), frozenset({"arrow", "rslora"})}  # with experts; nothing to scale
    assert {frozenset(pair) for pair in itertools.combinations((*names, "bias"), 2)} <= known | elsewhere
    started = {frozenset((name, start)) for name in (*names, "bias") if name != "mica" for start in REWRITING}
    assert started <= known | {frozenset((name, start)) for name in REWRITABLE for start in REWRITING}
    assert len(VARIANTS_OF_LORA) == len(names) - 1, "rsLoRA is no class of adapters"
