"""The laws: what holds for every method, on every kind of layer, in every dtype.

A law is a function of a cell that asserts something. It says which cells it is for: those in which some operations
mean something, in some precisions. What has no meaning is refused with the reason given for it: laws say that, too.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import re
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from peft.core.families import Copy, Output, Rotation, Rows, Scale
from peft.core.files.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping_func import get_peft_model
from peft.mixed_model import PeftMixedModel
from peft.peft_model import PeftModel
from peft.testing.cells import (
    DTYPES,
    Cell,
    base_weights,
    by_definition,
    equal_states,
    gradient,
    layers,
    parameters_of,
    perturb,
    state,
    weighted,
)
from peft.testing.places import BATCH
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from peft.tuners.lora.hotswap import hotswap_adapter


ONE = ("float32",)
TWO = ("float32", "bfloat16")
ALL = tuple(DTYPES)


@dataclass(frozen=True)
class Law:
    """A law, and which cells it is for, see :func:`peft.testing.cells.cells`."""

    check: Callable[..., None]
    operations: tuple[str, ...]
    which: dict[str, Any]
    when: Callable[[Cell], bool]

    @property
    def name(self) -> str:
        return self.check.__name__

    def run(self, *cells: Cell) -> None:
        """Check it. Model cards, which take most of the time of a save and are no matter of laws, are left out.

        Raises:
            AssertionError: if it does not hold.
        """
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            mock.patch.object(PeftModel, "create_or_update_model_card", lambda self, folder: None),
            tempfile.TemporaryDirectory() as folder,
        ):
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)
            self.check(*cells, Path(folder))


LAWS: list[Law] = []


def law(*operations: str, when: Callable[[Cell], bool] = lambda cell: True, **which: Any) -> Callable[[Any], Any]:
    """Enter a function of a cell, and of a folder if it takes one, among the laws."""

    def enter(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def without(cell: Cell, folder: Path) -> None:
            check(cell)

        takes_folder = len(inspect.signature(check).parameters) > 1
        LAWS.append(Law(check if takes_folder else without, operations, which, when))
        return check

    return enter


@contextmanager
def refused(phrase: str) -> Iterator[None]:
    """What is done in the context is refused with an error that says so.

    Args:
        phrase: a regular expression, found in the message.
    """
    try:
        yield
    except ValueError as error:
        assert re.search(phrase, str(error), re.DOTALL), (
            f"refused with {str(error)!r}, which says nothing of {phrase!r}"
        )
    else:
        raise AssertionError(f"this was not refused, though it has no meaning: {phrase!r}")


# --- 1 and 2: merging -----------------------------------------------------------------------------------------


@law("merge", precisions=ALL)
def merged_equals_unmerged_and_comes_out_again(cell: Cell) -> None:
    """1: forward = apply(x, fold(W)) + fold_bias(b). 2: unfold(fold(W)) = W."""
    model = cell.adapted("one", "two")
    before, base = cell.run(model), base_weights(cell.base())
    cell.apart(before, cell.run(cell.base()))
    for options in ({}, {"safe_merge": True}, {"adapter_names": ["one"]}):
        model.merge_adapter(**options)
        assert all(layer.merged_adapters == ["one"] for _, layer in layers(model))
        cell.near(cell.run(model), before, f"merged with {options}")
        model.unmerge_adapter()
        assert not any(layer.merged for _, layer in layers(model))
        _same_base(cell, model, base, f"unmerged after {options}")
        cell.near(cell.run(model), before, "unmerged")
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(cell.base().state_dict()) or cell.method.shifts
    cell.near(cell.run(merged), before, "unloaded")


@law("merge", precisions=ONE, switches=False, each_layer=False)
def an_inactive_adapter_is_merged_by_name(cell: Cell) -> None:
    """1, for an adapter that is not the active one."""
    model = cell.adapted("one", "two")
    model.set_adapter("two")
    wanted = cell.run(model)
    model.set_adapter("one")
    merged = model.merge_and_unload(adapter_names=["two"])
    cell.near(cell.run(merged), wanted, "the other adapter")


@law("merge", precisions=ONE, switches=False, each_layer=False)
def a_safe_merge_leaves_nothing_behind(cell: Cell) -> None:
    """A merge that would write NaN is refused before it writes anything."""
    model = cell.adapted("one")
    base = base_weights(cell.base())
    with torch.no_grad():
        for p in parameters_of(model, "one"):
            p.fill_(float("nan"))
    with refused("NaN"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for _, layer in layers(model))
    _same_base(cell, model, base, "after the refused merge", exact=True)


def _same_base(cell: Cell, model: PeftModel, wanted: dict, what: str, exact: bool = False) -> None:
    """The base model's weights: the same bits where the layer keeps the original, else but for rounding."""
    exact = exact or not all(layer.adapter_cls.reversible for _, layer in layers(model))
    found = base_weights(model)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if exact:
            assert torch.equal(found[key], value), f"{what}: {key}"
        else:
            cell.near(found[key], value, f"{what}: {key}", factor=0.5 if cell.dtype == torch.float32 else 1)


# --- 3: mixed batches -----------------------------------------------------------------------------------------

ROWS = ["two", "one", "__base__", "one", "one", "two"]  # a permutation that is not its own inverse
assert len(ROWS) == BATCH


@law("mixed", precisions=TWO)
def a_row_of_a_mixed_batch_has_the_value_of_its_adapter_alone(cell: Cell) -> None:
    """3, in evaluation mode without gradients, where torch takes its fast path if it can."""
    model = cell.adapted("one", "two")
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = cell.run(model)
    with model.disable_adapter():
        alone["__base__"] = cell.run(model)
    mixed = cell.run(model, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        cell.near(mixed[row], alone[name][row], f"row {row}, {name}")
    cell.apart(alone["one"], alone["two"])
    cell.near(cell.run(model), alone["two"], "the next call, without names")
    for name in alone:
        cell.near(cell.run(model, adapter_names=[name] * BATCH), alone[name], f"all rows {name}")


@law("mixed", precisions=TWO)
def a_row_of_a_mixed_batch_has_the_gradient_of_its_adapter_alone(cell: Cell) -> None:
    """3, in training mode, but where that draws random numbers."""
    model = cell.adapted("one", "two")
    # No two passes would draw alike.
    model.train(not any(type(layer.adapters["one"]).random_in_training for _, layer in layers(model)))
    _rows_train_their_adapters(cell, model)


def _rows_train_their_adapters(cell: Cell, model: PeftModel) -> None:
    def gradients(rows: list[str], *of: str, **names: list[str]) -> dict[str, list[torch.Tensor]]:
        model.set_requires_grad(["one", "two"], True)
        model.zero_grad()
        cell.loss(model, torch.tensor([float(name in of) for name in rows]), **names).backward()
        return {name: [gradient(p).clone() for p in parameters_of(model, name)] for name in of if name != "__base__"}

    mixed = gradients(ROWS, "one", "two", "__base__", adapter_names=ROWS)
    for name in ("one", "two"):
        model.set_adapter(name)
        alone = gradients(ROWS, name)[name]
        assert any(grad.any() for grad in mixed[name])
        for found, wanted in zip(mixed[name], alone):
            cell.near(found, wanted, name, factor=2)


# --- 4: files -------------------------------------------------------------------------------------------------


@law(precisions=TWO)
def what_is_loaded_is_what_was_saved(cell: Cell, folder: Path) -> None:
    """4: load(save(m)) = m, into a fresh base, without memory for a first draw, and beside another adapter."""
    model = cell.adapted("default")
    wanted, tensors = cell.run(model), get_peft_model_state_dict(model)
    model.save_pretrained(folder)
    held = load_file(folder / "adapter_model.safetensors")
    assert held.keys() == tensors.keys() and held
    assert all(torch.equal(held[key], value) for key, value in tensors.items())
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            cell.base(), folder, autocast_adapter_dtype=cell.autocast, low_cpu_mem_usage=low
        )
        _same_tensors(get_peft_model_state_dict(loaded), tensors)
        assert not any(p.is_meta or p.requires_grad for p in loaded.parameters())
        # the very same tensors, but those of a mapped file lie at other addresses, which may move a last bit
        torch.testing.assert_close(cell.run(loaded), wanted, msg=f"low_cpu_mem_usage={low}")
    other = cell.adapted("other")
    before = cell.run(other)
    result = other.load_adapter(folder, "default2", autocast_adapter_dtype=cell.autocast)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(cell.run(other), before)
    other.set_adapter("default2")
    torch.testing.assert_close(cell.run(other), wanted)


@law(precisions=ONE, switches=False, each_layer=False)
def pickled_weights_load_as_well(cell: Cell, folder: Path) -> None:
    """4, in the older file format."""
    model = cell.adapted("default")
    model.save_pretrained(folder, safe_serialization=False)
    assert (folder / "adapter_model.bin").exists() and not (folder / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(cell.base(), folder)
    _same_tensors(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    # not to the bit: products of some processors depend on where in memory the same numbers lie
    torch.testing.assert_close(cell.run(loaded), cell.run(model))


@law(precisions=ONE, switches=False, each_layer=False)
def no_adapter_name_is_special(cell: Cell, folder: Path) -> None:
    """Names that are numbers of modules, names of tensors, or beginnings of other names."""
    names = ["default", "0", next(iter(cell.method.layer_cls.adapter_cls.parts)), "default2", "layer"]
    model = cell.adapted(*names)
    wanted = {}
    for name in names:
        model.set_adapter(name)
        wanted[name] = cell.run(model)
    model.save_pretrained(folder)
    keys = {name: set(get_peft_model_state_dict(model, adapter_name=name)) for name in names}
    assert all(found == keys["default"] for found in keys.values())
    folders = {name: folder if name == "default" else folder / name for name in names}
    loaded = PeftModel.from_pretrained(cell.base(), folders[names[1]], names[1])
    for name in names:
        if name != names[1]:
            assert loaded.load_adapter(folders[name], name) == ([], [])
    for name in names:
        loaded.set_adapter(name)
        assert torch.equal(cell.run(loaded), wanted[name]), name


def _same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


# --- 5 and 6: fresh adapters ----------------------------------------------------------------------------------


@law(precisions=TWO)
def a_fresh_adapter_changes_nothing(cell: Cell) -> None:
    """5, and its opposite for the rows that start at random."""
    base, fresh = cell.run(cell.base()), cell.run(cell.fresh("default"))
    if not cell.method.identity:
        if cell.dtype == torch.float32 or cell.method.times == 1:  # 16 bits might not show it
            cell.apart(fresh, base)
    else:
        cell.near(fresh, base, factor=0.5)


@law(precisions=TWO, switches=False, each_layer=False)
def the_same_seed_gives_the_same_tensors(cell: Cell) -> None:
    """6."""
    first, second, other = (get_peft_model_state_dict(cell.fresh("default", seed=seed)) for seed in (3, 3, 4))
    _same_tensors(first, second)
    assert first.keys() == other.keys()


# --- 7: switched off ------------------------------------------------------------------------------------------


@law(precisions=TWO)
def switched_off_adapters_leave_the_base_model(cell: Cell) -> None:
    """7."""
    base = cell.run(cell.base())
    model = cell.adapted("one", "two")
    before = cell.run(model)
    with model.disable_adapter():
        _is_base(cell, cell.run(model), base)
        assert not any(p.requires_grad for p in model.parameters())
    cell.near(cell.run(model), before, "back again")
    model.base_model.disable_adapter_layers()
    _is_base(cell, cell.run(model), base)
    with model.disable_adapter():
        _is_base(cell, cell.run(model), base)
    _is_base(cell, cell.run(model), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(cell.run(model), before)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in parameters_of(model, "one")}


@law("merge", precisions=ONE, each_layer=False)
def switched_off_adapters_leave_the_base_model_even_if_merged(cell: Cell) -> None:
    """7."""
    base = cell.run(cell.base())
    model = cell.adapted("one")
    before = cell.run(model)
    model.merge_adapter()
    with model.disable_adapter():
        cell.near(cell.run(model), base, "merged, switched off")
    cell.near(cell.run(model), before, "back again")


def _is_base(cell: Cell, found: torch.Tensor, base: torch.Tensor) -> None:
    if cell.place.fast_path:
        cell.near(found, base)
    else:
        assert torch.equal(found, base)


# --- 8: several adapters --------------------------------------------------------------------------------------


@law("merge", "several", precisions=TWO)
def two_active_adapters_are_what_their_family_says(cell: Cell) -> None:
    """8: each sees the unmerged W; merged equals unmerged for two as well, at once or one after the other."""
    model = cell.adapted("one", "two")
    wanted = cell.run(by_definition(cell, model, ["one", "two"]))
    half = wanted
    turns: Any = cell.method.layer_cls.adapter_cls if cell.method.is_a(Rotation) else None
    if turns and cell.place.kind != "Embedding" and not turns.last_comes_first:  # what is merged is next to the weight
        half = cell.run(by_definition(cell, model, ["two", "one"]))
    one = cell.run(model)
    model.base_model.set_adapter(["one", "two"])
    both = cell.run(model)
    cell.near(both, wanted, "two active adapters", factor=2)
    cell.apart(both, one)
    base = base_weights(cell.base())
    model.merge_adapter()
    cell.near(cell.run(model), wanted, "both merged", factor=2)
    model.unmerge_adapter()
    _same_base(cell, model, base, "both unmerged")
    model.merge_adapter(["one"])
    cell.near(cell.run(model), half, "one merged, the other active", factor=2)
    model.merge_adapter(["two"])
    cell.near(cell.run(model), wanted, "one merged after the other", factor=2)
    model.unmerge_adapter()
    cell.near(cell.run(model), wanted, "unmerged again", factor=2)
    _same_base(cell, model, base, "one after the other unmerged")


@law(
    "several",
    precisions=ONE,
    when=lambda cell: cell.unmergeable and cell.place.affine and not cell.method.is_a(Output),
)
def two_active_adapters_add_up_where_no_weight_shows_it(cell: Cell) -> None:
    """8, for updates that are no weight: the outputs add up, on layers whose output is affine in the weight."""
    model = cell.adapted("one", "two")
    base, one = cell.run(cell.base()), cell.run(model)
    model.base_model.set_adapter(["two"])
    two = cell.run(model)
    model.base_model.set_adapter(["one", "two"])
    cell.near(cell.run(model), one + two - base)


@law("several", precisions=ONE, when=lambda cell: cell.unmergeable and cell.method.is_a(Output))
def two_active_output_maps_follow_each_other_where_no_weight_shows_it(cell: Cell) -> None:
    """8, for maps of the output that are no weight: what comes out of one goes into the next."""
    model, base = cell.adapted("one", "two"), cell.base()
    model.base_model.set_adapter(["one", "two"])
    (_, layer), axis = layers(model)[0], 1
    wanted = cell.run(base) / base.gain
    for name in ("one", "two"):
        matrix = layer.adapters[name].map_output(torch.eye(layer.out_features)).detach()  # transposed: rows are images
        wanted = (wanted.movedim(axis, -1) @ matrix).movedim(-1, axis)
    cell.near(cell.run(model), wanted * base.gain)


@law("merge", "delta", precisions=ONE)
def the_delta_weight_is_what_merging_adds(cell: Cell) -> None:
    """1, for `get_delta_weight`."""
    model = cell.adapted("one")
    deltas = {key: layer.get_delta_weight("one").detach() for key, layer in _by_weight(model)}
    before = {key: _stored(layer) for key, layer in _by_weight(model)}
    model.merge_adapter()
    for key, layer in _by_weight(model):
        assert deltas[key].shape == before[key].shape
        assert deltas[key].any() or cell.method.shifts  # which changes the bias alone
        cell.near(_stored(layer), before[key] + deltas[key], str(key))
        cell.near(layer.get_delta_weight("one").detach(), deltas[key], "while merged")


@law("merge", "delta", "lora", precisions=ONE)
def a_lora_of_full_rank_says_the_same(cell: Cell, folder: Path) -> None:
    """Conversion to LoRA with all ranks loses nothing."""
    model = cell.adapted("one")
    before = state(model)
    save_as_lora(folder, model, 1.0, "one")
    equal_states(state(model), before)
    lora = PeftModel.from_pretrained(cell.base(), folder).eval()
    cell.near(cell.run(lora), cell.run(model), factor=3)  # a decomposition rounds, too


@law("delta", precisions=ONE, refused=True, switches=False)
def what_is_no_change_of_a_weight_is_no_lora(cell: Cell) -> None:
    """And what is no change of a weight is not converted."""
    with refused(cell.phrase("delta")):
        convert_to_lora(cell.fresh("one"), 2, "one")


@law("merge", "delta", "lora", precisions=ONE, switches=False, when=lambda cell: cell.place.typical)
def a_lora_of_full_rank_says_the_weighted_sum_of_two(cell: Cell, folder: Path) -> None:
    """Nor does the conversion of a weighted sum."""
    model, weights = cell.adapted("one", "two"), {"one": 0.5, "two": -1.5}
    wanted = cell.run(weighted(cell, model, weights))
    save_as_lora(folder, model, 1.0, ["one", "two"], weights=list(weights.values()))
    cell.near(cell.run(PeftModel.from_pretrained(cell.base(), folder).eval()), wanted, factor=4)


# --- weighted combinations ------------------------------------------------------------------------------------


@law("merge", "combine", precisions=TWO, when=lambda cell: cell.place.typical)
def a_weighted_combination_does_the_weighted_sum(cell: Cell, folder: Path) -> None:
    """It is an adapter like others: inactive, saved, loaded."""
    model, weights = cell.adapted("one", "two"), {"one": 0.5, "two": -1.5}
    one = cell.run(model)
    _combine(model, weights)
    assert torch.equal(cell.run(model), one) and model.active_adapters == ["one"]
    wanted = cell.run(weighted(cell, model, weights, as_scales=cell.method.is_a(Scale)))
    model.set_adapter("sum")
    cell.near(cell.run(model), wanted, factor=3)
    if cell.dtype == torch.float32:
        cell.apart(cell.run(model), one)
    model.save_pretrained(folder, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(cell.base(), folder / "sum", autocast_adapter_dtype=cell.autocast)
    cell.near(cell.run(loaded), cell.run(model), "loaded")


@law("combine", precisions=ONE, refused=True, when=lambda cell: cell.place.typical)
def adapters_without_a_sum_are_not_combined(cell: Cell) -> None:
    """What has no sum is refused, and nothing is added."""
    model = cell.adapted("one", "two")
    before, held = cell.run(model), state(model)
    with refused(cell.phrase("combine")):
        _combine(model, {"one": 0.5, "two": 1.5})
    assert list(model.peft_config) == ["one", "two"]
    equal_states(state(model), held)
    assert torch.equal(cell.run(model), before)


def _combine(model: PeftModel, weights: dict[str, float]) -> None:
    known = inspect.signature(model.base_model.add_weighted_adapter).parameters
    exact = {"combination_type": "cat"} if "combination_type" in known else {}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", **exact)


def _by_weight(model: PeftModel) -> list[tuple[tuple[str, str], Any]]:
    return [((key, layer.kind.weight), layer) for key, layer in layers(model)]


def _stored(layer: Any) -> torch.Tensor:
    return getattr(layer.get_base_layer(), layer.kind.weight).detach().clone()


# --- 9 and 10: adding, deleting, unloading --------------------------------------------------------------------


@law(precisions=ONE, switches=False, each_layer=False)
def adapters_do_not_touch_each_other(cell: Cell) -> None:
    """9: adding, activating and deleting leave the others' outputs; only the active one trains."""
    model = cell.adapted("one", "two")
    one = cell.run(model)
    model.set_adapter("two")
    two = cell.run(model)
    cell.add(model, "three")
    perturb(model, "three", 33)
    assert torch.equal(cell.run(model), two)
    model.set_adapter("three")
    three = cell.run(model)
    cell.apart(three, one)
    model.set_adapter("one")
    assert torch.equal(cell.run(model), one)
    trained = {id(p) for p in parameters_of(model, "one")}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    cell.loss(model.train()).backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == trained
    model.eval().delete_adapter("two")
    assert not any("two" in layer for _, layer in layers(model)) and "two" not in model.peft_config
    assert torch.equal(cell.run(model), one)
    model.delete_adapter("one")  # the active one: another takes its place
    assert model.active_adapters == ["three"]
    assert torch.equal(cell.run(model), three)


@law(precisions=TWO, switches=False)
def unloading_gives_the_base_model_back(cell: Cell) -> None:
    """10: the same names, types and bits."""
    base = cell.base()
    wanted, types, out = state(base), [type(m) for m in base.modules()], cell.run(base)
    model = cell.adapted("one", "two")
    cell.run(model)
    plain = model.unload()
    equal_states(plain.state_dict(), wanted)
    assert [type(m) for m in plain.modules()] == types
    assert not any(p.requires_grad for p in plain.parameters())
    assert not hasattr(plain, "peft_config")
    assert torch.equal(cell.run(plain), out)


@law("merge", precisions=ONE, switches=False, each_layer=False)
def unloading_a_merged_model_gives_the_base_model_back(cell: Cell) -> None:
    """10, while an adapter is merged: its names, and its numbers but for rounding."""
    wanted = state(cell.base())
    model = cell.adapted("one")
    exact = not all(layer.adapter_cls.reversible for _, layer in layers(model))
    model.merge_adapter()
    found = model.unload().state_dict()
    if exact:
        equal_states(found, wanted)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        cell.near(found[key], value, key)


# --- 11: gradients --------------------------------------------------------------------------------------------


@law(precisions=TWO)
def gradients_reach_every_tensor_of_the_adapter_and_none_of_the_base(cell: Cell) -> None:
    """11."""
    model = cell.adapted("one").train()
    cell.loss(model).backward()
    own = {id(p) for p in parameters_of(model, "one")}
    for name, p in model.named_parameters():
        if id(p) in own:
            assert p.requires_grad and p.grad is not None and p.grad.isfinite().all(), name
            assert p.grad.any() or p.numel() == 1, name  # what shifts all features alike is nothing before a norm
            assert p.grad.dtype == p.dtype == (torch.float32 if cell.autocast else cell.dtype), name
        else:
            assert not p.requires_grad and p.grad is None, name
    assert own


@law(precisions=ONE, when=lambda cell: cell.place.name in ("Linear[no-bias]", "Embedding"))
def a_training_step_multiplies_by_no_identity_matrix(cell: Cell) -> None:
    """11, at its price: products with vectors, not with a matrix of all inputs or outputs."""
    model, eye = cell.adapted("one").train(), torch.eye
    sizes = {size for _, layer in layers(model) for size in (layer.in_features, layer.out_features)}

    def small(n: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert n not in sizes, f"an identity matrix of {n} x {n}"
        return eye(n, *args, **kwargs)

    with mock.patch.object(torch, "eye", small):
        cell.loss(model).backward()


@law("merge", precisions=ONE, when=lambda cell: cell.differentiable)
def the_gradient_is_that_of_the_merged_weight(cell: Cell) -> None:
    """11, in value: a small step changes the merged model's loss by what the gradient says."""
    model = cell.adapted("one")
    cell.loss(model).backward()
    own = parameters_of(model, "one")
    generator, moved = torch.Generator().manual_seed(7), []
    steps = [torch.randn(p.shape, generator=generator) * 1e-3 for p in own]
    for sign in (1, -1):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p, step in zip(parameters_of(other, "one"), steps):
                p.add_(step, alpha=sign)
            moved.append(cell.loss(other.merge_and_unload()).item())
    expected = sum((gradient(p) * step).sum() for p, step in zip(own, steps)).item()
    assert abs((moved[0] - moved[1]) / 2 - expected) <= max(0.03 * abs(expected), 3e-6)


@law(precisions=ONE, each_layer=False, when=lambda cell: cell.inputs()[0].is_floating_point())
def inputs_are_held_through_autograd_alone(cell: Cell) -> None:
    """11, at its price: what a checkpointed block takes back from autograd is gone, no layer holds on to its input."""
    mixes = cell.refusal("mixed") is None
    model = cell.adapted("one", "two").train() if mixes else cell.adapted("one").train()
    for kwargs in ({}, {"adapter_names": ROWS})[: 1 + mixes]:
        seen: list[weakref.ref[torch.Tensor]] = []
        note = lambda module, args: seen.append(weakref.ref(args[0]))  # noqa: B023, E731
        hooks = [layer.register_forward_pre_hook(note) for _, layer in layers(model)]
        run = lambda x, *others: model(x * 1, *others, **kwargs)  # noqa: B023, E731
        y = checkpoint(run, *cell.inputs(), use_reentrant=False)
        assert seen and y.requires_grad
        assert all(x() is None for x in seen), f"inputs are held, {kwargs}"
        for hook in hooks:
            hook.remove()


# --- 12: copies -----------------------------------------------------------------------------------------------


@law(precisions=ONE, switches=False, each_layer=False)
def a_copy_stands_alone(cell: Cell) -> None:
    """12: deepcopy, a pickle of the whole model, and its state dict; of a model whose step is under way, too."""
    model = cell.adapted("one", "two").train()
    under_way = model(*cell.inputs())
    before = cell.run(model.eval())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert under_way.requires_grad and torch.equal(cell.run(other), before)
        equal_states(other.state_dict(), model.state_dict())
        perturb(other, "one", 21)
        cell.apart(cell.run(other), before)
        assert torch.equal(cell.run(model), before)
        other.set_adapter("two")
        if cell.refusal("mixed") is None:
            cell.run(other, adapter_names=ROWS)
        assert torch.equal(cell.run(model), before) and model.active_adapters == ["one"]
    fresh = cell.fresh("one", "two", seed=9)
    assert fresh.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(cell.run(fresh), before)


# --- hot-swap -------------------------------------------------------------------------------------------------


@law(precisions=ONE, when=lambda cell: cell.place.typical)
def an_adapter_swapped_in_is_the_one_that_was_saved(cell: Cell, folder: Path) -> None:
    """Its tensors are written into the parameters that are there; other adapters keep theirs."""
    model, other = cell.adapted("one", "two"), cell.fresh("one")
    perturb(other, "one", 21)
    other.save_pretrained(folder)
    before, wanted = cell.run(model), cell.run(other)
    cell.apart(wanted, before)
    held = {name: id(p) for name, p in model.named_parameters()}
    model.set_adapter("two")
    two = cell.run(model)
    hotswap_adapter(model, folder / "one", "one")
    assert {name: id(p) for name, p in model.named_parameters()} == held
    assert torch.equal(cell.run(model), two)
    model.set_adapter("one")
    torch.testing.assert_close(cell.run(model), wanted)
    if not cell.unmergeable:
        cell.near(cell.run(model.merge_and_unload()), wanted, "merged")


# --- adapters of several methods ------------------------------------------------------------------------------


def two_methods_live_in_one_model(first: Cell, second: Cell, folder: Path) -> None:
    """3, 4, 7, 8, 10 in a PeftMixedModel, for the cells of two methods on one layer."""
    both = {"one": first, "two": second}
    model = get_peft_model(first.base(), first.config(), "one", mixed=True)
    if second.method.is_a(Copy):
        with refused("which a copy of the whole module would hide"):
            model.add_adapter("two", second.config())
        assert list(model.peft_config) == ["one"] and not any("two" in layer for _, layer in layers(model))
        return
    model.add_adapter("two", second.config(second=first.method is second.method))
    model.eval()
    alone = {"__base__": first.run(first.base())}
    for i, (name, cell) in enumerate(both.items()):
        perturb(model, name, 10 + i)
        model.set_adapter(name)
        alone[name] = cell.run(model)
        single = get_peft_model(cell.base(), model.peft_config[name], "other").eval()
        set_peft_model_state_dict(single, get_peft_model_state_dict(model, adapter_name=name), "other")
        cell.near(cell.run(single), alone[name], name)
    mixed = first.run(model, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        first.near(mixed[row], alone[name][row], f"row {row}, {name}")
    _rows_train_their_adapters(first, model)
    model.set_adapter(["one", "two"])
    together, base = first.run(model), base_weights(first.base())
    for output in alone.values():
        first.apart(together, output)
    if not first.unmergeable and not second.unmergeable:
        model.merge_adapter()
        first.near(first.run(model), together, "merged", factor=2)
        model.unmerge_adapter()
        _near_base(first, base_weights(model), base, "unmerged")
    model.save_pretrained(folder)
    for order in (["one", "two"], ["two", "one"]):
        if both[order[1]].method.is_a(Copy):
            continue
        loaded = PeftMixedModel.from_pretrained(first.base(), folder / order[0], order[0])
        loaded.load_adapter(folder / order[1], order[1])
        for name in order:
            loaded.set_adapter(name)
            first.near(first.run(loaded), alone[name], f"{name} loaded")
        loaded.set_adapter(["one", "two"])
        if order == ["one", "two"]:
            first.near(first.run(loaded), together, "both loaded")
    model.delete_adapter("one")
    model.set_adapter("two")
    second.near(second.run(model), alone["two"], "the other deleted")
    _near_base(first, state(model.unload()), state(first.base()), "unloaded")


IN_ONE_MODEL = Law(
    two_methods_live_in_one_model, ("mixed",), {"precisions": ONE, "switches": False}, lambda cell: True
)
"""The law of pairs, of which :data:`LAWS` has none."""


def _near_base(cell: Cell, found: dict, wanted: dict, what: str) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        cell.near(found[key], value, f"{what}: {key}")


# --- an adapter that adapts only some of the layers -----------------------------------------------------------


PART = {"Linear": "blocks.1.layer", "MultiheadAttention[masked]": "attn.out_proj"}
"""Layer -> the part of it that the second adapter adapts alone."""


@law("several", precisions=ONE, when=lambda cell: cell.place.name in PART)
def adapters_may_adapt_different_layers(cell: Cell, folder: Path) -> None:
    """3, 4, 10 where a second adapter adapts only some of the layers."""
    part = PART[cell.place.name]
    model = cell.adapted("both")
    both, base = cell.run(model), cell.run(cell.base())
    model.add_adapter("last", cell.config(second=True, target_modules=[part]))
    perturb(model, "last", 12)
    assert torch.equal(cell.run(model), both)
    model.set_adapter("last")
    last = cell.run(model)
    cell.apart(last, both)
    for rows in (["both", "last", "__base__"] * 2, ["last", "__base__"] * 3, ["last"] * BATCH):
        mixed = cell.run(model, adapter_names=rows)
        for row, name in enumerate(rows):
            cell.near(mixed[row], {"both": both, "last": last, "__base__": base}[name][row], f"{name} of {rows}")
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(cell.base(), folder / "last")
    assert [key for key, _ in layers(loaded)] == [part]
    assert torch.equal(cell.run(loaded), last)
    model.delete_adapter("both")
    assert torch.equal(cell.run(model), last)
    equal_states(model.unload().state_dict(), state(cell.base()))


# --- what adapters train beside their layers ------------------------------------------------------------------


@law(precisions=TWO, switches=False, when=lambda cell: cell.place.name == "Linear")
def what_is_trained_beside_the_layers_keeps_the_laws(cell: Cell, folder: Path) -> None:
    """3, 4, 7, 9, 10, 12 for `modules_to_save` and for trained biases."""
    own = getattr(cell.method.config_cls, "OWN_BIAS", None)
    for name, value in (("modules_to_save", ["blocks.1.layer"]), ("bias", own), ("bias", "all")):
        if cell.method.has(name) and value:
            _beside(cell, {name: value}, folder)


def _beside(cell: Cell, fields: dict[str, Any], folder: Path) -> None:
    config = cell.config(target_modules=["blocks.0.layer"], **fields)
    model = get_peft_model(cell.base(), config, autocast_adapter_dtype=cell.autocast).eval()
    base = cell.run(cell.base())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((torch.randn(p.shape) * 0.3).to(p.dtype))
    before, tensors = cell.run(model), get_peft_model_state_dict(model)
    cell.apart(before, base)
    with model.disable_adapter():
        assert torch.equal(cell.run(model), base)
    assert torch.equal(cell.run(model), before)
    model.save_pretrained(folder)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = PeftModel.from_pretrained(cell.base(), folder, autocast_adapter_dtype=cell.autocast)
    for other in (loaded, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(cell.run(other), before)
        _same_tensors(get_peft_model_state_dict(other), tensors)
        with other.disable_adapter():
            assert torch.equal(cell.run(other), base)
        other.delete_adapter("default")
        assert torch.equal(cell.run(other), base) and torch.equal(cell.run(model), before)
    if cell.refusal("merge") is None:
        cell.near(cell.run(copy.deepcopy(model).merge_and_unload()), before)
    equal_states(model.unload().state_dict(), state(cell.base()))


# --- the holes ------------------------------------------------------------------------------------------------


@law("adapt", precisions=ONE, refused=True)
def a_layer_that_cannot_be_adapted_is_refused(cell: Cell) -> None:
    """The error gives the reason, and the model is what it was."""
    model = cell.base()
    before, types, out = state(model), [type(m) for m in model.modules()], cell.run(model)
    with refused(cell.phrase("adapt")):
        get_peft_model(model, cell.config())
    equal_states(model.state_dict(), before)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(cell.run(model), out)


@law("merge", precisions=ONE, refused=True)
def an_adapter_that_is_no_weight_is_not_merged(cell: Cell) -> None:
    """The same for merging, deltas and conversion."""
    model = cell.adapted("one")
    phrase, before, held = cell.phrase("merge"), cell.run(model), state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(phrase):
            merge()
        assert not any(layer.merged for _, layer in layers(model))
        equal_states(model.state_dict(), held)
        assert torch.equal(cell.run(model), before)
    with refused(phrase):
        layers(model)[0][1].get_delta_weight("one")
    with refused(phrase):
        convert_to_lora(model, 1, "one")


@law("delta", precisions=ONE, refused=True)
def an_adapter_that_is_no_change_of_a_weight_has_no_delta(cell: Cell) -> None:
    """The same for the delta alone."""
    model = cell.adapted("one")
    with refused(cell.phrase("delta")):
        layers(model)[0][1].get_delta_weight("one")


@law("several", precisions=ONE, refused=True)
def adapters_that_exclude_each_other_are_not_active_together(cell: Cell) -> None:
    """The same for several active adapters."""
    model = cell.adapted("one", "two")
    before = cell.run(model)
    with refused(cell.phrase("several")):
        model.base_model.set_adapter(["one", "two"])
    assert model.active_adapters == ["one"]
    assert torch.equal(cell.run(model), before)


@law(precisions=ONE, when=lambda cell: cell.method.is_a(Rows))
def two_adapters_of_the_same_token_exclude_each_other(cell: Cell) -> None:
    """The same for rows of one table."""
    model = cell.adapted("one")
    before = cell.run(model)
    cell.add(model, "same")
    with refused("replace the same token rows"):
        model.base_model.set_adapter(["one", "same"])
    assert torch.equal(cell.run(model), before)


@law("mixed", precisions=ONE, refused=True)
def rows_that_cannot_be_told_apart_are_refused(cell: Cell) -> None:
    """The same for mixed batches."""
    model = cell.adapted("one", "two")
    before = cell.run(model)
    with refused(cell.phrase("mixed")):
        cell.run(model, adapter_names=ROWS)
    assert torch.equal(cell.run(model), before)


@law("merge", precisions=ONE, when=lambda cell: cell.method.is_a(Copy))
def copies_are_merged_one_at_a_time(cell: Cell) -> None:
    """Copies cannot be merged on top of each other."""
    model = cell.adapted("one", "two")
    with refused("one adapter can be active at a time"):
        model.merge_adapter(["one", "two"])
    assert not any(layer.merged for _, layer in layers(model))
