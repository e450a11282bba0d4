"""The fused kernels equal the plain path in value and gradient, keep less, and work wherever torch does."""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import tiny_llama
from transformers.pytorch_utils import Conv1D

from peft import FourierFTConfig, LoraConfig, ShiraConfig, get_peft_model
from peft.kernels import Factors, adapted_norm, dora_linear, few, is_plain, low_rank_linear, plain, spectral
from peft.kernels.dropout import Dropped, draw_seed
from peft.kernels.grouped import GroupedLowRank, grouped_linear
from peft.kernels.linear import composed
from peft.kernels.remake import recipe_of
from peft.kernels.sparse import sparse_linear
from peft.kernels.spectral import spectral_linear, spectral_matrix


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


@pytest.fixture(params=["fused", "few"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our functions of autograd, and by its own operations, as few entries are."""
    if request.param == "few":
        monkeypatch.setattr(few, "ENTRIES", 2**16)


@pytest.mark.usefixtures("either_way")
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


@pytest.mark.usefixtures("either_way")
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


@pytest.mark.usefixtures("either_way")
def test_autocast_agrees_within_rounding():
    model, x = adapted(), batch(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(model, x)
        with plain():
            wanted = run(model, x)
    assert_equal(got, wanted, 0.05)


@pytest.mark.usefixtures("either_way")
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
        return x * Dropped(self.p, self.seed).zero_(torch.ones(x.shape)) / (1 - self.p)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7])
def test_dropout_equals_the_plain_path_with_the_same_mask(rate):
    model, x = adapted(lora_dropout=rate), batch(5, 4)
    torch.manual_seed(5)
    got = run(model, x)
    torch.manual_seed(5)
    order = ["first", "gate", "up", "down", "transposed"]
    for name in order:
        getattr(model.base_model.model, name).lora_dropout["default"] = Fixed(rate, draw_seed())
    assert_equal(got, run(model, x))


@pytest.mark.few
def test_few_entries_are_dropped_as_torch_does(monkeypatch):
    model, x = adapted(lora_dropout=0.5), batch(5, 4)
    torch.manual_seed(5)
    got = run(model, x)
    torch.manual_seed(5)
    for name in LAYERS:
        monkeypatch.setattr(getattr(model.base_model.model, name).lora_dropout["default"], "forward", dropped_by_torch)
    assert_equal(got, run(model, x))


def dropped_by_torch(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 0.5)


@pytest.mark.few
@pytest.mark.parametrize("x", [batch(2), batch(2, 3)[:, :2]], ids=["matrix", "strided"])
def test_what_few_entries_give_is_no_view(x):
    model = adapted()
    y = model(x)
    before = y.detach().clone()
    assert not y._is_view()
    y.mul_(2)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), 2 * before)
    wanted = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    (2 * model(x)).sum().backward()
    torch.testing.assert_close(wanted, [p.grad for p in model.parameters() if p.requires_grad])


@pytest.mark.few
def test_how_many_entries_are_few():
    model, wide = adapted(), torch.randn(few.ENTRIES // 6 + 1, 6)

    def seen(x: torch.Tensor) -> set[str]:
        """Names of the nodes of a graph."""
        found, left = set(), [model(x).grad_fn]
        while left:
            if (node := left.pop()) is not None and node not in found:
                found.add(node)
                left += [edge for edge, _ in node.next_functions]
        return {node.name() for node in found}

    assert "LowRankLinearBackward" not in seen(wide[:100])
    assert "LowRankLinearBackward" in seen(wide)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.8])
def test_masks_drop_each_entry_independently(p):
    n = 200_000
    mask = Dropped(p, 3).zero_(torch.ones(n))
    dropped = (mask == 0).float()
    assert abs(dropped.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    both = (dropped[1:] * dropped[:-1]).mean()
    assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / n)
    halves = dropped.view(2, -1).mean(1)
    assert abs(halves[0] - halves[1]) < 10 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(mask, Dropped(p, 3).zero_(torch.ones(n)))
    assert not torch.equal(mask, Dropped(p, 4).zero_(torch.ones(n)))


def test_places_that_were_kept_are_those_drawn_again():
    x = torch.ones(30, 40)
    first = Dropped(0.05, 3)
    zeros = first.copy(x)
    places = first.few()
    assert places.dtype == torch.int32 and 16 * places.numel() < 1.5 * x.numel()
    assert torch.equal(Dropped(0.05, 4, places).copy(x), zeros)
    often = Dropped(0.3, 3)
    often.copy(x)
    assert often.few() is None


def test_masks_may_change_when_checkpointing_computes_again():
    torch.manual_seed(0)
    model, x = adapted(lora_dropout=0.05), batch(40, 30).requires_grad_()
    checkpoint(model, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_masks_of_few_entries(count):
    drops = torch.stack([(Dropped(0.4, seed).zero_(torch.ones(count)) == 0).float() for seed in range(2000)])
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
@pytest.mark.usefixtures("either_way")
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


@pytest.mark.usefixtures("either_way")
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


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the compiler needs one of C++")
def test_compiles_to_machine_code():
    torch._dynamo.reset()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8))
    model, x = get_peft_model(base, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)), batch(4)
    wanted = run(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    assert_equal({name.removeprefix("_orig_mod."): g for name, g in run(compiled, x).items()}, wanted)
    with torch.no_grad():
        assert_equal({"y": compiled(x)}, {"y": wanted["y"]})


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


def _steps(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a second step of training gives: the first has changed the parameters."""
    run(model, x)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    return run(model, x)


def _sharded(model: nn.Module, **options) -> nn.Module:
    """Each adapted layer is gathered for itself, and the rest with the root."""
    from torch.distributed.fsdp import fully_shard

    for name in LAYERS:
        fully_shard(getattr(model.base_model.model, name), **options)
    return fully_shard(model, **options)


def _distributed_worker(rank: int, folder: str) -> None:
    """One of two processes, half of the batch each: DDP, FSDP2, and FSDP2 that computes in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor

    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the name of this machine resolves to
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    x, found = batch(4).chunk(2)[rank], {}
    for name, options in DISTRIBUTED.items():
        found[f"ddp {name}"] = _steps(nn.parallel.DistributedDataParallel(adapted(**options)), x)
        model = _sharded(adapted(**options))
        sharded = _steps(model, x)
        assert any(isinstance(g, DTensor) and g.to_local().shape != g.shape for g in sharded.values())
        found[f"fsdp {name}"] = sharded
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found["bfloat16"] = _steps(_sharded(adapted(), mp_policy=narrow), x)
    whole = {
        case: {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in values.items()}
        for case, values in found.items()
    }
    torch.save(whole, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


DISTRIBUTED = {"lora": {}, "dora": {"use_dora": True}, "two adapters": {"adapters": 2}}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each process found, case by case."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(_distributed_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", [*(f"{how} {name}" for how in ("ddp", "fsdp") for name in DISTRIBUTED), "bfloat16"])
def test_two_processes_train_as_one(case, two_processes):
    options, halves = DISTRIBUTED.get(case.partition(" ")[2], {}), [found[case] for found in two_processes]
    got = {key.removeprefix("module."): value for key, value in halves[0].items()}
    for key in ("x", "y"):
        got[key] = torch.cat([half[key] for half in halves])
    model, x = adapted(**options), batch(4)
    run(model, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad /= 2  # both average over the processes
    torch.optim.SGD(trained, lr=0.05).step()
    wanted = run(model, x)
    wanted = {key: value if key in ("x", "y") else value / 2 for key, value in wanted.items()}
    wanted = {key: value.to(got[key].dtype) for key, value in wanted.items()}
    assert_equal(got, wanted, 0.06 if case == "bfloat16" else 1e-5)


# --- rows with different adapters -------------------------------------------------------------------------------
NAMES = ["default", "a1", "__base__", "a2", "a1", "default"]


def several(rates: tuple[float, ...] = (0.0, 0.0, 0.0), dtype: torch.dtype = torch.float32) -> nn.Module:
    """The net with three adapters of different ranks and targets."""
    torch.manual_seed(0)
    ranks, targets = (3, 5, 2), (LAYERS, LAYERS, LAYERS[:3])
    configs = [
        LoraConfig(r=r, target_modules=t, init_lora_weights=False, lora_dropout=p)
        for r, t, p in zip(ranks, targets, rates)
    ]
    model = get_peft_model(Net().to(dtype), configs[0])
    model.add_adapter("a1", configs[1])
    model.add_adapter("a2", configs[2])
    model.base_model.set_requires_grad(["default", "a1", "a2"])
    return model.train()


def run_mixed(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of a batch whose rows have different adapters."""
    inner = model.forward
    model.forward = lambda x: inner(x, adapter_names=NAMES)
    try:
        return run(model, x)
    finally:
        del model.forward


@pytest.fixture
def grouped_calls(monkeypatch) -> list[int]:
    """Rows of each call of the grouped product."""
    from peft.core.layer import rows

    calls = []

    def count(owner, base, x, *args):
        calls.append(len(x))
        return grouped_linear(owner, base, x, *args)

    monkeypatch.setattr(rows, "grouped_linear", count)
    return calls


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 40), (6, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)], ids=str)
def test_rows_with_different_adapters_equal_a_loop_over_them(shape, dtype, tolerance, grouped_calls):
    model, x = several(dtype=dtype), batch(*shape, dtype=dtype)
    got = run_mixed(model, x)
    assert len(grouped_calls) == len(LAYERS)
    with plain():
        wanted = run_mixed(model, x)
    assert len(grouped_calls) == len(LAYERS)
    assert_equal(got, wanted, tolerance)
    with torch.no_grad():
        for _ in range(2):  # the second call knows where the rows stand
            assert_equal({"y": model(x, adapter_names=NAMES)}, {"y": wanted["y"]}, tolerance)


@pytest.mark.parametrize("index", [[0, 1, 2], [2, 0, 1], [0, 0, 1, 1, 2, 2], [1, 0, 0, 0, 2], [1, 1]], ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_rows_are_put_together_whatever_their_order(index, tokens):
    """Of one token each they stand by their updates; rows of nine gather the factors, of rank 2, instead."""
    torch.manual_seed(0)
    x, y = torch.randn(len(index), tokens, 3).double(), torch.randn(len(index), tokens, 4).double()
    down, up = torch.randn(3, 2, 3).double(), torch.randn(3, 2, 4).double()
    inputs = [t.requires_grad_() for t in (x, down, up)]
    wanted = torch.stack([y[i] + x[i] @ down[g].T @ up[g] for i, g in enumerate(index)])

    def grouped(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return GroupedLowRank.apply(x, y.clone(), down, up, torch.tensor(index), None)

    torch.testing.assert_close(grouped(*inputs), wanted)
    assert torch.autograd.gradcheck(grouped, inputs)


@pytest.mark.parametrize("index", [[0, 1, 2, 0, 1, 2], [2, 2, 0, 1], [0, 1, 0, 0, 2, 1, 1], [1, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2)], ids=str)
@pytest.mark.parametrize("long", [0, 2**20])
@pytest.mark.parametrize("rate, bypass", [(0.0, True), (0.0, False), (0.4, True)])
def test_without_gradients_rows_stand_where_they_are_or_are_moved(index, shape, long, rate, bypass, monkeypatch):
    """In one slice, in several if they are long, or else moved: the output is that of the stacked factors."""
    monkeypatch.setattr("peft.kernels.grouped.LONG", long)
    torch.manual_seed(0)
    base, x = nn.Linear(8, 5), torch.randn(len(index), *shape, 8)
    factors = [Factors(torch.randn(r, 8), torch.randn(5, r), scale, rate) for r, scale in ((2, 1.0), (3, 0.5))]
    with torch.no_grad():
        found = []
        for owner in (None, base):  # what is kept for an owner are stacks
            torch.manual_seed(1)
            given = owner, base, x, torch.tensor(index), [*factors, None], base.weight if bypass else None
            found += [grouped_linear(*given) for _ in range(1 if rate else 2)][-1:]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("length", [1, 40])
def test_rows_with_dropout(length):
    """The same seeds, and the masks as modules."""
    model, x = several((0.3, 0.3, 0.3)), batch(6, length)
    torch.manual_seed(5)
    got = run_mixed(model, x)
    torch.manual_seed(5)
    with torch.no_grad():
        alike = model(x, adapter_names=NAMES)
    torch.manual_seed(5)
    for name in LAYERS:
        layer, seed = getattr(model.base_model.model, name), draw_seed()
        mask = Dropped(0.3, seed).zero_(torch.ones(6, length, layer.in_features)) / 0.7
        for adapter in layer.adapter_names:
            rows = [i for i, n in enumerate(NAMES) if n == adapter]
            layer.lora_dropout[adapter] = Masked(mask[rows])
    assert_equal(got, run_mixed(model, x))
    with torch.no_grad():
        assert_equal({"y": alike}, {"y": model(x, adapter_names=NAMES)})


class Masked(nn.Module):
    """Multiplies by a tensor."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x times the mask."""
        return x * self.mask


def test_different_rates_of_dropout_fall_back_to_the_loop(grouped_calls):
    model = several((0.3, 0.1, 0.0))
    run_mixed(model, batch(6, 2))
    assert not grouped_calls


def test_mixed_rows_follow_their_adapters():
    model, x = several().eval(), batch(6, 2)

    def check() -> torch.Tensor:
        with torch.no_grad():
            got = model(x, adapter_names=NAMES)
            with plain():
                torch.testing.assert_close(got, model(x, adapter_names=NAMES))
        return got

    before = check()
    layer = model.base_model.model.down
    changes = [
        lambda: layer.lora_A["a1"].weight.data.fill_(1),  # no version tells what is written to .data
        lambda: nn.init.ones_(layer.lora_B["default"].weight),
        lambda: setattr(layer.lora_A["default"].weight, "data", torch.ones(3, 12)),
        lambda: layer.set_scale("a1", 3.0),
        lambda: (
            model.delete_adapter("a2"),
            model.add_adapter("a2", LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=False)),
        ),
    ]
    for change in changes:
        change()
        after = check()
        assert not torch.equal(before, after)
        before = after


def test_several_adapters_train_from_one_batch():
    model, x = several(), batch(6, 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(x, adapter_names=NAMES)[[0, 1, 3, 4, 5]].pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.any() for g in grads.values()) and losses[-1] < 0.5 * losses[0]


# --- DoRA -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=str)
def test_dora_equals_the_plain_path(bias, dtype, tolerance):
    model, x = adapted(bias, dtype=dtype, use_dora=True), batch(4, 3, dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.linspace(0.5, 1.5, len(p)))
        model.base_model.model.up.lora_magnitude_vector["default"].weight[0] = 0  # its row leaves no trace in y
    got = run(model, x)
    with plain():
        wanted = run(model, x)
    assert_equal(got, wanted, tolerance)


class FixedDropout(nn.Dropout):
    """The same, as a dropout of another class."""

    def __init__(self, p: float, seed: int) -> None:
        super().__init__(p)
        self.seed = seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x with the entries dropped, the others scaled."""
        return Fixed(self.p, self.seed)(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=str)
def test_dora_with_dropout_equals_the_plain_path_with_the_same_mask(bias, dtype, tolerance):
    model, x = adapted(bias, dtype=dtype, use_dora=True, lora_dropout=0.3), batch(5, 4, dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.linspace(0.5, 1.5, len(p)))
    torch.manual_seed(5)
    got = run(model, x)
    torch.manual_seed(5)
    for name in LAYERS:
        getattr(model.base_model.model, name).lora_dropout["default"] = FixedDropout(0.3, draw_seed())
    assert_equal(got, run(model, x), tolerance)


def test_dora_with_dropout_keeps_its_input_alone():
    torch.manual_seed(0)
    x, f, m = torch.randn(7, 6, requires_grad=True), pair(6, 5), torch.rand(5, requires_grad=True)
    base, f.dropout = nn.Linear(6, 5).requires_grad_(False), 0.3
    shapes = kept_shapes(lambda: dora_linear(x, base.weight, base.bias, f, m))
    assert shapes.count((7, 6)) == 1 and (7, 5) not in shapes


def test_dora_norm_equals_that_of_the_matrix():
    torch.manual_seed(0)
    w, a, b = torch.randn(7, 9), torch.randn(3, 9), torch.randn(7, 3)
    torch.testing.assert_close(adapted_norm(w, a, b, 0.7), (w + 0.7 * b @ a).norm(dim=1))


def test_dora_keeps_no_more_than_its_output():
    torch.manual_seed(0)
    x, f, m = torch.randn(7, 6, requires_grad=True), pair(6, 5), torch.rand(5, requires_grad=True)
    base = nn.Linear(6, 5).requires_grad_(False)
    shapes = kept_shapes(lambda: dora_linear(x, base.weight, base.bias, f, m))
    assert shapes.count((7, 6)) == 1 and shapes.count((7, 5)) == 1 and shapes.count((7, 2)) == 1
    narrow, g, n = nn.Linear(6, 2).requires_grad_(False), pair(6, 2), torch.rand(2, requires_grad=True)
    assert kept_shapes(lambda: dora_linear(x, narrow.weight, narrow.bias, g, n)).count((7, 2)) == 1  # A x alone


# --- sparse spectra ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(6, 8), (7, 5), (8, 8), (5, 6)], ids=str)
def test_a_product_by_spectra_equals_that_with_the_weight(shape):
    torch.manual_seed(0)
    places = torch.randperm(shape[0] * shape[1])[:11]
    u, v = places // shape[1], places % shape[1]
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    values = torch.randn(11, dtype=torch.float64, requires_grad=True)
    spectrum = torch.zeros(shape, dtype=torch.complex128).index_put((u, v), values.to(torch.complex128))
    wanted = x @ torch.fft.ifft2(spectrum).real.T
    got, weights = spectral_linear(x, values, (u, v), shape), torch.randn(shape[0], dtype=torch.float64)
    torch.testing.assert_close(got, wanted)
    gradients = (torch.autograd.grad((y * weights).sum(), (x, values)) for y in (got, wanted))
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(spectral_linear(x, values, (u, v), shape), wanted)
        torch.testing.assert_close(spectral_matrix(values, (u, v), shape), torch.fft.ifft2(spectrum).real)


@pytest.mark.parametrize("tokens", [1, 3, 40], ids="{} tokens".format)
@pytest.mark.parametrize("shape", [(6, 8), (12, 5), (5, 12)], ids=str)
def test_a_weight_and_its_sparse_spectrum_are_multiplied_by_as_one(shape, tokens):
    torch.manual_seed(0)
    base = nn.Linear(*shape[::-1]).double().requires_grad_(False)
    places = torch.randperm(shape[0] * shape[1])[:11]
    places = places // shape[1], places % shape[1]
    x = torch.randn(1, tokens, shape[1], dtype=torch.float64, requires_grad=True)
    values = torch.randn(11, dtype=torch.float64, requires_grad=True)
    wanted = base(x) + spectral_linear(x, values, places, shape)
    got = spectral_linear(x, values, places, shape, base.weight, base.bias)
    torch.testing.assert_close(got, wanted)
    weights = torch.randn_like(got)
    gradients = (torch.autograd.grad((y * weights).sum(), (x, values)) for y in (got, wanted))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tokens", [1, 40], ids="{} tokens".format)
@pytest.mark.parametrize("n", [1, 20], ids="{} entries".format)
@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
def test_a_weight_and_its_sparse_update_are_multiplied_by_as_one(tokens, n, transposed):
    torch.manual_seed(0)
    weight = torch.randn(6, 8, dtype=torch.float64).T if transposed else torch.randn(8, 6, dtype=torch.float64)
    bias, positions = torch.randn(8, dtype=torch.float64), torch.randint(48, (n,))
    x = torch.randn(1, tokens, 6, dtype=torch.float64, requires_grad=True)
    values = torch.randn(n, dtype=torch.float64, requires_grad=True)
    wanted = x @ weight.flatten().index_add(0, positions, values).view(8, 6).T + bias
    got, weights = sparse_linear(x, values, positions, weight, bias), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(got, wanted)
    gradients = (torch.autograd.grad((y * weights).sum(), (x, values)) for y in (got, wanted))
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(sparse_linear(x, values, positions, weight, bias), wanted)


def test_a_sparse_update_keeps_no_matrix_and_an_input_only_where_it_cannot_be_made_again():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.SiLU(), nn.Linear(40, 30)), ShiraConfig(r=1, target_modules=["1"]))
    x = torch.randn(80, 40, requires_grad=True)
    shapes = kept_shapes(lambda: model(x).sum().backward())
    assert shapes.count((30, 40)) == 1  # the frozen weight
    assert shapes.count((80, 40)) == 1  # what the activation keeps


def test_layers_that_read_one_input_transform_it_once_in_the_backward_pass(monkeypatch):
    torch.manual_seed(0)
    x, made = torch.randn(3, 4, requires_grad=True), []
    shared = F.silu(x)
    values = [torch.randn(5, requires_grad=True) for _ in range(3)]
    places = torch.arange(5) % 4, torch.arange(5) % 3
    y = sum(spectral_linear(shared, v, places, (4, 4)) for v in values)
    plain_spectrum = spectral._spectrum
    monkeypatch.setattr(spectral, "_spectrum", lambda x: made.append(tuple(x.shape)) or plain_spectrum(x))
    y.sum().backward(retain_graph=True)
    assert len(made) == 4  # of three gradients and one input
    first = [v.grad.clone() for v in values]
    y.sum().backward()
    torch.testing.assert_close([v.grad for v in values], [2 * g for g in first])


@pytest.mark.parametrize("tokens", [4, 80], ids="{} tokens".format)
def test_a_small_spectrum_keeps_nothing_as_large_as_the_weight(tokens):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(40, 30)), FourierFTConfig(n_frequency=20, target_modules=["0"], scaling=1.0)
    )
    x = torch.randn(tokens, 40)
    shapes = kept_shapes(lambda: model(x).sum().backward())
    assert shapes.count((30, 40)) == 1 and (tokens, 40) in shapes  # the frozen weight, and the input
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(model(x), merged(x))


def test_a_torch_that_does_not_tell_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.6 does not say whether checkpointing is at work. Everything is kept, and gradients are the same."""
    model, x = adapted(), batch(4)
    wanted = run(model, x)
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert_equal(run(model, x), wanted)
