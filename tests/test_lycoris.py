"""LoHa and LoKr: what neither the laws nor the golden cases say.

``data/lycoris.safetensors`` has factors and the weights that they stand for in the reference library, by case and
layer; its metadata has the configs.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import peft
from peft import LoHaConfig, LoKrConfig, PrefixTuningConfig, get_peft_model
from peft.core.families import Delta
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.utils.error import ConfigError


RECORDED = Path(__file__).parent / "data" / "lycoris.safetensors"
with safe_open(RECORDED, "pt") as file:
    CASES = {name: json.loads(value) for name, value in sorted((file.metadata() or {}).items()) if "|" in name}
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class Net(nn.Module):
    """The layers of the recorded cases."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.conv1d = nn.Conv1d(4, 6, 3)
        self.conv2d = nn.Conv2d(4, 6, (3, 2))

    def forward(self, x):
        return self.linear(x)


def adapted(base, config, noise=True):
    """The adapted layer of a model that consists of the one layer ``base``, with random numbers in the adapter."""
    config.target_modules = {"0"}
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    if noise:
        with torch.no_grad():
            for parameter in layer.adapter_parameters("default"):
                parameter.normal_()
    return layer


def by_weight(layer, x):
    """What the adapter adds to the output, through its whole weight."""
    return Delta.delta(layer.adapters["default"], x)


# ---- The weight --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_factors_and_weight_are_the_recorded_ones(case):
    (name, kwargs), target = CASES[case], case.split("|")[1]
    config = getattr(peft, name)(target_modules=[target], **kwargs)
    layer = get_peft_model(Net(), config).base_model.model.get_submodule(target)
    wanted = {key.split("|")[2]: value for key, value in TENSORS.items() if key.startswith(f"{case}|")}
    delta = wanted.pop("delta")
    found = {saved: tensor for saved, _, tensor in layer.adapter_state("default")}
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in wanted.items()}
    with torch.no_grad():
        for key, tensor in found.items():
            tensor.copy_(wanted[key])
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-5, atol=1e-5)


def test_factorization_gives_the_recorded_values():
    recorded = {  # by dimension: for factors -1, 1, 2, 3, 4, 6, 8, 16, 100
        1: [(1, 1)] * 9,
        2: [(1, 2), (1, 2), (2, 1), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2)],
        8: [(2, 4), (1, 8), (2, 4), (2, 4), (4, 2), (2, 4), (8, 1), (2, 4), (2, 4)],
        24: [(4, 6), (1, 24), (2, 12), (3, 8), (4, 6), (6, 4), (8, 3), (4, 6), (4, 6)],
        37: [(1, 37)] * 9,
        100: [(10, 10), (1, 100), (2, 50), (2, 50), (4, 25), (5, 20), (5, 20), (10, 10), (100, 1)],
        360: [(18, 20), (1, 360), (2, 180), (3, 120), (4, 90), (6, 60), (8, 45), (15, 24), (18, 20)],
        1024: [(32, 32), (1, 1024), (2, 512), (2, 512), (4, 256), (4, 256), (8, 128), (16, 64), (32, 32)],
    }
    found = {d: [factorization(d, f) for f in (-1, 1, 2, 3, 4, 6, 8, 16, 100)] for d in recorded}
    assert found == recorded
    assert factorization(12) == factorization(12, -1) == (3, 4)


@pytest.mark.parametrize(
    ("r", "both", "names"),
    [
        (4, False, {"lokr_w1", "lokr_w2"}),
        (4, True, {"lokr_w1", "lokr_w2"}),
        (3, False, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
        (3, True, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
        (1, True, {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}),
    ],
)
def test_a_factor_is_low_rank_where_the_rank_is_below_half_its_larger_side(r, both, names):
    layer = adapted(nn.Linear(32, 32), LoKrConfig(r=r, decompose_both=both))  # W1 is 4 x 4, W2 8 x 8
    assert isinstance(layer, LoKrLayer)
    assert {saved for saved, _, _ in layer.adapter_state("default")} == names


@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("init", [True, "lycoris", False])
def test_lokr_starts_at_zero_by_either_factor(init, r):
    torch.manual_seed(0)
    layer = adapted(nn.Linear(32, 32), LoKrConfig(r=r, decompose_both=True, init_weights=init), noise=False)
    zero = {saved for saved, _, tensor in layer.adapter_state("default") if not tensor.any()}
    suffix = {1: ("_a", "_b"), 8: ("", "")}[r]
    assert zero == {True: {"lokr_w1" + suffix[0]}, "lycoris": {"lokr_w2" + suffix[1]}, False: set()}[init]


# ---- The forward without that weight -----------------------------------------------------------------------------

BASES = {
    "linear": (nn.Linear(48, 60), (2, 5, 48)),
    "linear, one sample": (nn.Linear(48, 60), (48,)),
    "linear, none": (nn.Linear(48, 60), (0, 48)),
    "embedding": (nn.Embedding(48, 30), None),
    "conv1d": (nn.Conv1d(12, 40, 3, stride=2, padding=1), (2, 12, 9)),
    "conv2d": (nn.Conv2d(12, 40, (3, 2), padding=(1, 0), dilation=2), (2, 12, 9, 8)),
    "conv2d, one sample": (nn.Conv2d(12, 40, 3, padding=1, padding_mode="circular"), (12, 9, 8)),
    "conv3d": (nn.Conv3d(12, 40, 2), (2, 12, 3, 4, 3)),
    "conv2d, groups": (nn.Conv2d(12, 40, 3, groups=2), (2, 12, 5, 5)),
}
CONFIGS = {
    "loha": lambda: LoHaConfig(r=3, alpha=5),
    "loha, core": lambda: LoHaConfig(r=3, alpha=5, use_effective_conv2d=True),
    "loha, large rank": lambda: LoHaConfig(r=30, alpha=5),
    "lokr": lambda: LoKrConfig(r=30, alpha=5, decompose_factor=3),
    "lokr, pair": lambda: LoKrConfig(r=1, alpha=5, decompose_factor=3),
    "lokr, large pair": lambda: LoKrConfig(r=5, alpha=5, decompose_factor=4),
    "lokr, core": lambda: LoKrConfig(r=2, alpha=5, decompose_factor=2, use_effective_conv2d=True),
    "lokr, both": lambda: LoKrConfig(r=1, alpha=5, decompose_both=True),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", BASES)
def test_the_forward_and_its_gradients_are_those_of_the_whole_weight(base, config):
    torch.manual_seed(0)
    module, shape = BASES[base]
    layer = adapted(copy.deepcopy(module).double(), CONFIGS[config]()).double()
    x = torch.randn(shape, dtype=torch.double, requires_grad=True) if shape else torch.randint(48, (2, 7))
    short, long = layer.adapters["default"].product(x), by_weight(layer, x)
    torch.testing.assert_close(short, long)
    wrt = [*layer.adapter_parameters("default"), *([x] if shape else [])]
    direction = torch.randn_like(long)
    for ours, theirs in zip(torch.autograd.grad(short, wrt, direction), torch.autograd.grad(long, wrt, direction)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("config", [LoHaConfig(r=2), LoKrConfig(r=2, decompose_factor=4)], ids=["loha", "lokr"])
@pytest.mark.parametrize("features", [(64, 64), (512, 256)])
def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward_pass(config, features):
    layer = adapted(nn.Linear(*features), copy.deepcopy(config))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer.adapters["default"].product(torch.randn(3, features[0]))
    assert kept
    assert max(kept) < features[0] * features[1]


def test_a_large_rank_keeps_the_weight_once():
    layer = adapted(nn.Linear(64, 64), LoHaConfig(r=8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer.adapters["default"].product(torch.randn(3, 64))
    assert sum(size >= 64 * 64 for size in kept) <= 1


# ---- Dropouts and scale ------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(12, 400), (2, 12), (0,)),
    "conv2d": (lambda: nn.Conv2d(4, 400, 3), (2, 4, 5, 5), (0, 2, 3)),
}


@pytest.mark.parametrize("base", LAYERS)
@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        (lambda: LoHaConfig(r=2, rank_dropout=0.4), True),
        (lambda: LoKrConfig(r=2, rank_dropout=0.4), False),
        (lambda: LoKrConfig(r=2, rank_dropout=0.4, rank_dropout_scale=True), True),
    ],
    ids=["loha", "lokr", "lokr scaled"],
)
def test_rank_dropout_leaves_out_whole_outputs_in_training(base, config, scaled):
    torch.manual_seed(0)
    make, shape, others = LAYERS[base]
    layer, x = adapted(make(), config()).train(), torch.randn(shape)
    with torch.no_grad():
        found, full = layer.adapters["default"].delta(x), layer.adapters["default"].product(x)
        kept = found.abs().amax(others) > 0
        share = kept.float().mean().item()
        assert 0.5 < share < 0.7
        shaped = (slice(None), kept)
        torch.testing.assert_close(found[shaped], full[shaped] / share if scaled else full[shaped])
        torch.testing.assert_close(layer.eval().adapters["default"].delta(x), full)
        torch.testing.assert_close(layer.train().get_delta_weight("default"), layer.eval().get_delta_weight("default"))


def test_rank_dropout_that_drops_everything_gives_zeros():
    layer = adapted(nn.Linear(4, 1), LoHaConfig(r=2, rank_dropout=0.99)).train()
    torch.manual_seed(0)
    outputs = torch.stack([layer.adapters["default"].delta(torch.ones(4)) for _ in range(20)])
    assert (outputs == 0).any()
    assert outputs.isfinite().all()


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_module_dropout_leaves_out_the_whole_update_in_training(config):
    torch.manual_seed(0)
    layer, x = adapted(nn.Linear(12, 8), config(r=2, module_dropout=0.3)).train(), torch.randn(2, 12)
    plain, full = layer.base_layer(x), layer.base_layer(x) + layer.adapters["default"].product(x)
    with torch.no_grad():
        outputs = [layer(x) for _ in range(200)]
    dropped = sum(torch.equal(y, plain) for y in outputs)
    assert 30 < dropped < 90
    assert dropped + sum(torch.allclose(y, full, atol=1e-6) for y in outputs) == 200
    torch.testing.assert_close(layer.eval()(x), full)


@pytest.mark.parametrize("config", [LoHaConfig(rank_dropout=0.1), LoKrConfig(module_dropout=0.1)])
def test_dropouts_are_refused_where_a_module_reads_the_weight_itself(config):
    config.target_modules = {"0"}
    with pytest.raises(ValueError, match="'0' .MultiheadAttention. cannot be adapted .* no place there"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), config)


@pytest.mark.parametrize("config", [LoHaConfig(r=2, alpha=6), LoKrConfig(r=2, alpha=6)])
def test_scale(config):
    layer = adapted(nn.Linear(12, 8), copy.deepcopy(config))
    whole = layer.get_delta_weight("default")

    def times():
        return (layer.get_delta_weight("default") / whole).mean().item()

    layer.scale_layer(0.5)
    assert times() == pytest.approx(0.5)
    layer.unscale_layer(2)
    assert times() == pytest.approx(0.25)
    layer.unscale_layer()
    assert times() == pytest.approx(1)
    layer.set_scale("default", 3)
    assert times() == pytest.approx(3)
    assert layer.scaling["default"] == 9


def test_rank_and_alpha_patterns():
    config = LoKrConfig(r=1, alpha=8, rank_pattern={"conv2d": 4}, alpha_pattern={"^linear": 2}, init_weights="lycoris")
    config.target_modules = {"linear", "conv2d"}
    net = get_peft_model(Net(), config).base_model.model
    assert (net.linear.r, net.linear.scaling) == ({"default": 1}, {"default": 2})
    assert (net.conv2d.r, net.conv2d.scaling) == ({"default": 4}, {"default": 2})


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoHaConfig(r=0),
        lambda: LoHaConfig(rank_dropout=1.0),
        lambda: LoKrConfig(module_dropout=-0.1),
        lambda: LoKrConfig(decompose_factor=-2),
        lambda: LoKrConfig(init_weights="loftq"),
        lambda: PrefixTuningConfig(init_weights="ones"),
    ],
)
def test_bad_values_are_refused(make):
    with pytest.raises(ConfigError, match="is not valid"):
        make()
