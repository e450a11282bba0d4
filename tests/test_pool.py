"""A pool gives each row the adapter that was registered for it, and the model holds no more than it may."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from peft import AdapterPool, IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 6] -> [batch, 4]."""
        return self.second(torch.tanh(self.first(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=["first", "second"], init_lora_weights=False)


@pytest.fixture
def folders(tmp_path: Any) -> dict[str, str]:
    """Adapters of two ranks."""
    made = {}
    for i in range(6):
        torch.manual_seed(i)
        get_peft_model(net(), lora(2 + i % 2)).save_pretrained(tmp_path / f"{i}")
        made[f"user{i}"] = str(tmp_path / f"{i}")
    return made


def alone(folder: str, x: torch.Tensor) -> torch.Tensor:
    return PeftModel.from_pretrained(net(), folder)(x)


def test_each_row_has_its_adapter_whatever_was_dropped(folders):
    pool = AdapterPool(net(), capacity=2)
    for name, folder in folders.items():
        pool.register(name, folder)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    for names in (["user0", "user1", "__base__"], ["user2", "user0", "user2"], ["user5", "user4", "user5"]) * 2:
        with torch.no_grad():
            found = pool(x, adapter_names=names)
        for row, name in enumerate(names):
            want = net()(x)[row] if name == "__base__" else alone(folders[name], x)[row]
            torch.testing.assert_close(found[row], want)
        assert len(pool.in_use) <= 2 and len(pool.model.peft_config) <= 2


def test_memory_is_that_of_the_adapters_in_use(folders):
    """By the bytes of the model's parameters; what steps out for one with its config leaves its memory to that."""
    pool, x = AdapterPool(net(), capacity=2), torch.randn(2, 6)
    own = sum(p.nbytes for p in pool.base.parameters())
    for i in range(100):
        pool.register(f"{i}", folders["user0"])
    each = sum(
        t.nbytes for t in get_peft_model_state_dict(PeftModel.from_pretrained(net(), folders["user0"])).values()
    )
    assert len(pool) == 100
    pool.load(["0"])
    assert sum(p.nbytes for p in pool.model.parameters()) == own + each
    pool.load(["1", "2"])
    pool(x, adapter_names=["1", "2"])
    memory = sorted(p.data_ptr() for p in pool.model.parameters())
    pool.load(["5", "6"])
    assert sum(p.nbytes for p in pool.model.parameters()) == own + 2 * each
    assert sorted(p.data_ptr() for p in pool.model.parameters()) == memory
    assert pool.in_use == ["5", "6"]


def test_stacks_are_kept_while_a_batch_names_the_same(folders, monkeypatch):
    import peft.kernels.grouped as grouped

    made: list[int] = []
    stack = grouped._stack
    monkeypatch.setattr(grouped, "_stack", lambda *args: made.append(1) or stack(*args))
    pool, x = AdapterPool(net(), capacity=4), torch.randn(2, 6)
    for name in ("user0", "user2"):
        pool.register(name, folders[name])
    with torch.no_grad():
        for _ in range(3):
            pool(x, adapter_names=["user0", "user2"])
    assert len(made) == 2, "one for each layer"


def test_tensors_in_memory_and_new_ones_under_an_old_name(folders):
    model = PeftModel.from_pretrained(net(), folders["user0"])
    tensors = get_peft_model_state_dict(model)
    pool, x = AdapterPool(net()), torch.randn(2, 6)
    pool.register("a", config=model.peft_config["default"], tensors=tensors)
    torch.testing.assert_close(pool(x, adapter_names=["a", "a"]), model(x))
    changed = {name: 2 * tensor for name, tensor in tensors.items()}
    pool.register("a", config=model.peft_config["default"], tensors=changed)
    assert not torch.allclose(pool(x, adapter_names=["a", "a"]), model(x))
    pool.unregister("a")
    assert pool.in_use == [] and pool.model is None


def test_other_methods(tmp_path):
    torch.manual_seed(0)
    config = IA3Config(target_modules=["first", "second"], feedforward_modules=["second"], init_ia3_weights=False)
    model = get_peft_model(net(), copy.copy(config)).eval()
    model.save_pretrained(tmp_path)
    pool, x = AdapterPool(net()), torch.randn(2, 6)
    pool.register("a", tmp_path)
    torch.testing.assert_close(pool(x, adapter_names=["a", "__base__"])[0], model(x)[0])


def test_errors_name_the_way_out_and_change_nothing(folders):
    pool, x = AdapterPool(net(), capacity=1), torch.randn(2, 6)
    for name in ("user0", "user1"):
        pool.register(name, folders[name])
    with pytest.raises(ValueError, match="'user9'.*register"):
        pool(x, adapter_names=["user9", "user0"])
    with pytest.raises(ValueError, match="2 adapters.*capacity"):
        pool(x, adapter_names=["user0", "user1"])
    assert pool.in_use == []
    with pytest.raises(ValueError, match="folder, or config and tensors"):
        pool.register("a")
