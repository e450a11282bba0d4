"""Laws of the engine: hooks on the base fire, adapters that are not active change nothing, and where slow ways are."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from laws import cells, methods, over
from torch import nn

from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, get_peft_model
from peft.config import TargetModules, option
from peft.core.adapter import Adapter, part, setting
from peft.core.families import Copy, Delta
from peft.core.layer.classes import layer_class
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.kernels import DenseUpdateError, plain, strict
from peft.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.testing.cells import Cell, layers, perturb
from peft.tuners.lora.layer import Lora


ONE = ("float32",)
CELLS = cells(precisions=ONE, each_layer=False)


# --- 9: hooks on the base layer -----------------------------------------------------------------------------------

UNCALLED = {
    "Linear[out_proj]": "the attention reads its out_proj and never calls it, adapted or not",
    "Linear[encoder]": "torch's fast path of the encoder computes with the weights, adapted or not",
}


@over([c for c in CELLS if not c.method.is_a(Copy) and c.place.name not in UNCALLED])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_hook_on_the_base_layer_fires(cell: Cell, training: bool) -> None:
    """A trained copy stands in for the base, which is then not called; every other method calls it."""
    model = cell.adapted("one").train(training)
    calls: dict[str, int] = {}
    for key, layer in layers(model):
        hook = lambda *_, key=key: calls.update({key: calls.get(key, 0) + 1})  # noqa: E731
        layer.get_base_layer().register_forward_hook(hook)
    model(*cell.inputs())
    assert calls.keys() == {key for key, layer in layers(model) if not key.endswith("out_proj")}


@over([c for c in CELLS if not c.method.is_a(Copy) and not c.method.layer_cls.adapter_cls.random_in_training])
def test_what_a_hook_makes_of_the_output_is_seen(cell: Cell) -> None:
    """The hook's output counts: halving what the base gives changes the model's output, in value and gradient."""
    model = cell.adapted("one")
    if cell.place.name in UNCALLED:
        return
    before = cell.run(model)
    for _, layer in layers(model):
        layer.get_base_layer().register_forward_hook(lambda m, args, y: _halved(y))
    cell.apart(cell.run(model), before)


def _halved(y: Any) -> Any:
    return type(y)(_halved(part) for part in y) if isinstance(y, tuple) else None if y is None else y / 2


def test_a_replaced_forward_is_called() -> None:
    """accelerate, quantisers and users put functions of their own into `forward`."""
    for method in methods():
        cell = next(
            (c for c in CELLS if c.method is method and c.place.name in ("Linear[no-bias]", "Embedding[scaled]")), None
        )
        if cell is None or method.is_a(Copy):
            continue
        model = cell.adapted("one")
        (_, layer), *_ = layers(model)
        base = layer.get_base_layer()
        base.forward = Mock(wraps=base.forward)
        model(*cell.inputs())
        assert base.forward.called, method.name


# --- 11: adapters that are present but not active -------------------------------------------------------------------


def _graph(y: torch.Tensor) -> list[str]:
    """The names of the nodes of an autograd graph, in the order of a walk."""
    names, seen, stack = [], set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        names.append(node.name())
        stack += [following for following, _ in node.next_functions]
    return names


def _step(cell: Cell, model: nn.Module, inputs: tuple) -> tuple[torch.Tensor, list[str], int, list[torch.Tensor]]:
    """Output, graph, bytes kept for the backward pass, and gradients of the active adapter."""
    kept: list[torch.Tensor] = []  # held until the end, so that no two share an address

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(*inputs)
    graph = _graph(y)
    held = list({id(p): p for _, layer in layers(model) for p in layer.adapter_parameters("one")}.values())
    trained = [p for p in held if p.requires_grad]
    held_bytes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    gradients = torch.autograd.grad(y.float().square().sum(), trained, allow_unused=True)
    return y.detach(), graph, sum(held_bytes.values()), [g for g in gradients if g is not None]


def _with_dropout(cell: Cell) -> dict[str, Any]:
    """Fields that make a second adapter as different as can be: dropout wherever the config knows some."""
    names = [f for f in cell.method.config_cls.__dataclass_fields__ if f.endswith("dropout") and "module" not in f]
    return dict.fromkeys(names, 0.5)


@over(CELLS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("few", [True, False], ids=["one-row", "all-rows"])
def test_inactive_adapters_change_no_bit(cell: Cell, training: bool, few: bool) -> None:
    """11: output, gradients, graph and bytes kept are the same with and without adapters that do nothing."""
    if few and cell.place.kind == "Parameter":
        pytest.skip("a parameter's module takes its rows together")
    model = cell.adapted("one").train(training)
    inputs = tuple(x[:1] for x in cell.inputs()) if few else cell.inputs()
    alone = _step(cell, model, inputs)
    config = cell.config(True)
    different = copy.copy(config)
    for field, value in _with_dropout(cell).items():
        if getattr(config, field, None) == 0:
            setattr(different, field, value)
    (_, layer), *_ = layers(model)
    refused = layer.adapter_cls.refusal(layer.kind, layer.get_base_layer(), different)
    model.add_adapter("two", config if refused else different)
    perturb(model, "two", 3)
    model.train(training)
    beside = _step(cell, model, inputs)
    assert torch.equal(alone[0], beside[0])
    assert alone[1] == beside[1]
    assert alone[2] == beside[2]
    assert len(alone[3]) == len(beside[3]) and all(map(torch.equal, alone[3], beside[3]))


# --- batches without rows ------------------------------------------------------------------------------------------


@over([c for c in CELLS if c.place.kind in ("Linear", "Embedding", "Conv2d")])
def test_a_batch_without_rows_passes(cell: Cell) -> None:
    """As an expert that no token chose gets it: no rows come out, and nothing that trains or is kept is spoilt."""
    model = cell.adapted("one")
    nothing = [x[:0] for x in cell.inputs()]
    for training in (False, True):
        out = model.train(training)(*nothing)
        assert len(out) == 0
    if out.requires_grad:
        out.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    held = [x for x in (*model.parameters(), *model.buffers(), *gradients) if x.is_floating_point()]
    assert all(x.isfinite().all() for x in held)


# --- transforms of torch.func ---------------------------------------------------------------------------------------


@over([c for c in CELLS if c.place.kind in ("Linear", "Embedding", "Conv2d", "Parameter")])
def test_torch_func_differentiates(cell: Cell) -> None:
    """`torch.func.grad` gives the gradient that a backward pass gives: no method keeps what a transform cannot see."""
    model = cell.adapted("one")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_loss = torch.autograd.grad(cell.loss(model), list(trained.values()), allow_unused=True)
    wanted = [torch.zeros_like(p) if g is None else g for g, p in zip(of_loss, trained.values())]

    def loss(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return cell.loss(lambda *args: torch.func.functional_call(model, tensors, args))

    found = torch.func.grad(loss)({name: p.detach() for name, p in trained.items()})
    for (name, a), b in zip(found.items(), wanted, strict=True):
        cell.near(a, b, name)
    if cell.place.kind == "Linear":
        twice = {name: torch.stack((p, p)) for name, p in trained.items()}
        each = torch.func.vmap(torch.func.grad(loss), randomness="same")(twice)
        for (name, (a, again)), b in zip(each.items(), wanted, strict=True):
            cell.near(a, b, name)
            cell.near(again, b, name)


# --- several rotations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [OFTConfig, BOFTConfig, HRAConfig], ids=lambda c: c.__name__)
def test_several_rotations_turn_the_input_in_the_order_of_0_21(config: Any) -> None:
    """Two of OFT turn the input as they were activated, two of BOFT or HRA the other way round."""
    size = {} if config is HRAConfig else {"boft_block_size" if config is BOFTConfig else "oft_block_size": 4}
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8, bias=False)), config(target_modules=["0"], **size), "a")
    model.add_adapter("b", config(target_modules=["0"], **size))
    for seed, name in enumerate("ab"):
        perturb(model, name, seed)
    x, layer = torch.randn(3, 8), model.base_model.model[0]
    (a, b), weight = layer.adapters.values(), layer.get_base_layer().weight
    first, last = (a, b) if config is OFTConfig else (b, a)
    turned = last.rotate(first.rotate(x)) @ weight.T
    if config is BOFTConfig:
        turned = turned * a.scale_out() * b.scale_out()
    model.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(model(x), turned)
    torch.testing.assert_close(model.merge_and_unload()(x), turned)


# --- plain and strict -----------------------------------------------------------------------------------------------

DENSE = {
    "hira": "W * (B A) has the rank of W",
    "glora": "W * A has the rank of W",
    "osf": "the trained part of W is multiplied out with the frozen one",
    "supertuning[pair]": "the sparse part has no kernel beside another update",
    "fourierft": "where a layer is small, making dW costs less than the spectra of the tokens",
    "loha": "where r^2 columns are more than the layer has",
    "lokr": "on layers whose factors do not split the input",
    "miss[bat]": "the update is a product with W",
}
"""Methods that build a dense weight in the forward of a linear layer, and why."""


def test_which_methods_build_a_dense_weight_in_the_forward() -> None:
    """On linear layers, by asking `strict`; the table says why, and lists no more than it has to."""
    found = set()
    for method in methods():
        cell = next((c for c in CELLS if c.method is method and c.place.name == "Linear[no-bias]"), None)
        if cell is None:
            continue
        model = cell.adapted("one").train()
        with strict():
            try:
                model(*cell.inputs())
            except DenseUpdateError as error:
                assert "blocks.0.layer" in str(error)
                found.add(method.name)
    unexplained = {name for name in found if name not in DENSE and name.partition("[")[0] not in DENSE}
    assert unexplained == set()
    assert {name.partition("[")[0] for name in found} >= {name.partition("[")[0] for name in DENSE} - {"lokr"}


@over([c for c in CELLS if c.place.name in ("Linear[no-bias]", "Conv2d[stride]") and not c.method.is_a(Copy)])
def test_plain_reaches_every_fast_path(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within `plain`, no kernel for a whole layer and no fused product is asked."""
    model = cell.adapted("one").train()
    for cls in {type(a) for _, layer in layers(model) for a in layer.adapters.values()}:
        monkeypatch.setattr(cls, "kernel", classmethod(lambda *_: pytest.fail("a kernel was asked")))
    monkeypatch.setattr("peft.core.layer.routes.low_rank_linear", lambda *_: pytest.fail("a fused product was asked"))
    with plain():
        model(*cell.inputs())


@pytest.mark.few
@over([c for c in CELLS if c.place.name in ("Linear[no-bias]", "Linear") and not c.method.is_a(Copy)])
def test_steps_with_few_entries_equal_the_plain_path(cell: Cell) -> None:
    """In value and gradient, by the operations of autograd that they are computed with."""
    found = []
    for context in (nullcontext, plain):
        model, inputs = cell.adapted("one").train(), cell.inputs()
        x = inputs[0].requires_grad_(inputs[0].is_floating_point())
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]
        with context():
            torch.manual_seed(0)
            y = model(*inputs)
            found.append([y, *torch.autograd.grad(y.square().sum(), trained, allow_unused=True)])
    for few, expected in zip(*found):
        torch.testing.assert_close(few, expected, rtol=1e-3, atol=1e-4)


# --- the declarations -----------------------------------------------------------------------------------------------


class Wrong(Delta):
    """Assigns what it has not declared."""

    wrong_A = part()

    def create(self, config: Any, key: str) -> None:
        self.scale = 3


def test_an_undeclared_setting_is_named_with_the_line_to_add() -> None:
    cls = layer_class(Wrong, name="WrongLayer").by_name["Linear"]
    with pytest.raises(AttributeError, match=r"Wrong declares no 'scale'.*`scale = part\(\)`.*`scale = setting\(\)`"):
        cls(nn.Linear(2, 2)).add_adapter("one", None)


def test_a_failed_creation_leaves_no_adapter() -> None:
    layer = layer_class(Wrong, name="WrongLayer").by_name["Linear"](nn.Linear(2, 2))
    with pytest.raises(AttributeError):
        layer.add_adapter("one", None)
    assert layer.adapter_names == [] and not layer.wrong_A


@pytest.mark.parametrize("name", ["shape", "weight", "kind", "adapters", "training", "forward"])
def test_a_setting_named_like_an_attribute_of_the_layer_is_refused(name: str) -> None:
    taken = type("Taken", (Delta,), {name: setting(), "__module__": __name__})
    getattr(taken, name).__set_name__(taken, name)
    with pytest.raises(TypeError, match=f"Taken declares the setting '{name}'.*`taken_{name} = setting"):
        layer_class(taken, name="TakenLayer")


@pytest.mark.parametrize("members", [{}, {"METHOD": "mine"}, {"METHOD": "MINE", "waves": option(2, "How many.")}])
def test_a_config_without_a_method_in_capitals_or_no_dataclass_is_refused(members: dict[str, Any]) -> None:
    config = type("MineConfig", (TargetModules,), members)
    with pytest.raises(ConfigError, match='MineConfig must be a dataclass.*capital.*METHOD: ClassVar.* = "MINE"'):
        define_tuner(Delta, config)
    assert not {"NONE", "MINE"}.intersection(map(str, PEFT_TYPE_TO_CONFIG_MAPPING))


class Outer(Lora):
    """A variant with a tensor of its own, which doubles what is inside."""

    lora_outer = part()

    @classmethod
    def asked_by(cls, config: LoraConfig) -> bool:
        return bool(config.use_rslora)

    def make_pair(self, config: LoraConfig) -> None:
        super().make_pair(config)
        self.lora_outer = nn.Parameter(torch.full((1,), 2.0))

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return y + self.lora_outer * (super().output(x, y, base_y) - y)


def test_variants_are_combined_by_inheritance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lora, "variants", [Outer, *Lora.variants])
    base, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    alone = LoraConfig(target_modules=["0"], init_lora_weights=False, use_dora=True, lora_alpha=4, r=4)
    both = LoraConfig(target_modules=["0"], init_lora_weights=False, use_dora=True, use_rslora=True, lora_alpha=2, r=4)
    torch.manual_seed(0)
    one = get_peft_model(copy.deepcopy(base), alone)
    torch.manual_seed(0)
    two = get_peft_model(copy.deepcopy(base), both)
    (_, layer) = layers(two)[0]
    assert [cls.__name__ for cls in type(layer.adapters["default"]).made_of] == ["Outer", "Dora"]
    assert "lora_outer" in layer.adapter_layer_names and "lora_outer" not in type(layer).adapter_layer_names
    torch.testing.assert_close(two(x) - base(x), 2 * (one(x) - base(x)))
    again = pickle.loads(pickle.dumps(layer))
    assert type(again.adapters["default"]) is type(layer.adapters["default"])
    torch.testing.assert_close(again(x), layer(x))
    two.add_adapter("plain", LoraConfig(target_modules=["0"]))
    two.delete_adapter("default")
    assert not layer.lora_outer


def test_variants_that_exclude_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lora, "variants", [Outer, *Lora.variants])
    monkeypatch.setattr(Outer, "excludes", {"Dora": "two wholes have no sum"})
    with pytest.raises(ValueError, match="two wholes have no sum"):
        get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], use_dora=True, use_rslora=True)
        )


def test_an_adapter_is_copied_with_its_layer() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    twin = copy.deepcopy(model)
    (_, layer), (_, other) = layers(model)[0], layers(twin)[0]
    adapter: Adapter = other.adapters["default"]
    assert adapter.layer is other and adapter is not layer.adapters["default"]
    assert adapter.lora_A is other.lora_A["default"] is not layer.lora_A["default"]


# --- what a layer says of its tensors -----------------------------------------------------------------------------


@over([c for c in CELLS if c.place.name == "Linear"])
def test_layers_name_what_trains_and_what_does_not(cell: Cell) -> None:
    """Others freeze, cast or count adapters by these names; tensors that layers share are named by each."""
    for _, layer in layers(cell.fresh("one")):
        held: dict[bool, set[int]] = {True: set(), False: set()}
        for names, trains in ((layer.adapter_layer_names, True), (layer.other_param_names, False)):
            for value in (getattr(layer, name) for name in names):
                inside = value["one"] if "one" in value else None  # noqa: SIM401  # a ModuleDict has no get
                tensors = inside.state_dict(keep_vars=True).values() if isinstance(inside, nn.Module) else [inside]
                held[trains] |= {id(t) for t in tensors if isinstance(t, torch.Tensor)}
        assert held[True] >= {id(p) for p in layer.adapter_parameters("one")}
        assert held[True] | held[False] >= {id(t) for _, t in layer.adapters["one"].tensors()}
