"""The laws that hold for every method, on every kind of layer, in every dtype: see `laws.py` for the table.

A test is one law; its cells are generated from the registry. Cells without meaning are tested to be refused.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import (
    APART,
    BATCH,
    COMBINED,
    NOT_IDENTITY,
    STRONGER,
    Cell,
    base_weights,
    by_definition,
    cells,
    equal_states,
    fields_of,
    gradient,
    layers,
    methods,
    over,
    parameters_of,
    perturb,
    state,
    weighted,
)
from safetensors.torch import load_file
from torch import nn

from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.core.families import Copy, Output, Rotation, Rows, Scale
from peft.tuners.lora import VARIANTS as VARIANTS_OF_LORA
from peft.utils.hotswap import hotswap_adapter
from peft.utils.peft_types import PEFT_TYPE_TO_MIXED_MODEL_MAPPING


pytestmark = pytest.mark.filterwarnings("ignore")

ONE = ("float32",)
TWO = ("float32", "bfloat16")
ALL = ("float32", "bfloat16", "bfloat16-uncast")


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model cards take most of the time of a save, and are tested elsewhere."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)


def test_every_weight_method_of_the_registry_is_here() -> None:
    names = {method.name for method in methods()}
    assert {"lora", "ia3", "oft", "vera", "hira", "ln_tuning", "trainable_tokens"} <= names
    assert {cell.method.name for cell in cells()} == names


# --- 1 and 2: merging -----------------------------------------------------------------------------------------


@over(cells("merge", precisions=ALL))
def test_merged_equals_unmerged_and_comes_out_again(cell: Cell) -> None:
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


@over(cells("merge", precisions=ONE, switches=False, each_layer=False))
def test_an_inactive_adapter_is_merged_by_name(cell: Cell) -> None:
    model = cell.adapted("one", "two")
    model.set_adapter("two")
    wanted = cell.run(model)
    model.set_adapter("one")
    merged = model.merge_and_unload(adapter_names=["two"])
    cell.near(cell.run(merged), wanted, "the other adapter")


@over(cells("merge", precisions=ONE, switches=False, each_layer=False))
def test_a_safe_merge_leaves_nothing_behind(cell: Cell) -> None:
    model = cell.adapted("one")
    base = base_weights(cell.base())
    with torch.no_grad():
        for p in parameters_of(model, "one"):
            p.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
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


@over(cells("mixed", precisions=TWO))
def test_a_row_of_a_mixed_batch_has_the_value_of_its_adapter_alone(cell: Cell) -> None:
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


@over(cells("mixed", precisions=TWO))
def test_a_row_of_a_mixed_batch_has_the_gradient_of_its_adapter_alone(cell: Cell) -> None:
    """3, in training mode, but where that draws random numbers."""
    model = cell.adapted("one", "two")
    model.train(not any(type(layer.adapters["one"]).random_in_training for _, layer in layers(model)))
    _rows_train_their_adapters(cell, model)


def _rows_train_their_adapters(cell: Cell, model: PeftModel) -> None:
    found: dict[str, list[torch.Tensor]] = {}
    for names in (ROWS, "one", "two"):
        rows = torch.tensor([1.0 if names is ROWS or name == names else 0.0 for name in ROWS])
        if names is not ROWS:
            model.set_adapter(names)
        model.set_requires_grad(["one", "two"], True)
        model.zero_grad()
        cell.loss(model, rows, **({"adapter_names": ROWS} if names is ROWS else {})).backward()
        for name in ("one", "two") if names is ROWS else (names,):
            key = f"{name} mixed" if names is ROWS else name
            found[key] = [gradient(p).clone() for p in parameters_of(model, name)]
    for name in ("one", "two"):
        assert any(grad.any() for grad in found[name])
        for mixed, alone in zip(found[f"{name} mixed"], found[name]):
            cell.near(mixed, alone, name, factor=2)


# --- 4: files -------------------------------------------------------------------------------------------------


@over(cells(precisions=TWO))
def test_what_is_loaded_is_what_was_saved(cell: Cell, tmp_path: Path) -> None:
    """4: load(save(m)) = m, into a fresh base, without memory for a first draw, and beside another adapter."""
    model = cell.adapted("default")
    wanted, tensors = cell.run(model), get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert held.keys() == tensors.keys() and held
    assert all(torch.equal(held[key], value) for key, value in tensors.items())
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(cell.base(), tmp_path, autocast_adapter_dtype=cell.autocast, **options)
        _same_tensors(get_peft_model_state_dict(loaded), tensors)
        assert not any(p.is_meta or p.requires_grad for p in loaded.parameters())
        # the very same tensors, but those of a mapped file lie at other addresses, which may move a last bit
        torch.testing.assert_close(cell.run(loaded), wanted, msg=str(options))
    other = cell.adapted("other")
    before = cell.run(other)
    result = other.load_adapter(tmp_path, "default2", autocast_adapter_dtype=cell.autocast)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(cell.run(other), before)
    other.set_adapter("default2")
    torch.testing.assert_close(cell.run(other), wanted)


@over(cells(precisions=ONE, switches=False, each_layer=False))
def test_pickled_weights_load_as_well(cell: Cell, tmp_path: Path) -> None:
    model = cell.adapted("default")
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists() and not (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(cell.base(), tmp_path)
    _same_tensors(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    assert torch.equal(cell.run(loaded), cell.run(model))


@over(cells(precisions=ONE, switches=False, each_layer=False))
def test_no_adapter_name_is_special(cell: Cell, tmp_path: Path) -> None:
    """Names that are numbers of modules, names of tensors, or beginnings of other names."""
    names = ["default", "0", next(iter(cell.method.layer_cls.adapter_cls.parts)), "default2", "layer"]
    model = cell.adapted(*names)
    wanted = {}
    for name in names:
        model.set_adapter(name)
        wanted[name] = cell.run(model)
    model.save_pretrained(tmp_path)
    keys = {name: set(get_peft_model_state_dict(model, adapter_name=name)) for name in names}
    assert all(found == keys["default"] for found in keys.values())
    folders = {name: tmp_path if name == "default" else tmp_path / name for name in names}
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


@over(cells(precisions=TWO))
def test_a_fresh_adapter_changes_nothing(cell: Cell) -> None:
    """5, and its opposite for the rows that start at random."""
    base, fresh = cell.run(cell.base()), cell.run(cell.fresh("default"))
    if cell.method.name in NOT_IDENTITY:
        if cell.dtype == torch.float32 or cell.method.name not in STRONGER:  # 16 bits might not show it
            cell.apart(fresh, base)
    else:
        cell.near(fresh, base, factor=0.5)


@over(cells(precisions=TWO, switches=False, each_layer=False))
def test_the_same_seed_gives_the_same_tensors(cell: Cell) -> None:
    """6."""
    first, second, other = (get_peft_model_state_dict(cell.fresh("default", seed=seed)) for seed in (3, 3, 4))
    _same_tensors(first, second)
    assert first.keys() == other.keys()


# --- 7: switched off ------------------------------------------------------------------------------------------


@over(cells(precisions=TWO))
def test_switched_off_adapters_leave_the_base_model(cell: Cell) -> None:
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


@over(cells("merge", precisions=ONE, each_layer=False))
def test_switched_off_adapters_leave_the_base_model_even_if_merged(cell: Cell) -> None:
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


@over(cells("merge", "several", precisions=TWO))
def test_two_active_adapters_are_what_their_family_says(cell: Cell) -> None:
    """8: each sees the unmerged W; merged equals unmerged for two as well, at once or one after the other."""
    model = cell.adapted("one", "two")
    wanted = cell.run(by_definition(cell, model, ["one", "two"]))
    half = wanted
    if cell.method.is_a(Rotation) and cell.place.kind != "Embedding":  # what is merged is next to the weight
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


@over(
    cell
    for cell in cells("several", precisions=ONE)
    if cell.unmergeable and cell.place.affine and not cell.method.is_a(Output)
)
def test_two_active_adapters_add_up_where_no_weight_shows_it(cell: Cell) -> None:
    """8, for updates that are no weight: the outputs add up, on layers whose output is affine in the weight."""
    model = cell.adapted("one", "two")
    base, one = cell.run(cell.base()), cell.run(model)
    model.base_model.set_adapter(["two"])
    two = cell.run(model)
    model.base_model.set_adapter(["one", "two"])
    cell.near(cell.run(model), one + two - base)


@over(cell for cell in cells("several", precisions=ONE) if cell.unmergeable and cell.method.is_a(Output))
def test_two_active_output_maps_follow_each_other_where_no_weight_shows_it(cell: Cell) -> None:
    """8, for maps of the output that are no weight: what comes out of one goes into the next."""
    model, base = cell.adapted("one", "two"), cell.base()
    model.base_model.set_adapter(["one", "two"])
    (_, layer), axis = layers(model)[0], 1
    wanted = cell.run(base) / base.gain
    for name in ("one", "two"):
        matrix = layer.adapters[name].map_output(torch.eye(layer.out_features)).detach()  # transposed: rows are images
        wanted = (wanted.movedim(axis, -1) @ matrix).movedim(-1, axis)
    cell.near(cell.run(model), wanted * base.gain)


@over(cells("merge", "delta", precisions=ONE))
def test_the_delta_weight_is_what_merging_adds(cell: Cell) -> None:
    model = cell.adapted("one")
    deltas = {key: layer.get_delta_weight("one").detach() for key, layer in _by_weight(model)}
    before = {key: _stored(layer) for key, layer in _by_weight(model)}
    model.merge_adapter()
    for key, layer in _by_weight(model):
        assert deltas[key].shape == before[key].shape
        assert deltas[key].any() or cell.method.name.startswith("beft")  # which changes the bias alone
        cell.near(_stored(layer), before[key] + deltas[key], str(key))
        cell.near(layer.get_delta_weight("one").detach(), deltas[key], "while merged")


@over(cells("merge", "delta", "lora", precisions=ONE))
def test_a_lora_of_full_rank_says_the_same(cell: Cell, tmp_path: Path) -> None:
    model = cell.adapted("one")
    before = state(model)
    save_as_lora(tmp_path, model, 1.0, "one")
    equal_states(state(model), before)
    lora = PeftModel.from_pretrained(cell.base(), tmp_path).eval()
    cell.near(cell.run(lora), cell.run(model), factor=3)  # a decomposition rounds, too


@over(cells("delta", precisions=ONE, refused=True, switches=False))
def test_what_is_no_change_of_a_weight_is_no_lora(cell: Cell) -> None:
    with pytest.raises(ValueError, match=cell.refusal("delta").phrase):
        convert_to_lora(cell.fresh("one"), 2, "one")


@over(cell for cell in cells("merge", "delta", "lora", precisions=ONE, switches=False) if cell.place.typical)
def test_a_lora_of_full_rank_says_the_weighted_sum_of_two(cell: Cell, tmp_path: Path) -> None:
    model, weights = cell.adapted("one", "two"), {"one": 0.5, "two": -1.5}
    wanted = cell.run(weighted(cell, model, weights))
    save_as_lora(tmp_path, model, 1.0, ["one", "two"], weights=list(weights.values()))
    cell.near(cell.run(PeftModel.from_pretrained(cell.base(), tmp_path).eval()), wanted, factor=4)


# --- weighted combinations ------------------------------------------------------------------------------------


@over(cell for cell in cells("merge", "combine", precisions=TWO) if cell.place.typical)
def test_a_weighted_combination_does_the_weighted_sum(cell: Cell, tmp_path: Path) -> None:
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
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(cell.base(), tmp_path / "sum", autocast_adapter_dtype=cell.autocast)
    cell.near(cell.run(loaded), cell.run(model), "loaded")


@over(cell for cell in cells("combine", precisions=ONE, refused=True) if cell.place.typical)
def test_adapters_without_a_sum_are_not_combined(cell: Cell) -> None:
    model = cell.adapted("one", "two")
    before, held = cell.run(model), state(model)
    with pytest.raises(ValueError, match=cell.refusal("combine").phrase):
        _combine(model, {"one": 0.5, "two": 1.5})
    assert list(model.peft_config) == ["one", "two"]
    equal_states(state(model), held)
    assert torch.equal(cell.run(model), before)


def _combine(model: PeftModel, weights: dict[str, float]) -> None:
    known = inspect.signature(model.base_model.add_weighted_adapter).parameters
    exact = {"combination_type": "cat"} if "combination_type" in known else {}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", **exact)


def _by_weight(model: nn.Module) -> list[tuple[tuple[str, str], Any]]:
    return [((key, layer.kind.weight), layer) for key, layer in layers(model)]


def _stored(layer: Any) -> torch.Tensor:
    return getattr(layer.get_base_layer(), layer.kind.weight).detach().clone()


# --- 9 and 10: adding, deleting, unloading --------------------------------------------------------------------


@over(cells(precisions=ONE, switches=False, each_layer=False))
def test_adapters_do_not_touch_each_other(cell: Cell) -> None:
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


@over(cells(precisions=TWO, switches=False))
def test_unloading_gives_the_base_model_back(cell: Cell) -> None:
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


@over(cells("merge", precisions=ONE, switches=False, each_layer=False))
def test_unloading_a_merged_model_gives_the_base_model_back(cell: Cell) -> None:
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


@over(cells(precisions=TWO))
def test_gradients_reach_every_tensor_of_the_adapter_and_none_of_the_base(cell: Cell) -> None:
    """11."""
    model = cell.adapted("one").train()
    cell.loss(model).backward()
    own = {id(p) for p in parameters_of(model, "one")}
    for name, p in model.named_parameters():
        if id(p) in own:
            assert p.requires_grad and p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
            assert p.grad.dtype == p.dtype == (torch.float32 if cell.autocast else cell.dtype), name
        else:
            assert not p.requires_grad and p.grad is None, name
    assert own


@over(cell for cell in cells(precisions=ONE) if cell.place.name in ("Linear[no-bias]", "Embedding"))
def test_a_training_step_multiplies_by_no_identity_matrix(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """11, at its price: products with vectors, not with a matrix of all inputs or outputs."""
    model, eye = cell.adapted("one").train(), torch.eye
    sizes = {size for _, layer in layers(model) for size in (layer.in_features, layer.out_features)}

    def small(n: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert n not in sizes, f"an identity matrix of {n} x {n}"
        return eye(n, *args, **kwargs)

    monkeypatch.setattr(torch, "eye", small)
    cell.loss(model).backward()


@over(cell for cell in cells("merge", precisions=ONE) if cell.differentiable)
def test_the_gradient_is_that_of_the_merged_weight(cell: Cell) -> None:
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
        with torch.no_grad():
            moved.append(cell.loss(other.merge_and_unload()).item())
    expected = sum((gradient(p) * step).sum() for p, step in zip(own, steps)).item()
    assert (moved[0] - moved[1]) / 2 == pytest.approx(expected, rel=0.03, abs=3e-6)


# --- 12: copies -----------------------------------------------------------------------------------------------


@over(cells(precisions=ONE, switches=False, each_layer=False))
def test_a_copy_stands_alone(cell: Cell) -> None:
    """12: deepcopy, a pickle of the whole model, and its state dict."""
    model = cell.adapted("one", "two")
    before = cell.run(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(cell.run(other), before)
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


@over(cell for cell in cells(precisions=ONE) if cell.place.typical)
def test_an_adapter_swapped_in_is_the_one_that_was_saved(cell: Cell, tmp_path: Path) -> None:
    """Its tensors are written into the parameters that are there; other adapters keep theirs."""
    model, other = cell.adapted("one", "two"), cell.fresh("one")
    perturb(other, "one", 21)
    other.save_pretrained(tmp_path)
    before, wanted = cell.run(model), cell.run(other)
    cell.apart(wanted, before)
    held = {name: id(p) for name, p in model.named_parameters()}
    model.set_adapter("two")
    two = cell.run(model)
    hotswap_adapter(model, tmp_path / "one", "one")
    assert {name: id(p) for name, p in model.named_parameters()} == held
    assert torch.equal(cell.run(model), two)
    model.set_adapter("one")
    torch.testing.assert_close(cell.run(model), wanted)
    if not cell.unmergeable:
        cell.near(cell.run(model.merge_and_unload()), wanted, "merged")


# --- adapters of several methods ------------------------------------------------------------------------------


def _pairs() -> list[Any]:
    """Each method inside and outside a LoRA, and around the next method of the registry."""
    found = []
    for place in ("Linear", "Conv2d[stride]", "Embedding[scaled]"):
        rows = [c for c in cells("mixed", precisions=ONE, switches=False) if c.place.name == place]
        rows = [c for c in rows if c.method.config_cls.METHOD in PEFT_TYPE_TO_MIXED_MODEL_MAPPING]
        (lora,) = (c for c in rows if c.method.name == "lora")
        pairs = [(lora, c) for c in rows] + [(c, lora) for c in rows if c is not lora]
        pairs += list(zip(rows, rows[1:])) if place == "Linear" else []
        named = {f"{a.method.name}-{b.id}": (a, b) for a, b in pairs}
        found += [pytest.param(*pair, id=name) for name, pair in named.items()]
    return found


@pytest.mark.parametrize(("first", "second"), _pairs())
def test_adapters_of_two_methods_live_in_one_model(first: Cell, second: Cell, tmp_path: Path) -> None:
    """3, 4, 7, 8, 10 in a PeftMixedModel."""
    both = {"one": first, "two": second}
    model = get_peft_model(first.base(), first.config(), "one", mixed=True)
    if second.method.is_a(Copy):
        with pytest.raises(ValueError, match="which a copy of the whole module would hide"):
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
    model.save_pretrained(tmp_path)
    for order in (["one", "two"], ["two", "one"]):
        if both[order[1]].method.is_a(Copy):
            continue
        loaded = PeftMixedModel.from_pretrained(first.base(), tmp_path / order[0], order[0])
        loaded.load_adapter(tmp_path / order[1], order[1])
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


def _near_base(cell: Cell, found: dict, wanted: dict, what: str) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        cell.near(found[key], value, f"{what}: {key}")


# --- an adapter that adapts only some of the layers -----------------------------------------------------------


PART = {"Linear": "blocks.1.layer", "MultiheadAttention[masked]": "attn.out_proj"}
"""Layer -> the part of it that the second adapter adapts alone."""


@over(cell for cell in cells("several", precisions=ONE) if cell.place.name in PART)
def test_adapters_may_adapt_different_layers(cell: Cell, tmp_path: Path) -> None:
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
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cell.base(), tmp_path / "last")
    assert [key for key, _ in layers(loaded)] == [part]
    assert torch.equal(cell.run(loaded), last)
    model.delete_adapter("both")
    assert torch.equal(cell.run(model), last)
    equal_states(model.unload().state_dict(), state(cell.base()))


# --- what adapters train beside their layers ------------------------------------------------------------------


def _beside() -> list[Any]:
    found = []
    for cell in cells(precisions=TWO, switches=False):
        own = getattr(cell.method.config_cls, "OWN_BIAS", None)
        extras = {"whole": {"modules_to_save": ["blocks.1.layer"]}, "biases": {"bias": own}, "all": {"bias": "all"}}
        for name, fields in extras.items():
            if cell.place.name == "Linear" and all(cell.method.has(f) and value for f, value in fields.items()):
                found.append(pytest.param(cell, fields, id=f"{cell.id}-{name}"))
    return found


@pytest.mark.parametrize(("cell", "fields"), _beside())
def test_what_is_trained_beside_the_layers_keeps_the_laws(cell: Cell, fields: dict[str, Any], tmp_path: Path) -> None:
    """3, 4, 7, 9, 10, 12 for `modules_to_save` and for trained biases."""
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
    model.save_pretrained(tmp_path)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = PeftModel.from_pretrained(cell.base(), tmp_path, autocast_adapter_dtype=cell.autocast)
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


@over(cells("adapt", precisions=ONE, refused=True))
def test_a_layer_that_cannot_be_adapted_is_refused(cell: Cell) -> None:
    model = cell.base()
    before, types, out = state(model), [type(m) for m in model.modules()], cell.run(model)
    with pytest.raises(ValueError, match=f"(?s){cell.refusal('adapt').phrase}"):
        get_peft_model(model, cell.config())
    equal_states(model.state_dict(), before)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(cell.run(model), out)


@over(cells("merge", precisions=ONE, refused=True))
def test_an_adapter_that_is_no_weight_is_not_merged(cell: Cell) -> None:
    model = cell.adapted("one")
    phrase, before, held = cell.refusal("merge").phrase, cell.run(model), state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=phrase):
            merge()
        assert not any(layer.merged for _, layer in layers(model))
        equal_states(model.state_dict(), held)
        assert torch.equal(cell.run(model), before)
    with pytest.raises(ValueError, match=phrase):
        layers(model)[0][1].get_delta_weight("one")
    with pytest.raises(ValueError, match=phrase):
        convert_to_lora(model, 1, "one")


@over(cells("delta", precisions=ONE, refused=True))
def test_an_adapter_that_is_no_change_of_a_weight_has_no_delta(cell: Cell) -> None:
    model = cell.adapted("one")
    with pytest.raises(ValueError, match=cell.refusal("delta").phrase):
        layers(model)[0][1].get_delta_weight("one")


@pytest.mark.parametrize("combination", APART)
def test_variants_that_mean_nothing_together_are_refused(combination: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    with pytest.raises(ValueError, match=APART[combination]):
        get_peft_model(model, LoraConfig(target_modules=["0"], r=4, **fields_of(combination)))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("variant", ["rslora", "dora", "velora", "monteclora"])
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
    names = ("dora", "alora", "mica", "bdlora", "kasa", "monteclora", "velora", "qalora", "arrow", "rslora")
    known = {frozenset(x.removesuffix("-a") for x in pair.split("+")) for pair in (*COMBINED, *APART)}
    elsewhere = {frozenset({"alora", "arrow"}), frozenset({"arrow", "rslora"})}  # with experts; nothing to scale
    assert {frozenset(pair) for pair in itertools.combinations(names, 2)} <= known | elsewhere
    assert len(VARIANTS_OF_LORA) == len(names) - 1, "rsLoRA is no class of adapters"


@over(cells("several", precisions=ONE, refused=True))
def test_adapters_that_exclude_each_other_are_not_active_together(cell: Cell) -> None:
    model = cell.adapted("one", "two")
    before = cell.run(model)
    with pytest.raises(ValueError, match=cell.refusal("several").phrase):
        model.base_model.set_adapter(["one", "two"])
    assert model.active_adapters == ["one"]
    assert torch.equal(cell.run(model), before)


@over(cell for cell in cells(precisions=ONE) if cell.method.is_a(Rows))
def test_two_adapters_of_the_same_token_exclude_each_other(cell: Cell) -> None:
    model = cell.adapted("one")
    before = cell.run(model)
    cell.add(model, "same")
    with pytest.raises(ValueError, match="replace the same token rows"):
        model.base_model.set_adapter(["one", "same"])
    assert torch.equal(cell.run(model), before)


@over(cells("mixed", precisions=ONE, refused=True))
def test_rows_that_cannot_be_told_apart_are_refused(cell: Cell) -> None:
    model = cell.adapted("one", "two")
    before = cell.run(model)
    with pytest.raises(ValueError, match=cell.refusal("mixed").phrase):
        cell.run(model, adapter_names=ROWS)
    assert torch.equal(cell.run(model), before)


def test_copies_are_merged_one_at_a_time() -> None:
    """The one refusal that needs names: copies cannot be merged on top of each other."""
    for cell in cells("merge", precisions=ONE):
        if not cell.method.is_a(Copy):
            continue
        model = cell.adapted("one", "two")
        with pytest.raises(ValueError, match="one adapter can be active at a time"):
            model.merge_adapter(["one", "two"])
        assert not any(layer.merged for _, layer in layers(model))
