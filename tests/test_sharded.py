"""Bases of which each process holds a part: ``DTensor`` in two processes, and DeepSpeed ZeRO-3 by its interface."""

from __future__ import annotations

import copy
import os
import socket
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from laws import cells
from torch import nn

from peft import IA3Config, LoraConfig, get_peft_model
from peft.core.base.storage import storage_of
from peft.testing.cells import Cell, perturb


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


# --- DTensor --------------------------------------------------------------------------------------------------


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).eval()  # 7 rows: the parts are not equal


def _same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def _reads_and_writes(mesh: Any, placements: list[Any]) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    plain, m = _net()[0], _net()[0]
    parts = nn.Parameter(distribute_tensor(m.weight.detach(), mesh, placements), requires_grad=False)
    m.weight = parts
    m.bias = nn.Parameter(distribute_tensor(m.bias.detach(), mesh, [Replicate()]), requires_grad=False)
    storage = storage_of(m, "weight")
    old, value = plain.weight.detach(), plain.weight.detach() * 2
    assert type(storage).__name__ == "Distributed" and torch.equal(storage.read(m, "weight"), old)
    assert storage.nbytes(m, "weight") == parts.to_local().nbytes
    assert storage.device_and_dtype(m, "weight") == (torch.device("cpu"), torch.float32)
    memory, kept = parts.to_local().data_ptr(), storage.keep(m, "weight")
    storage.write(m, "weight", value)
    assert m.weight is parts and list(m.weight.placements) == placements
    assert parts.to_local().data_ptr() == memory, "the sharder's memory was left behind"
    assert torch.equal(storage.read(m, "weight"), value)
    assert torch.equal(storage.read_kept(m, "weight", kept), old) and torch.equal(storage.read(m, "weight"), value)
    storage.put_back(m, "weight", kept)
    assert torch.equal(storage.read(m, "weight"), old)
    storage.write(m, "weight", value, shared=True)
    assert m.weight is not parts and torch.equal(parts.full_tensor(), old)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    given = value.clone().requires_grad_()
    y = storage.call(m, {"weight": given}, (DTensor.from_local(x, mesh, [Replicate()]),), {}).full_tensor()
    _same(y, nn.functional.linear(x, value, plain.bias))
    y.sum().backward()
    _same(given.grad, x.sum(0).expand(7, 6))


def _adapts(mesh: Any, config: Any) -> None:
    """FSDP 2 shards the base and the adapter: the output and the gradients are the plain model's."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plain = get_peft_model(_net(), copy.deepcopy(config)).eval()
    sharded = copy.deepcopy(plain)
    for layer in (sharded.base_model.model[0], sharded.base_model.model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded.base_model.model, mesh=mesh)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    wanted = plain(x)
    _same(sharded(x), wanted)
    for model in (plain, sharded):
        model(x).sum().backward()
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            _same(q.grad.full_tensor(), p.grad)
    base = sharded.base_model.model[0].base_layer
    for module in sharded.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    assert isinstance(base.weight, DTensor)
    before = storage_of(base, "weight").read(base, "weight")
    _same(before, plain.base_model.model[0].base_layer.weight)


def _process(rank: int, port: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for placement in (Shard(0), Shard(1), Replicate()):
            _reads_and_writes(mesh, [placement])
        _adapts(mesh, LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False))
        _adapts(mesh, IA3Config(target_modules=["0", "2"], feedforward_modules=[]))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes() -> None:
    """Every process has the whole weight when it is read, and its own part of what is written."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port,), nprocs=2)


# --- ZeRO-3 ---------------------------------------------------------------------------------------------------


class _Partition:
    """What ``deepspeed.zero`` documents, in one process: a parameter is empty unless it is gathered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open: list[Any] = []
        package = types.ModuleType("deepspeed")
        package.zero = types.SimpleNamespace(GatheredParameters=self.gathered)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "deepspeed", package)

    def init(self, m: nn.Module) -> nn.Module:
        for i, p in enumerate(m.parameters()):
            p.ds_id, p.ds_shape, p.ds_tensor = i, p.shape, p.data.flatten().clone()
            p.partition = lambda p=p: setattr(p, "data", p.data.new_empty(0))
            p.data = p.data.new_empty(0)
            p.requires_grad_(False)
        return m

    def hooked(self, model: nn.Module) -> nn.Module:
        """A model whose modules have their own parameters whole while they compute."""
        for m in model.modules():
            if own := [*m.parameters(recurse=False)]:
                m.register_forward_pre_hook(lambda m, args, own=own: self._hold(own, True))
                m.register_forward_hook(lambda m, args, y, own=own: self._hold(own, False))
        return model

    def _hold(self, own: list[Any], whole: bool) -> None:
        for p in own:
            p.data = p.ds_tensor.view(p.ds_shape).clone() if whole else p.data.new_empty(0)
            p.ds_active_sub_modules = {1} if whole else set()

    @contextmanager
    def gathered(self, params: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
        params = list(params)
        for p in params:
            p.data = p.ds_tensor.view(p.ds_shape).clone()
        self.open += params
        try:
            yield
        finally:
            for p in params:
                if modifier_rank is not None:
                    p.ds_tensor.copy_(p.data.flatten())
                p.data.fill_(float("nan"))  # whoever still holds what was gathered sees it
                p.data = p.data.new_empty(0)
            self.open = []


def test_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, write, keep, put back and call through the gathering context; no gathered copy outlives the call."""
    partition, plain = _Partition(monkeypatch), _net()[0]
    m = partition.init(_net()[0])
    storage, old, value = storage_of(m, "weight"), plain.weight.detach(), plain.weight.detach() * 2
    assert m.weight.numel() == 0 and torch.equal(storage.read(m, "weight"), old) and m.weight.numel() == 0
    assert storage.nbytes(m, "weight") == old.nbytes and storage.direct_weight(m, "weight") is None
    kept = storage.keep(m, "weight")
    storage.write(m, "weight", value)
    assert torch.equal(storage.read(m, "weight"), value)
    assert torch.equal(storage.read_kept(m, "weight", kept), old) and torch.equal(storage.read(m, "weight"), value)
    given, x = (old * 3).requires_grad_(), torch.randn(2, 6)
    m.register_forward_pre_hook(lambda m, args: [p.ds_id for p in m.parameters()])  # as DeepSpeed's own
    y = storage.call(m, {"weight": given}, (x,), {})
    y.sum().backward()
    assert torch.equal(y, nn.functional.linear(x, old * 3, plain.bias)) and given.grad is not None
    storage.put_back(m, "weight", kept)
    assert torch.equal(storage.read(m, "weight"), old) and m.weight.numel() == 0 and not partition.open


ROWS = [cell for cell in cells(precisions=("float32",), each_layer=False) if cell.place.name == "Linear"]


@pytest.mark.parametrize("cell", ROWS, ids=lambda cell: cell.id)
def test_output_is_that_of_the_whole_base(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: on a base of which each process holds a part, for every method."""
    partition = _Partition(monkeypatch)
    found = cell.fresh("default", base=partition.hooked(partition.init(cell.base())))
    perturb(found, "default", 10, cell.method.times)
    plain = cell.adapted("default")
    with torch.no_grad():
        cell.near(cell.run(found), cell.run(plain), "output")
    held = [p for p in found.parameters() if hasattr(p, "ds_id")]
    assert all(p.numel() == 0 for p in held) and not partition.open


@pytest.mark.parametrize("place", ["an adapted layer", "a copied module", "trained tokens"])
def test_marks_of_zero3_are_each_modules_own(place: str) -> None:
    """DeepSpeed up to 0.19.0 gives a module its hooks unless ``hasattr`` says that it has them."""
    net = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 4))
    config = {
        "an adapted layer": LoraConfig(target_modules=["1"]),
        "a copied module": LoraConfig(target_modules=["0"], modules_to_save=["1"]),
        "trained tokens": LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1]}),
    }[place]
    model = get_peft_model(net, config).base_model.model
    wrapper = model[0] if place == "trained tokens" else model[1]
    for module in list(wrapper.modules())[1:]:
        module.post_bwd_fn, module.other = "its own", "read through the wrapper"
    assert not hasattr(wrapper, "post_bwd_fn") and wrapper.other == "read through the wrapper"


def test_zero3_keeps_small_parameters_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = _Partition(monkeypatch)
    m = partition.init(_net()[0])
    storage, old = storage_of(m, "weight"), _net()[0].weight.detach()
    kept = storage.keep(m, "weight")
    storage.write(m, "weight", old * 2)
    m.weight.data = old * 2
    storage.put_back(m, "weight", kept)
    assert torch.equal(storage.read(m, "weight"), old)


def test_zero3_refuses_to_replace_one_of_two_tied_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    m = _Partition(monkeypatch).init(_net()[0])
    with pytest.raises(ValueError, match="another module's as well"):
        storage_of(m, "weight").write(m, "weight", torch.ones(7, 6), shared=True)
