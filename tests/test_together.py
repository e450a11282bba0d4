"""Layers that read one input work together: values and gradients are those of each on its own, in any use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft import LoraConfig, get_peft_model
from peft.core.layer import together
from peft.kernels import joint, plain


Grads = dict[str, torch.Tensor]


class Block(nn.Module):
    """A norm, layers that read its output, and a layer that reads theirs; ``called`` says which take part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(5, 6)
        self.q, self.k, self.v = nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.Linear(6, 5)
        self.called, self.again = "qkv", None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return self.out(sum(torch.tanh(getattr(self, name)(h)) for name in self.called))

        if self.again is None or not torch.is_grad_enabled():
            return x + inner(x)
        return x + checkpoint(inner, x, use_reentrant=self.again)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make(**options) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "target_modules": ["q", "k", "v", "out"], "init_lora_weights": False, **options})
    return get_peft_model(Model().double(), config).train()


def blocks(model: nn.Module) -> list[Block]:
    return list(model.base_model.model.blocks)


def gradients(model: nn.Module, compute: Callable[[nn.Module, torch.Tensor], torch.Tensor], **call) -> Grads:
    """The gradients of what trains, and of the input."""
    x = X.clone().requires_grad_()
    model.zero_grad()
    compute(model, x, **call).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "x": x.grad}


def squares(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()


def both_ways(model: nn.Module, compute: Callable = squares, times: int = 3) -> None:
    """Steps alone and together have the same gradients."""
    with plain():
        want = gradients(model, compute)
    for _ in range(times):
        torch.testing.assert_close(gradients(model, compute), want)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many A each input was multiplied by, where layers worked together: the test fails if they never did."""
    monkeypatch.setattr(together, "ROWS", 1)
    found: list[int] = []
    own = joint.ReadTogether.forward

    def forward(ctx, part, x, dtype, *downs):
        found.append(len(downs))
        return own(ctx, part, x, dtype, *downs)

    monkeypatch.setattr(joint.ReadTogether, "forward", staticmethod(forward))
    yield found


def test_each_input_is_read_once_from_the_second_call_on(calls: list[int]) -> None:
    model = make()
    both_ways(model, times=1)
    assert not calls
    both_ways(model, times=2)
    assert calls == [3, 3] * 2


def test_adapters_that_are_active_side_by_side(calls: list[int]) -> None:
    model = make()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    both_ways(model)
    assert calls[-1] == 5
    model.set_adapter("other")
    both_ways(model)
    assert calls[-1] == 2


def test_dropout_keeps_layers_apart(calls: list[int]) -> None:
    model = make(lora_dropout=0.5)
    for _ in range(2):
        torch.manual_seed(3)
        gradients(model, squares)
    assert not calls


def test_layers_that_are_not_called_are_left_out(calls: list[int]) -> None:
    model = make()
    for called in ("qkv", "qkv", "qk", "qk", "kv", "v", "qkv", "qkv"):
        for block in blocks(model):
            block.called = called
        both_ways(model, times=1)
    assert {2, 3} <= set(calls)


def test_losses_of_a_part_of_the_layers(calls: list[int]) -> None:
    model = make()
    both_ways(model)

    def of_one(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        block = blocks(model)[0]
        h = block.norm(x)
        parts = [getattr(block, name)(h) for name in "qkv"]
        return parts[1].square().sum() + 0 * parts[1].sum()

    both_ways(model, of_one)
    assert calls[-1] == 3


def test_gradients_of_a_part_of_the_graph_leave_nothing_behind(calls: list[int]) -> None:
    model = make()
    both_ways(model)
    with plain():
        want = gradients(model, squares)
    x = X.clone().requires_grad_()
    loss = squares(model, x)
    layer = blocks(model)[0].k
    for name, p in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        (found,) = torch.autograd.grad(loss, [p["default"].weight], retain_graph=True)
        torch.testing.assert_close(found, want[f"base_model.model.blocks.0.k.{name}.default.weight"])
    model.zero_grad()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, want["x"])
    x.grad = None
    loss.backward()
    torch.testing.assert_close(x.grad, want["x"])
    assert calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, calls: list[int]) -> None:
    model = make()
    for block in blocks(model):
        block.again = reentrant
    both_ways(model)
    assert bool(calls) == reentrant  # where torch counts what is kept, each call has to keep the same


def test_checkpointing_that_begins_and_ends_between_steps() -> None:
    model = make()
    for again in (None, False, True, False, None):
        for block in blocks(model):
            block.again = again
        both_ways(model, times=1)


def test_several_calls_before_one_backward_pass(calls: list[int]) -> None:
    model = make()

    def twice(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (model(x) * model(2 * x)).sum() + model(x).sum()

    both_ways(model, twice)
    assert calls


def test_hooks_see_what_they_always_did() -> None:
    model, seen = make(), []
    block = blocks(model)[0]
    block.norm.register_forward_hook(lambda m, args, y: y.register_hook(lambda g: seen.append(g.clone())) and None)
    block.register_full_backward_hook(lambda m, given, taken: seen.append(given[0].clone()))
    block.k.register_full_backward_hook(lambda m, given, taken: seen.append(given[0].clone()))
    block.v.base_layer.register_forward_hook(lambda m, args, y: y * 2)
    with plain():
        want = gradients(model, squares)
    expected = seen.copy()
    for _ in range(3):
        seen.clear()
        torch.testing.assert_close(gradients(model, squares), want)
        torch.testing.assert_close(sorted(seen, key=torch.norm), sorted(expected, key=torch.norm))


def test_second_derivatives(calls: list[int]) -> None:
    model = make()

    def penalty(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        (dx,) = torch.autograd.grad(squares(model, x), x, create_graph=True)
        return dx.square().sum()

    both_ways(model, penalty)
    assert calls


def test_nothing_of_a_graph_is_held_once_all_layers_have_come(calls: list[int]) -> None:
    model = make()
    both_ways(model)
    squares(model, X.clone().requires_grad_())
    assert calls and blocks(model)[0].q.context.readers.now.share is None


def test_copies_and_pickles_learn_anew() -> None:
    model = make()
    both_ways(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.base_model.model.blocks[0].q.context.readers.followers
        torch.testing.assert_close(gradients(other, squares), gradients(model, squares))


def test_compiled_models_are_left_alone(calls: list[int]) -> None:
    model = make()
    both_ways(model)
    calls.clear()
    with plain():
        want = gradients(model, squares)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(gradients(model, lambda model, x: squares(compiled, x)), want)
    assert not calls


def test_inference_mode_between_training_steps() -> None:
    model = make()
    wanted = model(X).detach()
    for _ in range(2):
        both_ways(model)
        with torch.inference_mode():
            torch.testing.assert_close(model(X.clone()), wanted)
