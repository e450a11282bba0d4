"""LoRA on parallel layers, tested on stand-ins with the documented interface of `megatron.core.tensor_parallel`.

Two stand-ins hold the two halves of one weight, as two processes would, and take turns: what a process would get from
the others (sums of partial outputs) is added up by the test.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.megatron import PARALLEL


class Parallel(nn.Module):
    """What both layers have; one process of `config.processes`, and no communication."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool, skip_bias_add: bool
    ) -> None:
        super().__init__()
        self.input_size, self.output_size, self.config, self.skip_bias_add = (
            input_size,
            output_size,
            config,
            skip_bias_add,
        )
        self.weight = nn.Parameter(torch.empty(self.local(config.processes)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(len(self.weight))) if bias else None)
        if config.perform_initialization:
            init_method(self.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [tokens, batch, in] -> output [tokens, batch, out], and the bias where it is not in it."""
        return F.linear(
            x, self.weight, None if self.skip_bias_add else self.bias
        ), self.bias if self.skip_bias_add else None


class ColumnParallelLinear(Parallel):
    def __init__(self, *sizes: int, gather_output: bool = False, **options: Any) -> None:
        self.gather_output = gather_output
        super().__init__(*sizes, **options)

    def local(self, processes: int) -> tuple[int, int]:
        return self.output_size // processes, self.input_size


class RowParallelLinear(Parallel):
    def __init__(self, *sizes: int, input_is_parallel: bool, **options: Any) -> None:
        self.input_is_parallel = input_is_parallel
        super().__init__(*sizes, **options)

    def local(self, processes: int) -> tuple[int, int]:
        return self.output_size, self.input_size // processes


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> str:
    package, layers = ModuleType("standin"), ModuleType("standin.tensor_parallel")
    layers.ColumnParallelLinear, layers.RowParallelLinear = ColumnParallelLinear, RowParallelLinear
    for module in (package, layers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for kind in PARALLEL:
        monkeypatch.setattr(kind, "types", ())
    return "standin"


class Block(nn.Module):
    """A column-parallel layer, and a row-parallel one that takes its outputs."""

    def __init__(self, processes: int = 1, sequence_parallel: bool = False) -> None:
        super().__init__()
        config = SimpleNamespace(
            processes=processes,
            sequence_parallel=sequence_parallel,
            perform_initialization=True,
            params_dtype=torch.float32,
        )
        fields: dict[str, Any] = {"config": config, "init_method": nn.init.xavier_normal_, "bias": True}
        self.up = ColumnParallelLinear(6, 8, **fields, skip_bias_add=True)
        self.down = RowParallelLinear(8, 6, **fields, skip_bias_add=False, input_is_parallel=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, 6] -> the same; the layers see [tokens, batch, 6]."""
        y, bias = self.up(x.transpose(0, 1))
        return self.down(torch.tanh(y + bias))[0].transpose(0, 1)


def config(**changes: Any) -> LoraConfig:
    fields = {"target_modules": ["up", "down"], "r": 2, "init_lora_weights": False, "megatron_core": "standin"}
    return LoraConfig(**{**fields, "megatron_config": {"tensor_model_parallel_size": 1}, **changes})


def adapted(**changes: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Block(), config(**changes)).eval()


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


def test_output_gradient_merge_and_files(tmp_path: Any) -> None:
    model = adapted(lora_alpha=6)
    plain = copy.deepcopy(model.base_model.model)
    for name in ("up", "down"):
        layer = getattr(plain, name)
        dense = layer.base_layer
        with torch.no_grad():
            dense.weight += 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        setattr(plain, name, dense)
    found = model(X)
    torch.testing.assert_close(found, plain(X))
    assert isinstance(model.base_model.model.up(X), tuple), "the layer keeps its interface"
    found.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 4 and all(g is not None and g.abs().sum() > 0 for g in grads.values())
    assert set(get_peft_model_state_dict(model)) == {
        f"base_model.model.{name}.lora_{letter}.weight" for name in ("up", "down") for letter in "AB"
    }
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    torch.testing.assert_close(PeftModel.from_pretrained(Block(), tmp_path)(X), found)
    model.merge_adapter()
    torch.testing.assert_close(model(X), found)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), found)
    assert type(model.unload().up) is ColumnParallelLinear


def test_two_halves_are_the_whole() -> None:
    """Each process holds its half of B of a layer split by outputs, and of A of one split by inputs."""
    whole = adapted()
    halves = []
    for i in range(2):
        half = get_peft_model(Block(processes=2), config()).eval()
        own = half.base_model.model
        for name, split in (("up", 0), ("down", 1)):
            ours, theirs = getattr(own, name), getattr(whole.base_model.model, name)
            pairs = [
                (ours.base_layer.weight, theirs.base_layer.weight, split),
                (ours.lora_A["default"].weight, theirs.lora_A["default"].weight, 1 if split else None),
                (ours.lora_B["default"].weight, theirs.lora_B["default"].weight, None if split else 0),
            ]
            for mine, full, axis in pairs:
                mine.data.copy_(full if axis is None else full.chunk(2, axis)[i])
        halves.append(own)
    with torch.no_grad():
        hidden = [torch.tanh(half.up(X)[0]) for half in halves]
        torch.testing.assert_close(torch.cat(hidden, -1), torch.tanh(whole.base_model.model.up(X)[0]))
        partial = [half.down.lora_A["default"](h) for half, h in zip(halves, hidden)]
        layer = whole.base_model.model.down
        torch.testing.assert_close(sum(partial), layer.lora_A["default"](torch.cat(hidden, -1)))
        shards = [half.down.get_delta_weight("default") for half in halves]
        torch.testing.assert_close(torch.cat(shards, 1), layer.get_delta_weight("default"))


def test_rows_of_a_batch_have_each_their_adapter() -> None:
    model = adapted()
    model.add_adapter("other", config())
    with torch.no_grad():
        found = model(X, adapter_names=["default", "__base__", "other"])
        torch.testing.assert_close(found[0], model(X)[0])
        with model.disable_adapter():
            torch.testing.assert_close(found[1], model(X)[1])
        model.set_adapter("other")
        torch.testing.assert_close(found[2], model(X)[2])


def test_factors_are_made_as_the_layer_is() -> None:
    model = get_peft_model(Block(sequence_parallel=True), config(init_lora_weights=True)).base_model.model
    assert (
        isinstance(model.up.lora_B["default"], ColumnParallelLinear) and not model.up.lora_B["default"].gather_output
    )
    assert (
        isinstance(model.down.lora_A["default"], RowParallelLinear) and model.down.lora_A["default"].input_is_parallel
    )
    replicated = model.up.lora_A["default"].weight, model.down.lora_B["default"].weight
    assert all(weight.sequence_parallel for weight in replicated), "their gradients are summed over the processes"
    assert not model.up.lora_B["default"].weight.any() and model.down.lora_A["default"].weight.std() > 0.1


def test_what_has_no_meaning_is_refused() -> None:
    before = list(Block().state_dict())
    block = Block()
    with pytest.raises(ValueError, match="parallel layers of 'megatron.nowhere'.*pip install megatron-core"):
        get_peft_model(block, config(megatron_core="megatron.nowhere"))
    assert list(block.state_dict()) == before
    for fields in ({"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "orthogonal"}):
        with pytest.raises(ValueError, match="no process holds all of a parallel layer's weight or pair"):
            get_peft_model(Block(), config(**fields))
    with pytest.raises(ValueError, match="where megatron_config is given"):
        get_peft_model(Block(), config(megatron_config=None))
