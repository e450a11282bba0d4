"""One adapter active, few entries: the way with the fewest steps gives what the layer is defined as."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from peft import LoraConfig, get_peft_model
from peft.core.layer import layer as layers
from peft.helpers import rescale_adapter_scale
from peft.kernels import plain
from peft.tuners.lora.layer import Lora
from peft.utils.hotswap import hotswap_adapter


pytestmark = pytest.mark.few
X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.q(x)) + torch.sin(self.k(x)))


def make(**options) -> nn.Module:
    """A model with the adapters "default", which is active, and "other"."""
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["q", "k", "out"], "init_lora_weights": False, **options}
    model = get_peft_model(Model(), LoraConfig(**settings))
    model.add_adapter("other", LoraConfig(**settings))
    return model.eval()


def q(model: nn.Module) -> nn.Module:
    return model.base_model.model.q


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call of a layer took the short way."""
    found, own = [], layers.lean

    def lean(layer, x):
        y = own(layer, x)
        found.append(y is not None)
        return y

    monkeypatch.setattr(layers, "lean", lean)
    yield found


def agrees(model: nn.Module, x: torch.Tensor = X, **call) -> torch.Tensor:
    """The output, which is that of the model's definition, call after call; and so are the gradients."""
    with torch.no_grad():
        with plain():
            want = model(x, **call)
        for _ in range(3):
            torch.testing.assert_close(model(x, **call), want)
    with plain():
        gradients = trained(model, x, **call)
    for _ in range(2):
        torch.testing.assert_close(trained(model, x, **call), gradients)
    return want


def trained(model: nn.Module, x: torch.Tensor, **call) -> list[torch.Tensor | None]:
    """Output, and the gradients of the input and of all that trains."""
    x = x.clone().requires_grad_()
    y = model(x, **call)
    tensors = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(torch.sin(y).sum(), tensors, allow_unused=True)]


@pytest.mark.parametrize(
    "x", [X, X[0, :1], X[0, 0], X.transpose(0, 1), X[:0]], ids=["3d", "2d", "1d", "strided", "none"]
)
def test_it_is_taken_and_gives_what_the_definition_gives(x, taken):
    model = make(lora_dropout=0.3)
    agrees(model, x)
    assert taken[-3:] == [True] * 3
    with torch.inference_mode():
        y = model(x)
    assert taken[-3:] == [True] * 3 and y.shape == x.shape and not y._is_view()


def test_16_bit_bases_with_wide_adapters_take_it_too(taken):
    model = get_peft_model(
        Model().bfloat16(), LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights=False)
    ).eval()
    x, down = X.bfloat16(), q(model).lora_A["default"].weight
    assert down.dtype == torch.float32
    with torch.no_grad():
        with plain():
            want = model(x)
        for _ in range(3):
            torch.testing.assert_close(model(x), want, atol=0.05, rtol=0.05)
    assert all(taken[-2:])


# --- what changes between two calls ---------------------------------------------------------------------------


def step(model: nn.Module) -> None:
    model(X).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def write(model: nn.Module) -> None:
    for part in (q(model).lora_A, q(model).lora_B, model.base_model.model.out.lora_A):
        part["default"].weight.data.copy_(torch.randn_like(part["default"].weight))  # which no version tells of


def replace_parameter(model: nn.Module) -> None:
    q(model).lora_B["default"].weight = nn.Parameter(torch.randn(5, 2))


def replace_module(model: nn.Module) -> None:
    q(model).lora_A["default"] = nn.Linear(6, 2, bias=False)


def replace_part(model: nn.Module) -> None:
    q(model).lora_B = nn.ModuleDict({name: nn.Linear(2, 5, bias=False) for name in ("default", "other")})


def write_base(model: nn.Module) -> None:
    q(model).base_layer.weight.data.mul_(2)


def replace_base_weight(model: nn.Module) -> None:
    q(model).base_layer.weight = nn.Parameter(torch.randn(5, 6), requires_grad=False)


def replace_base(model: nn.Module) -> None:
    q(model).base_layer = nn.Linear(6, 5)


def parametrize(model: nn.Module) -> None:
    parametrizations.weight_norm(q(model).base_layer)
    q(model).base_layer.parametrizations.weight.original0.data.mul_(3)


def another_forward(model: nn.Module) -> None:
    q(model).base_layer.forward = lambda x: torch.ones(*x.shape[:-1], 5)


def another_forward_of_b(model: nn.Module) -> None:
    q(model).lora_B["default"].forward = lambda h: torch.ones(*h.shape[:-1], 5)


def double_output(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def hook_of_base(model: nn.Module) -> None:
    q(model).base_layer.register_forward_hook(double_output)


def hook_before_base(model: nn.Module) -> None:
    q(model).base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook_of_a(model: nn.Module) -> None:
    q(model).lora_A["default"].register_forward_hook(double_output)


def hook_of_dropout(model: nn.Module) -> None:
    q(model).lora_dropout["default"].register_forward_hook(double_output)


def bias_of_b(model: nn.Module) -> None:
    q(model).lora_B["default"].bias = nn.Parameter(torch.ones(5))


def delete(model: nn.Module) -> None:
    model.delete_adapter("default")


def delete_and_add(model: nn.Module) -> None:
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q"], use_dora=True, init_lora_weights=False))
    model.set_adapter("default")
    q(model).lora_magnitude_vector["default"].weight.data.mul_(3)


def both(model: nn.Module) -> None:
    model.base_model.set_adapter(["default", "other"])


def rename_active(model: nn.Module) -> None:
    q(model)._active_adapter[0] = "other"


def off(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


def unscaled(model: nn.Module) -> None:
    q(model).scaling["default"] = 0.0


CHANGES = [
    *(step, write, replace_parameter, replace_module, replace_part, write_base, replace_base_weight, replace_base),
    *(parametrize, another_forward, another_forward_of_b, hook_of_base, hook_before_base, hook_of_a, hook_of_dropout),
    *(bias_of_b, delete, delete_and_add, both, rename_active, off, unscaled),
    *(lambda model: model.set_adapter("other"), lambda model: q(model).set_scale("default", 5)),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_calls_is_seen(change: Callable[[nn.Module], None], taken):
    model = make(lora_dropout=0.5)
    before = agrees(model)
    assert taken[-1]
    change(model)
    assert not torch.allclose(agrees(model.eval()), before, atol=1e-3)


def test_merged_adapters_are_in_the_weight_once(taken):
    model = make()
    before = agrees(model)
    model.merge_adapter()
    torch.testing.assert_close(agrees(model), before)
    model.unmerge_adapter()
    torch.testing.assert_close(agrees(model), before)
    assert taken[-1]


def test_files_hot_swaps_and_scales_are_seen(tmp_path):
    model, source = make(), make()
    write(source)
    want = agrees(source)
    source.save_pretrained(tmp_path)
    assert not torch.allclose(agrees(model), want, atol=1e-3)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(agrees(model.eval()), want)
    step(model)
    assert not torch.allclose(agrees(model), want, atol=1e-3)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(agrees(model), want)
    with rescale_adapter_scale(model, 0.0):
        off = agrees(model)
    with model.disable_adapter():
        torch.testing.assert_close(agrees(model), off)
    torch.testing.assert_close(agrees(model), want)


def test_dtypes_copies_and_pickles(taken):
    model = make()
    before = agrees(model)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert q(model)._seen is not None and all(q(twin)._seen is None for twin in twins)
    write(model)
    for twin in twins:
        torch.testing.assert_close(agrees(twin), before)
        assert taken[-1]
    agrees(model.double(), X.double())
    assert taken[-1]


def test_modules_are_found_once_and_let_go(monkeypatch):
    model = make()
    want = agrees(model)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Lora, "factors", lambda adapter: pytest.fail("the modules were looked for again"))
        torch.testing.assert_close(model(X), want)
        handle = nn.ReLU().register_forward_hook(double_output)  # of any module: it might be one of these
        with pytest.raises(pytest.fail.Exception):
            model(X)
    handle.remove()
    agrees(model)
    gone = weakref.ref(q(model).lora_A["default"])
    model.delete_adapter("default")
    assert gone() is None


def test_dropout_that_acts_is_drawn():
    model = make(lora_dropout=0.5)
    before = agrees(model)
    q(model).lora_dropout["default"].train()
    with torch.no_grad():
        assert not torch.allclose(model(X), before, atol=1e-3)


def test_tensors_in_the_place_of_parameters():
    model = make()
    agrees(model)
    values = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        with plain():
            want = functional_call(model, values, X)
        torch.testing.assert_close(functional_call(model, values, X), want)
    agrees(model)


def test_where_it_is_no_way(taken):
    model = make()
    agrees(model)
    rows = ["default", "other"]
    agrees(model, adapter_names=rows)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16
    with torch.no_grad():
        torch.func.vmap(model)(X)
    assert not any(taken[-6:])
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not model(x).requires_grad and taken[-1]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_steps_with_many_entries_take_it_by_the_fused_way(rate, taken):
    model, x = make(lora_dropout=rate), X.repeat(2**14, 1, 1)
    agrees(model, x)
    assert taken[-3:] == [True] * 3
    model.train()
    for _ in range(2):
        y = model(x)
    assert y.grad_fn.name() == "LowRankLinearBackward" and taken[-3:] == [True] * 3
    for train in (lambda: q(model).base_layer.weight, lambda: q(model).base_layer.bias):
        train().requires_grad_()
        y = model(x)
        y.sum().backward()
        assert train().grad.abs().sum() > 0 and taken[-3:] == [False, True, True]
        train().requires_grad_(False)
    model.requires_grad_(False)
    assert not model(x).requires_grad and not any(taken[-3:])
