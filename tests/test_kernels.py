"""The fused kernels equal the plain path in value and gradient, keep less, and work wherever torch does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, get_peft_model
from peft.kernels import Factors, is_plain, low_rank_linear, plain
from peft.kernels.dropout import draw_seed, zero_dropped_
from peft.kernels.linear import composed
from peft.kernels.remake import recipe_of
from tests.toys import tiny_llama


class Net(nn.Module):
    """A norm, a gated block and two kinds of linear layers."""

    def __init__(self, bias: bool = True, kind: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.first = kind(6, 8, bias=bias)
        self.gate, self.up = kind(8, 12, bias=bias), kind(8, 12, bias=bias)
        self.down = kind(12, 8, bias=bias)
        self.transposed = Conv1D(5, 8)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 6] -> [..., 5]."""
        h = self.first(x)
        h = self.scale * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        return self.transposed(h + self.down(F.silu(self.gate(h)) * self.up(h)))


LAYERS = ["first", "gate", "up", "down", "transposed"]


def adapted(bias: bool = True, dtype: torch.dtype = torch.float32, adapters: int = 1, **options) -> nn.Module:
    """The net with LoRA on all layers."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=LAYERS, init_lora_weights=False, **options)
    model = get_peft_model(Net(bias).to(dtype), config)
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    model.base_model.set_adapter(["default", *(f"a{i}" for i in range(1, adapters))])
    return model.train()


def run(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and all gradients, that of the input included."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """All entries agree, relative to the largest of each tensor."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        error = (got[name].float() - value.float()).abs().max()
        assert error <= tolerance * (value.float().abs().max() + 1e-3), f"{name}: {error}"


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapters", [1, 2])
def test_values_and_gradients_equal_the_plain_path(shape, bias, adapters):
    model, x = adapted(bias, adapters=adapters), batch(*shape)
    got = run(model, x)
    with plain():
        assert is_plain()
        wanted = run(model, x)
    assert_equal(got, wanted)
    with torch.no_grad():
        assert_equal({"y": model(x)}, {"y": wanted["y"]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_sixteen_bits_agree_within_rounding(dtype, autocast_adapter_dtype):
    model = adapted(dtype=dtype)
    if not autocast_adapter_dtype:
        model.to(dtype)
    x = batch(4, 3, dtype=dtype)
    got = run(model, x)
    with plain():
        wanted = run(model, x)
    assert_equal(got, wanted, 0.03)


def test_autocast_agrees_within_rounding():
    model, x = adapted(), batch(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(model, x)
        with plain():
            wanted = run(model, x)
    assert_equal(got, wanted, 0.05)


def test_a_product_in_native_bfloat16(monkeypatch):
    """On devices with such products the adapters are rounded for them."""
    from peft.kernels import linear

    monkeypatch.setitem(linear._NATIVE, torch.bfloat16, True)
    model, x = adapted(dtype=torch.bfloat16), batch(4, 3, dtype=torch.bfloat16)
    got = run(model, x)
    with plain():
        assert_equal(got, run(model, x), 0.05)


class Fixed(nn.Module):
    """The mask that a seed gives, as a module that is no nn.Dropout."""

    def __init__(self, p: float, seed: int) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x with the entries dropped, the others scaled."""
        return x * zero_dropped_(torch.ones(x.shape), self.p, self.seed) / (1 - self.p)


def test_dropout_equals_the_plain_path_with_the_same_mask():
    model, x = adapted(lora_dropout=0.3), batch(5, 4)
    torch.manual_seed(5)
    got = run(model, x)
    torch.manual_seed(5)
    order = ["first", "gate", "up", "down", "transposed"]
    for name in order:
        getattr(model.base_model.model, name).lora_dropout["default"] = Fixed(0.3, draw_seed())
    assert_equal(got, run(model, x))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.8])
def test_masks_drop_each_entry_independently(p):
    n = 200_000
    mask = zero_dropped_(torch.ones(n), p, seed=3)
    dropped = (mask == 0).float()
    assert abs(dropped.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    both = (dropped[1:] * dropped[:-1]).mean()
    assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / n)
    halves = dropped.view(2, -1).mean(1)
    assert abs(halves[0] - halves[1]) < 10 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(mask, zero_dropped_(torch.ones(n), p, seed=3))
    assert not torch.equal(mask, zero_dropped_(torch.ones(n), p, seed=4))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_masks_of_few_entries(count):
    drops = torch.stack([(zero_dropped_(torch.ones(count), 0.4, seed) == 0).float() for seed in range(2000)])
    assert ((drops.mean(0) - 0.4).abs() < 0.06).all()


def test_dropout_stands_still_in_evaluation():
    model, x = adapted(lora_dropout=0.5).eval(), batch(3)
    assert torch.equal(model(x), model(x))


# --- what is kept -----------------------------------------------------------------------------------------------
def kept_shapes(step: Callable[[], object]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that autograd keeps."""
    shapes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return shapes


def pair(inner: int, out: int, r: int = 2) -> Factors:
    a, b = torch.randn(r, inner, requires_grad=True), torch.randn(out, r, requires_grad=True)
    return Factors(a, b, 0.5)


def test_an_input_is_kept_once_and_dropout_keeps_nothing_more():
    base = nn.Linear(6, 5).requires_grad_(False)
    x = torch.randn(7, 6, requires_grad=True)
    for rate in (0.0, 0.3):
        factors = [pair(6, 5), pair(6, 5)]
        for f in factors:
            f.dropout = rate
        shapes = kept_shapes(lambda factors=factors: low_rank_linear(base, x, factors, base.weight))
        assert shapes.count((7, 6)) == 1 and shapes.count((7, 2)) == 2 and (7, 5) not in shapes


MAKERS = {
    "gate": lambda a, b: F.silu(a) * b,
    "norm": lambda a, b: b.detach()[0] * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True))),
    "cast norm": lambda a, b: b.detach()[0] * (a * a.exp()).double().float(),
    "gelu": lambda a, b: F.gelu(a, approximate="tanh"),
    "silu": lambda a, b: F.silu(a),
    "layer norm": lambda a, b: F.layer_norm(a, (6,), b.detach()[0], b.detach()[1]),
    "wider scale": lambda a, b: b.detach()[0].double() * (a * a.exp()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_input_that_its_graph_can_make_again_is_not_kept(name):
    a, b = torch.randn(7, 6, requires_grad=True), torch.randn(7, 6, requires_grad=True)
    x = MAKERS[name](a, b)
    made = recipe_of(x)()
    assert made.dtype == x.dtype
    torch.testing.assert_close(made, x)
    base = nn.Linear(6, 5).requires_grad_(False).to(x.dtype)
    factors = [pair(6, 5)]
    assert (7, 6) not in kept_shapes(lambda: low_rank_linear(base, x, factors, base.weight))
    wanted = torch.autograd.grad(composed(base(x), x, factors).sum(), (a, factors[0].down), retain_graph=True)
    twice = [low_rank_linear(base, x, factors, base.weight) for _ in range(2)]  # two layers share what is made
    for y in twice:
        got = torch.autograd.grad(y.sum(), (a, factors[0].down), retain_graph=True)
        torch.testing.assert_close(got, wanted)


def test_an_input_that_others_change_afterwards_is_told_of():
    a, b = torch.randn(7, 6, requires_grad=True) * 1, torch.randn(7, 6, requires_grad=True)
    base = nn.Linear(6, 5).requires_grad_(False)
    y = low_rank_linear(base, a * b, [pair(6, 5)], base.weight)
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="in-?place"):
        y.sum().backward()


def test_hooks_that_keep_something_else_get_the_input_itself():
    a, b = torch.randn(7, 6, requires_grad=True), torch.randn(7, 6, requires_grad=True)
    base, factors, log = nn.Linear(6, 5).requires_grad_(False), [pair(6, 5)], []

    def unpack_once(index: int) -> torch.Tensor:
        value, log[index] = log[index], None
        return value

    def pack(tensor: torch.Tensor) -> int:
        log.append(tensor)
        return len(log) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack_once):
        y = low_rank_linear(base, a * b, factors, base.weight)
    got = torch.autograd.grad(y.sum(), (a, factors[0].down))
    wanted = torch.autograd.grad(composed(base(a * b), a * b, factors).sum(), (a, factors[0].down))
    torch.testing.assert_close(got, wanted)


# --- where it has to work ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_gradient_checkpointing(reentrant, rate):
    model, x = adapted(lora_dropout=rate), batch(4)
    torch.manual_seed(3)
    wanted = run(model, x)
    inner = model.base_model.model
    forward = inner.forward
    inner.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    torch.manual_seed(3)
    assert_equal(run(model, x), wanted)


def test_a_norm_outside_of_the_checkpointed_block():
    model, x = adapted(), batch(4)
    inner = model.base_model.model
    wanted = run(model, x)
    gate, up, down = inner.gate, inner.up, inner.down

    def forward(x: torch.Tensor) -> torch.Tensor:
        h = inner.first(x)
        h = inner.scale * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        product = checkpoint(lambda h: F.silu(gate(h)) * up(h), h, use_reentrant=False)
        return inner.transposed(h + down(product))

    inner.forward = forward
    assert_equal(run(model, x), wanted)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=str)
def test_compiles_without_graph_breaks(options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False, **options))
    ids = torch.arange(12).view(2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if not options.get("lora_dropout"):
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


def test_function_transforms():
    model, x = adapted(), batch(4)
    a = model.base_model.model.down.lora_A["default"].weight
    name = next(n for n, p in model.named_parameters() if p is a)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {name: value}, (x,)).sum()

    wanted = torch.autograd.grad(loss(a), a)[0]
    torch.testing.assert_close(torch.func.grad(loss)(a.detach()), wanted)


def test_second_derivatives():
    def penalty(model: nn.Module) -> list[torch.Tensor]:
        x = batch(4).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), [p for p in model.parameters() if p.requires_grad])

    model = adapted()
    got = penalty(model)
    with plain():
        torch.testing.assert_close(got, penalty(model), rtol=1e-4, atol=1e-4)


def test_outputs_may_be_changed_in_place():
    for bias in (True, False):
        model = adapted(bias)
        layer, x = model.base_model.model.gate, torch.randn(2, 3, 8, requires_grad=True)
        F.relu(layer(x), inplace=True).sum().backward()
        got = x.grad.clone()
        x.grad = None
        F.relu(layer(x)).sum().backward()
        torch.testing.assert_close(got, x.grad)


def test_base_layers_with_hooks_or_gradients_are_called():
    model, x = adapted(), batch(4)
    base = model.base_model.model.down.base_layer
    base.weight.requires_grad_(True)
    calls = []
    handle = base.register_forward_hook(lambda module, args, output: calls.append(output) or output * 2)
    got = run(model, x)
    with plain():
        wanted = run(model, x)
    assert len(calls) == 2 and any(name.endswith("down.base_layer.weight") for name in got)
    assert_equal(got, wanted)
    handle.remove()


def test_hooks_of_the_parts_are_called():
    model, x = adapted(), batch(4)
    seen = []
    model.base_model.model.down.lora_A["default"].register_forward_hook(lambda *args: seen.append(args))
    model(x)
    assert len(seen) == 1


@contextlib.contextmanager
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    model, x = adapted(), batch(4)
    wanted = run(model, x)
    with one_process(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(model)
        got = run(wrapped, x)
    assert_equal({name.removeprefix("module."): g for name, g in got.items()}, wanted)


def test_fully_sharded(tmp_path):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, x = adapted(), batch(4)
    wanted = run(model, x)
    with one_process(tmp_path):
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        got = run(model, x)
        assert any(isinstance(g, DTensor) for g in got.values())
        got = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in got.items()}
    assert_equal(got, wanted)
