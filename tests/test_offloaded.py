"""Bases that accelerate's hooks keep on the CPU or on disk, and bases that are filled after the adapter is there."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import laws
import pytest
import torch
from torch import nn
from toys import tiny_llama

from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.core.base.storage import onloaded, storage_of
from peft.core.families import Copy
from peft.testing.cells import Cell, parameters_of, perturb
from peft.tools.base_state import set_base_model_state_dict
from peft.tools.memory import estimate_memory
from peft.utils.error import ConfigError


accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module  # noqa: E402


# --- ways of offloading ---------------------------------------------------------------------------------------


def _align(model: nn.Module, folder: Path) -> nn.Module:
    for m in model.modules():
        if m._parameters and not m._modules:
            add_hook_to_module(m, AlignDevicesHook("cpu", offload=True))
    return model


def _sequence(model: nn.Module, folder: Path) -> nn.Module:
    for m in model.modules():
        if m._parameters and not m._modules:
            add_hook_to_module(m, SequentialHook(ModelHook(), AlignDevicesHook("cpu", offload=True)))
    return model


def _files(model: nn.Module, folder: Path) -> nn.Module:
    """Weights read from the model's own safetensors file."""
    from accelerate.utils import OffloadedWeightsLoader
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    names = list(model.state_dict())
    index = {k: {"safetensors_file": str(folder / "model.safetensors"), "weight_name": k} for k in names}
    weights = OffloadedWeightsLoader(index=index)
    accelerate.hooks.attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=weights)
    return model


def _disk_map(model: nn.Module, folder: Path) -> nn.Module:
    devices = {name: "disk" for name, _ in model.named_children()}
    devices |= {name: "disk" for name, _ in model.named_parameters(recurse=False)}
    return accelerate.dispatch_model(model, devices, "cpu", offload_dir=str(folder), force_hooks=True)


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), "cpu"),
    "dispatch_model": _disk_map,
    "own files": _files,
    "hooks": _align,
    "hooks in a sequence": _sequence,
}


def _runs(cell: Cell, folder: Path) -> bool:
    """Whether the offloaded base runs without an adapter."""
    try:
        cell.run(WAYS["hooks"](cell.base(), folder))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _pair(cell: Cell, way: str, folder: Path) -> tuple[PeftModel, PeftModel]:
    """The same adapter on the plain base and on the offloaded one."""
    base = WAYS[way](cell.base(), folder)
    found = cell.fresh("default", base=base)
    perturb(found, "default", 10, cell.method.times)
    return cell.adapted("default"), found


PLACES = ("Linear", "Conv2d[stride]", "Embedding[scaled]", "Parameter[3d]")
CELLS = [c for c in laws.cells(precisions=("float32",), each_layer=False) if c.place.name in PLACES]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_output_is_that_of_the_plain_base(cell: Cell, tmp_path: Path) -> None:
    """Law: on a base that accelerate offloads, outputs and gradients are those on the plain base, for every method."""
    if not _runs(cell, tmp_path):
        pytest.skip("accelerate cannot offload this module itself")
    plain, found = _pair(cell, "hooks", tmp_path)
    cell.near(cell.run(found), cell.run(plain), "output")
    for model in (plain, found):
        cell.loss(model).backward()
    wanted = parameters_of(plain, "default")
    for p, q in zip(wanted, parameters_of(found, "default"), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            cell.near(q.grad, p.grad, "gradient")
    assert all(p.is_meta for n, p in found.named_parameters() if n.endswith("base_layer.weight"))


LAWFUL = [c for c in laws.cells("merge", precisions=("float32",), switches=False) if c.place.name == "Linear"]
ROWS = [(c, way) for c in LAWFUL for way in WAYS if way == "disk_offload" or c.method.name in ("lora", "ia3")]


@pytest.mark.parametrize(("cell", "way"), ROWS, ids=[f"{c.method.name}-{way}" for c, way in ROWS])
def test_merging_and_unmerging(cell: Cell, way: str, tmp_path: Path) -> None:
    """Merged equals unmerged, unmerging gives the base back, and nothing stays on the device or in the folder."""
    plain, found = _pair(cell, way, tmp_path)
    with plain.disable_adapter():
        base = cell.run(plain)
    wanted, files = cell.run(plain), sorted(tmp_path.iterdir())
    contents = {f.name: f.read_bytes() for f in files}
    for _ in range(2):
        found.merge_adapter()
        cell.near(cell.run(found), wanted, "merged")
        cell.apart(cell.run(found), base)
        weights = [p for n, p in found.named_parameters() if n.endswith("base_layer.weight")]
        assert all(p.is_meta for p in weights) or cell.method.is_a(Copy)  # a merged copy is one that trained
        found.unmerge_adapter()
        cell.near(cell.run(found), wanted, "unmerged")
        with found.disable_adapter():
            cell.near(cell.run(found), base, "the base after unmerging")
    merged = found.merge_and_unload()
    cell.near(cell.run(merged), wanted, "merged and unloaded")
    assert all((tmp_path / name).read_bytes() == data for name, data in contents.items()), "a file of the base changed"
    del found, merged
    gc.collect()
    if way != "dispatch_model":  # which the hooks of the folder's own index outlive
        assert sorted(tmp_path.iterdir()) == files, "a temporary file is left"


# --- one storage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_storage(way: str, tmp_path: Path) -> None:
    """Read, write, keep, put back: bit for bit, and the next forward uses what was written."""
    cell = next(c for c in CELLS if c.place.name == "Linear")
    plain, model = cell.base(), WAYS[way](cell.base(), tmp_path)
    m, old = model.blocks[0]["layer"], plain.blocks[0]["layer"]
    storage = storage_of(m, "weight")
    assert m.weight.is_meta and torch.equal(storage.read(m, "weight"), old.weight) and m.weight.is_meta
    assert storage.device_and_dtype(m, "weight") == (torch.device("cpu"), torch.float32)
    assert storage.nbytes(m, "weight") == old.weight.nbytes and storage.direct_weight(m, "weight") is None
    kept, value = storage.keep(m, "weight"), old.weight.detach() * 2
    storage.write(m, "weight", value)
    assert torch.equal(storage.read_kept(m, "weight", kept), old.weight)
    assert torch.equal(storage.read(m, "weight"), value)
    x = torch.randn(3, 8)
    assert torch.equal(m(x), nn.functional.linear(x, value, old.bias))
    given = (old.weight.detach() * 3).requires_grad_()
    y = storage.call(m, {"weight": given}, (x,), {})
    y.sum().backward()
    assert torch.equal(y, nn.functional.linear(x, given, old.bias)) and given.grad is not None
    assert m.weight.is_meta and torch.equal(m(x), nn.functional.linear(x, value, old.bias))
    storage.put_back(m, "weight", kept)
    assert torch.equal(m(x), old(x))


def test_a_map_that_cannot_be_written_is_covered() -> None:
    """What a read-only map cannot take lies before it."""
    layer = nn.Linear(4, 3)
    weights = MappingProxyType({k: v.clone() for k, v in layer.state_dict().items()})
    x, before = torch.randn(2, 4), copy.deepcopy(layer)
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, weights_map=weights))
    storage = storage_of(layer, "weight")
    kept = storage.keep(layer, "weight")
    storage.write(layer, "weight", torch.ones(3, 4))
    assert torch.equal(layer(x), nn.functional.linear(x, torch.ones(3, 4), before.bias))
    assert torch.equal(weights["weight"], before.weight)
    storage.put_back(layer, "weight", kept)
    assert torch.equal(layer(x), before(x))


def test_a_call_fires_the_hooks_and_an_error_in_it_leaves_the_module_as_it_was() -> None:
    layer, calls = nn.Linear(4, 3), []
    layer.register_forward_hook(lambda m, args, y: calls.append(y.shape))
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True))
    storage, forward = storage_of(layer, "weight"), layer.forward
    storage.call(layer, {"weight": torch.ones(3, 4)}, (torch.ones(2, 4),), {})
    assert calls == [(2, 3)]
    with pytest.raises(RuntimeError):
        storage.call(layer, {"weight": torch.ones(3, 4)}, (torch.ones(2, 5),), {})
    assert layer.weight.is_meta and layer.forward is forward
    with onloaded(layer):
        assert not layer.weight.is_meta
    assert layer.weight.is_meta


ELSEWHERE = [
    PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    LoraConfig(target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
]


@pytest.mark.parametrize("config", ELSEWHERE, ids=lambda config: config.peft_type.value)
def test_what_reads_or_feeds_the_embedding_of_an_offloaded_model(config: PeftConfig, tmp_path: Path) -> None:
    base, ids = tiny_llama(), torch.arange(6).view(2, 3)
    plain = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
    plain.save_pretrained(tmp_path / "plain")
    away = accelerate.cpu_offload(copy.deepcopy(base), execution_device=torch.device("cpu"))
    offloaded = PeftModel.from_pretrained(away, tmp_path / "plain")
    with torch.no_grad():
        wanted = plain(ids).logits
        torch.testing.assert_close(offloaded(ids).logits, wanted)
        offloaded.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "again")(ids).logits, wanted)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["1"]}, {"bias": "none"}])
def test_training_beside_an_offloaded_base(fields: dict) -> None:
    """Trained copies of offloaded modules have values and train."""
    base = accelerate.cpu_offload(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "cpu")
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, **fields))
    model(torch.randn(3, 4)).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(not p.is_meta and p.grad is not None for p in trained)


def test_a_file_brings_the_tables_of_an_offloaded_base(tmp_path: Path) -> None:
    base, ids = tiny_llama(), torch.arange(6).view(2, 3)
    away = accelerate.cpu_offload(copy.deepcopy(base), execution_device=torch.device("cpu"))
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(1)
        base.lm_head.weight.mul_(2)
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"])).eval()
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        torch.testing.assert_close(PeftModel.from_pretrained(away, tmp_path)(ids).logits, model(ids).logits)


def test_biases_of_an_offloaded_base_are_refused() -> None:
    base = accelerate.cpu_offload(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "cpu")
    with pytest.raises(ValueError, match="those of its Linear are offloaded.*bias='none'"):
        get_peft_model(base, LoraConfig(target_modules=["0"], bias="all"))
    assert list(base.state_dict()) == list(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).state_dict())


# --- bases without values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["0"], r=2, init_lora_weights=False),
        LoraConfig(target_modules=["0"], r=2, init_lora_weights=False, lora_bias=True),
        IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False),
    ],
)
@pytest.mark.parametrize("assign", [True, False])
def test_a_base_that_is_filled_later(config: LoraConfig, assign: bool) -> None:
    """The adapter is put on a base of the meta device; the weights come afterwards."""
    plain = nn.Sequential(nn.Linear(4, 3))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 3))
    torch.manual_seed(0)
    found = get_peft_model(empty, copy.deepcopy(config)).eval()
    state = {f"base_layer.{k.partition('.')[2]}": v.clone() for k, v in plain.state_dict().items()}
    layer = found.base_model.model[0]
    if not assign:
        layer.base_layer.to_empty(device="cpu")
    layer.load_state_dict(state, strict=False, assign=assign)
    torch.manual_seed(0)
    wanted = get_peft_model(copy.deepcopy(plain), copy.deepcopy(config)).eval()
    x = torch.randn(2, 4)
    assert torch.allclose(found(x), wanted(x)) and not torch.allclose(found(x), plain(x))
    found.merge_adapter()
    assert torch.allclose(found(x), wanted(x), atol=1e-6)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.place.kind == "Linear"], ids=lambda cell: cell.id)
def test_output_is_that_of_a_base_with_values_from_the_start(cell: Cell) -> None:
    """Law: on a meta base that is filled later, for every method; one that makes its adapter of the base says so."""
    base = cell.base()
    try:
        found = cell.fresh("default", base=copy.deepcopy(base).to("meta"))
    except ConfigError as error:
        assert "no values yet" in str(error)
        return
    set_base_model_state_dict(found, {name: value.clone() for name, value in base.state_dict().items()})
    plain = cell.adapted("default")
    set_peft_model_state_dict(found, get_peft_model_state_dict(plain))
    cell.near(cell.run(found.train(plain.training)), cell.run(plain), "output")


def test_nothing_is_merged_into_a_base_without_values() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 3))
    model = get_peft_model(empty, LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(ValueError, match="no values yet"):
        model.merge_adapter()


def test_memory_counts_weights_kept_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    wanted = estimate_memory(copy.deepcopy(model), inputs={"input": torch.ones(1, 4)}).weights
    accelerate.cpu_offload(model, "cpu")
    assert estimate_memory(model, inputs={"input": torch.ones(1, 4)}).weights == wanted
