"""Weights that are computed (parametrizations), that other code reads, and that cannot be trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import laws
import pytest
import quantised
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from peft.core.base.kinds import Whole
from peft.core.base.readers import NoWeight, reads_weight_of
from peft.core.base.storage import storage_of
from peft.testing.cells import Cell, equal_states, layers, perturb, state


def _old(make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def made(m: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(m)

    return made


class Doubled(nn.Module):
    """W = 2 V, without a way back."""

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return 2 * v


class Halved(Doubled):
    """The same with one."""

    def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
        return w / 2


WRITABLE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of columns": lambda m: parametrizations.weight_norm(m, dim=1),
    "older weight_norm": _old(nn.utils.weight_norm),
    "own": lambda m: parametrize.register_parametrization(m, "weight", Halved()),
}
CONSTRAINED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "SpectralNorm": parametrizations.spectral_norm,
    "older SpectralNorm": _old(nn.utils.spectral_norm),
    "Orthogonal": parametrizations.orthogonal,
    "Doubled": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
}
PRUNED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "RandomUnstructured": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "PruningContainer": lambda m: prune.l1_unstructured(prune.random_unstructured(m, "weight", 0.2), "weight", 0.2),
}
COMPUTED = WRITABLE | CONSTRAINED | PRUNED
REFUSED = [
    *((method, name) for method in ("lora", "ia3", "oft") for name in CONSTRAINED),
    *((method, name) for method in ("lora", "oft") for name in PRUNED),
]


def _wrapped(cell: Cell, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    base = cell.base()
    make(base.blocks[0]["layer"])
    return base.eval()


def _computed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of the layer whose weight is computed."""
    return {key: value for key, value in state.items() if ".blocks.0." in key}


ROWS = [
    c
    for c in laws.cells("merge", precisions=("float32",), switches=False)
    if c.place.name in ("Linear", "Conv2d[stride]")
]


@pytest.mark.parametrize("cell", ROWS, ids=lambda cell: cell.id)
def test_merging_into_weight_norm(cell: Cell) -> None:
    """Merged equals unmerged, and unmerging gives the tensors back bit for bit, for every method."""
    _merges(cell, parametrizations.weight_norm)


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_merging_where_the_parametrization_can_be_inverted(method: str, name: str) -> None:
    _merges(next(c for c in ROWS if c.method.name == method), WRITABLE[name])


def _merges(cell: Cell, make: Callable[[nn.Module], nn.Module]) -> None:
    model = cell.fresh("default", base=_wrapped(cell, make))
    perturb(model, "default", 10, cell.method.times)
    before, wanted = state(model), cell.run(model)
    with model.disable_adapter():
        cell.apart(wanted, cell.run(model))
    model.merge_adapter()
    cell.near(cell.run(model), wanted, "merged")
    model.unmerge_adapter()
    equal_states(_computed(state(model)), _computed(before))
    cell.near(cell.run(model.merge_and_unload()), wanted, "merged and unloaded")


def test_merging_what_keeps_the_zeros_of_a_pruned_weight() -> None:
    _merges(next(c for c in ROWS if c.method.name == "ia3"), PRUNED["RandomUnstructured"])


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_merging_is_refused_by_name_where_the_weight_is_constrained(method: str, name: str) -> None:
    """The error names the parametrization and the way out, and the model is as it was."""
    cell = next(c for c in ROWS if c.method.name == method)
    model = cell.fresh("default", base=_wrapped(cell, COMPUTED[name]))
    perturb(model, "default", 10)
    before, wanted = state(model), cell.run(model)
    with pytest.raises(ValueError, match=f"{name.rpartition(' ')[2]}.*Keep the adapter unmerged"):
        model.merge_adapter()
    equal_states(_computed(state(model)), _computed(before))
    cell.near(cell.run(model), wanted)  # of the other layer, merging and unmerging has rounded the plain weight
    assert not any(layer.merged for _, layer in layers(model))


@pytest.mark.parametrize("name", COMPUTED)
def test_a_call_with_another_weight(name: str) -> None:
    """The storage's call computes with the given tensor, gradients reach it, and the module is as it was."""
    torch.manual_seed(0)
    m = COMPUTED[name](nn.Linear(4, 4)).eval()
    storage, x = storage_of(m, "weight"), torch.randn(2, 4)
    before, state = m(x).detach(), copy.deepcopy(m.state_dict())
    given = torch.randn(4, 4, requires_grad=True)
    y = storage.call(m, {"weight": given}, (x,), {})
    y.sum().backward()
    assert torch.equal(y, nn.functional.linear(x, given, m.bias)) and given.grad is not None
    assert torch.equal(m(x), before) and storage.direct_weight(m, "weight") is None
    assert torch.equal(storage.read(m, "weight"), m.weight)
    m.train()
    storage.read(m, "weight")
    assert all(torch.equal(m.state_dict()[k], v) for k, v in state.items()), "reading changed it"


@pytest.mark.parametrize("name", COMPUTED)
def test_target_parameters_sees_computed_weights(name: str) -> None:
    base = nn.Sequential(COMPUTED[name](nn.Linear(4, 4))).eval()
    x = torch.randn(2, 4)
    before = base(x).detach()
    model = get_peft_model(base, LoraConfig(r=2, target_parameters=["0.weight"]))
    assert model.base_model.model[0].adapter_names == ["default"] and torch.allclose(model(x), before, atol=1e-6)


# --- weights that other code reads ----------------------------------------------------------------------------


def _mixers() -> list[tuple[Any, set[str]]]:
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention
    from transformers.models.zamba.modeling_zamba import ZambaMambaMixer

    return [
        (MambaMixer, {"out_proj", "conv1d", "x_proj", "dt_proj"}),
        (FalconMambaMixer, {"out_proj", "conv1d", "x_proj", "dt_proj"}),
        (Mamba2Mixer, {"out_proj", "conv1d"}),
        (JambaMambaMixer, {"conv1d", "dt_proj"}),
        (ZambaMambaMixer, {"conv1d"}),
        (WavLMAttention, {"q_proj", "k_proj", "v_proj", "out_proj"}),
        (LlamaAttention, set()),
        (LlamaMLP, set()),
    ]


def test_the_code_of_a_class_tells_whose_weight_it_reads() -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "in_proj", "out_proj", "conv1d", "x_proj", "dt_proj")
    for cls, wanted in _mixers():
        assert {n for n in names if reads_weight_of(cls.__new__(cls), n)} == wanted, cls


class Reader(nn.Module):
    """Multiplies by the weight of a layer itself, in a method that a decorator hides."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.only_asked = nn.Linear(4, 4), nn.Linear(4, 4)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only_asked((x.to(self.only_asked.weight.dtype) @ self.lin.weight.T) + self.lin.bias)


ADAPTERS = [
    LoraConfig(target_modules=["lin"], r=2, init_lora_weights=False),
    LoraConfig(target_modules=["lin"], r=2, init_lora_weights=False, use_dora=True),
    IA3Config(target_modules=["lin"], feedforward_modules=[], init_ia3_weights=False),
]


@pytest.mark.parametrize("config", ADAPTERS, ids=["lora", "dora", "ia3"])
def test_a_layer_that_is_read_shows_the_adapted_weight(config: Any) -> None:
    base = Reader()
    assert reads_weight_of(base, "lin") and not reads_weight_of(base, "only_asked")
    x = torch.randn(3, 4)
    before = base(x)
    model = get_peft_model(base, copy.deepcopy(config)).eval()
    y = model(x)
    assert not torch.allclose(y, before)
    with model.disable_adapter():
        assert torch.allclose(model(x), before)
    assert torch.allclose(model.merge_and_unload()(x), y, atol=1e-5)


def test_mamba_hands_its_kernels_the_adapted_weight() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    base = MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=32)).eval()
    model = get_peft_model(base, LoraConfig(target_modules=["out_proj", "x_proj"], r=2, init_lora_weights=False))
    mixer = model.base_model.model.backbone.layers[0].mixer
    for layer in (mixer.out_proj, mixer.x_proj):
        wanted = layer.base_layer.weight + layer.get_delta_weight("default")
        assert torch.allclose(layer.weight, wanted, atol=1e-6) and not torch.equal(
            layer.weight, layer.base_layer.weight
        )


def test_a_weight_that_does_not_exist_can_be_looked_at_and_not_computed_with() -> None:
    w = nn.Linear(3, 2).weight.detach().as_subclass(NoWeight)
    assert w.dtype == torch.float32 and w.shape == (2, 3) and w.device.type == "cpu" and w.size(0) == 2
    for compute in (lambda: torch.ones(1, 3) @ w.T, lambda: nn.functional.linear(torch.ones(1, 3), w)):
        with pytest.raises(ValueError, match="no one weight equals"):
            compute()


# --- weights that cannot be trained, and modules without one --------------------------------------------------


@pytest.mark.parametrize("name", quantised.BASES)
def test_ln_tuning_of_a_quantised_layer_is_refused_by_name(name: str) -> None:
    base = quantised.BASES[name]()
    with pytest.raises(ValueError, match=r"'2' .*is quantised \(.*cannot be trained"):
        get_peft_model(base, LNTuningConfig(target_modules=["2"]))


def test_the_null_kind_takes_rows_and_has_no_weight() -> None:
    kind, m, x = Whole(), nn.GRU(4, 3), torch.randn(3, 4)
    (rows,), _ = kind.take_rows(m, (x,), {}, torch.tensor([2, 0]))
    assert torch.equal(rows, x[[2, 0]]) and not kind.matrix and not kind.opaque and kind.bias is None
    assert torch.equal(kind.take_rows(m, (), {"input": x, "flag": 1}, torch.tensor([2, 0]))[1]["input"], x[[2, 0]])
    assert torch.equal(kind.join_rows(m, [x[:1], x[1:]], torch.tensor([1, 0, 2])), x[[1, 0, 2]])
    for ask in (lambda: kind.shape(m), lambda: kind.sizes(m), lambda: kind.orient(x, m), lambda: kind.apply(m, x, x)):
        with pytest.raises(ValueError, match="GRU is none of Linear"):
            ask()
    with pytest.raises(ValueError, match="GRU gives no single tensor"):
        kind.join_rows(m, [(x, x)], torch.tensor([0]))
