"""The laws for every weight method over quantised bases: see `laws.py` for the methods, `quantised.py` for the bases.

A method acts on W as the storage reads it. So merging into dense layers is exact, merging into codes is off by what
the storage reports that it has rounded, and unmerging gives the same codes.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from laws import methods, sampled
from quantised import BASES, IN, MAIN, noise, pack
from torch import nn

from peft import PeftModel, get_peft_model
from peft.core.families import Copy, Rows
from peft.core.layer.weight import base_weight, folded_bias, folded_weight
from peft.testing.cells import Method, layers, perturb


pytestmark = pytest.mark.filterwarnings("ignore")

# What waits for a token does nothing in layers that see no tokens.
WEIGHT_METHODS = [m for m in methods() if not m.is_a(Copy, Rows) and m.has("target_modules") and not m.waits]
FULL = [(m, base) for m in WEIGHT_METHODS for base in (MAIN[:1] if "+" in m.name else MAIN)]
MERGED = FULL + [(m, base) for m in WEIGHT_METHODS if "[" not in m.name for base in BASES if base not in MAIN]


def over(cases: list[tuple[Method, str]]):
    """Parametrise a law over methods on storages."""

    def decorate(law: Any) -> Any:
        met = sampled(law.__name__, cases, lambda case: (case[0], f"{case[0].name}-{case[1]}"))
        cases_met = [pytest.param(m, b, id=f"{m.name}-{b}") for m, b in met]
        return pytest.mark.parametrize(("method", "base"), cases_met)(law)

    return decorate


def adapted(method: Method, model: nn.Module) -> PeftModel:
    torch.default_generator.manual_seed(2)
    config = method.config_cls(**copy.deepcopy(method.given) | {"target_modules": ["0", "2"]})
    model = get_peft_model(model, config, "one").eval()
    perturb(model, "one", 10)
    return model


def inputs() -> torch.Tensor:
    return torch.randn(4, 3, IN, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs())


def near(found: torch.Tensor, wanted: torch.Tensor, bound: float, what: str = "") -> None:
    """Equal but for a relative error of the whole."""
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error <= bound, f"{what}: {error:.2g} > {bound:.2g}"


def mergeable(model: PeftModel) -> bool:
    return not any(layer.adapters["one"].unmergeable() for _, layer in layers(model))


def as_dense(model: PeftModel) -> nn.Module:
    """The plain float32 model with W as the storages read it, and the adapter folded in by the method's definition."""
    parts: list[nn.Module] = []
    for _, layer in layers(model):
        weight, bias = folded_weight(layer, [layer.adapters["one"]]), folded_bias(layer, [layer.adapters["one"]])
        plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
        plain.weight = nn.Parameter(weight.detach().float())
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().float())
        parts.append(plain)
    return nn.Sequential(parts[0], nn.Tanh(), parts[1])


def codes(model: PeftModel) -> list[list[torch.Tensor]]:
    """What each layer's weight consists of, bit by bit."""
    found = []
    for _, layer in layers(model):
        base = layer.get_base_layer()
        kept = [getattr(base, slot, None) for slot in layer.storage.slots]
        found.append([t.data.clone() for t in kept if isinstance(t, torch.Tensor) and type(t.data) is torch.Tensor])
        found.append([layer.storage.read(base, "weight").clone()])
    return found


@over(MERGED)
def test_the_forward_is_that_of_the_folded_weight_and_merging_dense_is_exact(method: Method, base: str) -> None:
    model = adapted(method, BASES[base]())
    if not mergeable(model):
        pytest.skip("no weight equals this adapter")
    before = run(model)
    dense = as_dense(model)
    near(before, run(dense), 4 * noise(base), "forward")
    merged = model.merge_and_unload(dequantize=True)
    assert all(type(merged[i]) is nn.Linear for i in (0, 2))
    dtype = torch.bfloat16 if base == "bnb-nf4-bfloat16" else torch.float32
    assert all(merged[i].weight.dtype == dtype for i in (0, 2))
    for i in (0, 2):
        near(merged[i].weight.float(), dense[i].weight, 1e-6 if dtype == torch.float32 else 4e-3, "weight")
    if dtype == torch.float32:
        near(run(merged), run(dense), 1e-5, "merged")


@over(MERGED)
def test_merging_rounds_as_reported_and_unmerging_gives_the_same_codes(method: Method, base: str) -> None:
    model = adapted(method, BASES[base]())
    if not mergeable(model):
        pytest.skip("no weight equals this adapter")
    before, codes_before = run(model), codes(model)
    wanted = [folded_weight(layer, [layer.adapters["one"]]).float() for _, layer in layers(model)]
    for mode in (False, True, False):
        model.train(mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.merge_adapter()
        for (_, layer), weight in zip(layers(model), wanted):
            error = ((base_weight(layer).float() - weight).norm() / weight.norm()).item()
            assert abs(error - layer.merge_error) < 1e-3 and error < (0.25 if "4" in base else 0.02)
        worst = max(layer.merge_error for _, layer in layers(model))
        assert any("relative error" in str(w.message) for w in caught) == (worst > 0.01)
        near(run(model.eval()), before, 5 * worst + 4 * noise(base), "merged")
        model.unmerge_adapter()
        for found, old in zip(codes(model), codes_before):
            assert len(found) == len(old) and all(torch.equal(a, b) for a, b in zip(found, old))
        assert torch.equal(run(model), before)


@over(FULL)
def test_a_step_reaches_the_adapter_and_agrees_with_the_dense_base(method: Method, base: str) -> None:
    """Gradients on the quantised base are those on a dense base with the same W."""
    model = adapted(method, BASES[base]())
    other = copy.deepcopy(model)
    for _, layer in layers(other):
        old = layer.get_base_layer()
        new = nn.Linear(layer.in_features, layer.out_features, bias=old.bias is not None)
        new.weight = nn.Parameter(base_weight(layer).float(), requires_grad=False)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().float(), requires_grad=False)
        layer.replace_base(new)
    grads = []
    for m in (model, other):
        m.train()
        torch.default_generator.manual_seed(3)
        m(inputs()).square().mean().backward()
        grads.append([p.grad for _, layer in layers(m) for p in layer.adapter_parameters("one") if p.requires_grad])
        assert not any(p.grad is not None for n, p in m.named_parameters() if "base_layer" in n)
    assert grads[0]
    total = torch.cat([g.flatten() for g in grads[1] if g is not None])
    near(torch.cat([g.flatten() for g in grads[0] if g is not None]), total, 4 * max(noise(base), 1e-4), "gradient")


def saved_bytes(model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward of one step, parameters of the model aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(torch.randn(8, 32, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()).sum()
    loss.backward()
    return sum(seen.values())


@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda m: m.name)
def test_no_dense_copy_of_a_base_weight_waits_for_the_backward(method: Method) -> None:
    quantised = adapted(method, BASES["bnb-nf4-double"]()).train()
    dense = copy.deepcopy(quantised)
    for _, layer in layers(dense):
        old = layer.get_base_layer()
        new = nn.Linear(layer.in_features, layer.out_features)
        new.weight, new.bias = nn.Parameter(base_weight(layer), requires_grad=False), old.bias
        layer.replace_base(new)
    assert saved_bytes(quantised) <= 1.05 * saved_bytes(dense)


@over([(m, "bnb-nf4-double") for m in WEIGHT_METHODS if "[" not in m.name])
def test_repacked_codes_are_read_right(method: Method, base: str) -> None:
    """After the repacking that bitsandbytes does on some CPUs, its own dequantisation is wrong; ours is not."""
    model = adapted(method, BASES[base]())
    weights = [base_weight(layer).clone() for _, layer in layers(model)]
    folded = [folded_weight(layer, [layer.adapters["one"]]).clone() for _, layer in layers(model)]
    pack(model)
    for (_, layer), weight, wanted in zip(layers(model), weights, folded):
        near(base_weight(layer), weight, 4e-3, "base")  # the repacking rounds the scales to bfloat16
        near(folded_weight(layer, [layer.adapters["one"]]), wanted, 0.02, "folded")
    if mergeable(model):
        packed = codes(model)
        model.merge_adapter()
        model.unmerge_adapter()
        for found, old in zip(codes(model), packed):
            assert all(torch.equal(a, b) for a, b in zip(found, old))
