"""What LoRA starts from: tensors, rewritten base, output and gradient against the formulas, on each kind of layer."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from quantised import BASES
from safetensors.torch import load_file
from test_convert import Peak
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model, preprocess_loraga
from peft.core.base.kinds import kind_of
from peft.core.base.storage import storage_of
from peft.tuners.lora import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.starts import lora_ga


RECORDED = Path(__file__).parent / "starts"
R, ALPHA = 2, 6  # s = 3
S = ALPHA / R


class Around(nn.Module):
    """A layer of some kind under the name "layer", with an output that gradients can be taken of."""

    def __init__(self, layer, x):
        super().__init__()
        self.layer, self.x = layer, x

    def forward(self, x=None):
        y = self.layer(self.x if x is None else x)
        return y[0] if isinstance(y, tuple) else y


def layers():
    torch.manual_seed(0)
    x = torch.randn(5, 7, 8)
    moved = torch.randn(3, 4, 9)
    return {
        "linear": Around(nn.Linear(8, 6), x),
        "conv1d_of_gpt2": Around(Conv1D(6, 8), x),
        "conv1d": Around(nn.Conv1d(4, 6, 3, padding=1, stride=2), moved),
        "conv2d": Around(nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2), moved[:, :, :, None].repeat(1, 1, 1, 8)),
        "conv3d": Around(nn.Conv3d(2, 6, 2, padding_mode="circular", padding=1), torch.randn(2, 2, 3, 4, 5)),
    }


def prepared(model, config):
    """Run what a start needs before."""
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, lambda: model())
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: model().square().mean().backward())


def config_for(init, **more):
    if init == "kpm":
        init, more["method"] = "corda", "kpm"
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"], "init_lora_weights": init}
    if init == "corda":
        options["corda_config"] = CordaConfig(corda_method=more.pop("method", "ipm"))
    if init == "lora_ga":
        options["lora_ga_config"] = LoraGAConfig(**more.pop("ga", {}))
    return LoraConfig(**options, **more)


def dense(layer):
    """The weight of a plain layer as a matrix ``[out, in * kernel]``, in float64."""
    return kind_of(layer).orient(layer.weight.detach(), layer).flatten(1).double()


def patches(layer, x):
    """The inputs of a layer as rows ``[n, in * kernel]``, one by one through a layer whose weight picks each entry."""
    kind = kind_of(layer)
    size = kind.shape(layer)[1:].numel() if hasattr(kind.shape(layer)[1:], "numel") else dense(layer).shape[1]
    found = []
    for i in range(size):
        probe = copy.deepcopy(layer)
        unit = torch.zeros_like(dense(layer)).float()
        unit[0, i] = 1
        shaped = unit.view(kind.shape(layer))
        probe.weight.data = kind.restore(shaped, layer).contiguous()
        y = probe(x) - (probe.bias[0] if probe.bias is not None else 0)
        found.append((y[..., 0] if len(kind.shape(layer)) == 2 else y[:, 0]).reshape(-1))
    return torch.stack(found, 1).double()


def product(init, plain, x, scale):
    """B A by the formula of each start, an independent computation in float64."""
    w = dense(plain)
    if init == "pissa":
        u, s, vt = torch.linalg.svd(w)
        return u[:, :R] * s[:R] @ vt[:R] / scale
    if init == "olora":
        q, upper = torch.linalg.qr(w)
        return q[:, :R] @ upper[:R]
    if init in ("corda", "kpm"):
        rows = patches(plain, x)
        rows = rows / rows.max().abs()
        c = rows.T @ rows
        c = c + torch.eye(len(c)) * c.diagonal().mean() * 0.01
        u, s, vt = torch.linalg.svd(w @ c, full_matrices=False)
        kept = slice(R) if init == "corda" else slice(-R, None)
        return u[:, kept] * s[kept] @ vt[kept] @ torch.linalg.inv(c) / scale
    model = Around(copy.deepcopy(plain).double(), x.double())
    model().square().mean().backward()
    g = kind_of(plain).orient(model.layer.weight.grad, plain).flatten(1)
    u, s, vt = torch.linalg.svd(g)
    return None, u, s, vt


REWRITING = ["pissa", "olora", "corda", "kpm", "lora_ga"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", REWRITING)
@pytest.mark.parametrize("kind", list(layers()))
def test_start_is_its_formula_on_each_kind(kind, init, rslora):
    """Output, gradient, tensors, base, counts, and the base with the trained adapter merged."""
    model = layers()[kind]
    scale = 5 / R**0.5 if rslora else S
    plain, x = copy.deepcopy(model.layer), model.x
    y = model().detach()
    config = config_for(init, **({"use_rslora": True, "alpha_pattern": {"layer": 5}} if rslora else {}))
    prepared(model, config)
    peft_model = get_peft_model(model, config)
    layer = peft_model.base_model.model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    made = b.flatten(1).double() @ a.flatten(1).double()
    if init == "lora_ga":
        _, u, s, vt = product(init, plain, x, scale)
        stable = len(u) ** 0.25 / 4
        torch.testing.assert_close(a.flatten(1).double().abs(), vt[:R].abs(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            b.flatten(1).double().abs(), (u[:, R : 2 * R] * s[R : 2 * R] * stable).abs(), atol=1e-4, rtol=1e-3
        )
    else:
        torch.testing.assert_close(made, product(init, plain, x, scale), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(dense(layer.get_base_layer()), dense(plain) - scale * made, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peft_model(), y, atol=1e-5, rtol=1e-5)
    weight = dense(plain).float().requires_grad_()  # the gradients of A and B follow from that of the whole weight
    probe = Around(copy.deepcopy(plain), x)
    shaped = kind_of(plain).restore(weight.view(kind_of(plain).shape(plain)), plain)
    torch.func.functional_call(probe, {"layer.weight": shaped}).square().sum().backward()
    peft_model().square().sum().backward()
    torch.testing.assert_close(a.grad.flatten(1), scale * b.detach().flatten(1).T @ weight.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(b.grad.flatten(1), scale * weight.grad @ a.detach().flatten(1).T, atol=1e-3, rtol=1e-3)
    peft_model.zero_grad()
    assert peft_model.get_nb_trainable_parameters() == (
        R * sum(dense(plain).shape),
        a.numel() + b.numel() + sum(p.numel() for p in plain.parameters()),
    )
    with torch.no_grad():
        b.add_(torch.randn(b.shape))
    trained, y = b.flatten(1).double() @ a.flatten(1).double(), peft_model().detach()
    peft_model.merge_adapter()
    torch.testing.assert_close(
        dense(layer.get_base_layer()), dense(plain) + scale * (trained - made), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(peft_model(), y, atol=1e-4, rtol=1e-4)
    peft_model.unmerge_adapter()
    back = peft_model.unload().layer
    assert torch.equal(back.weight, plain.weight) and torch.equal(back.bias, plain.bias)


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_directions_and_scales_of_lora_ga(direction, scale):
    torch.manual_seed(0)
    gradient, weight = torch.randn(9, 7), torch.randn(9, 7)
    a, b = lora_ga(gradient, weight, R, S, direction, scale)
    u, s, vt = torch.linalg.svd(gradient)
    of_a = (vt @ (a / a.norm(dim=1, keepdim=True)).T).abs().argmax(0).tolist()
    of_b = (u.T @ (b / b.norm(dim=0))).abs().argmax(0).tolist()
    expected = {"ArBr": ([1, 3], [0, 2]), "A2rBr": ([2, 3], [0, 1]), "ArB2r": ([0, 1], [2, 3])}
    assert (of_a, of_b) == expected.get(direction, (of_a, of_a)) and len({*of_a}) == R
    length = 1 / S if scale == "gd_scale" else 1.0
    torch.testing.assert_close(a.norm(dim=1), torch.full((R,), length), atol=1e-4, rtol=1e-4)
    factor = {
        "stable": 9**0.25 / 4,
        "weight_svd": torch.linalg.svdvals(weight)[0].item() / s[of_b[0]].item(),
        "gd_scale": 1 / S,
        "unit": 1,
    }
    torch.testing.assert_close(b.norm(dim=0), s[of_b] * factor[scale], atol=1e-4, rtol=1e-3)


class Two(nn.Module):
    """The model of which the reference's tensors are recorded."""

    def __init__(self):
        super().__init__()
        self.l1, self.l2 = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.l2(torch.tanh(self.l1(x)))


def two(seeded=True):
    with torch.random.fork_rng(devices=[], enabled=not seeded):
        torch.manual_seed(0)
        return Two()


DATA = load_file(RECORDED / "data.safetensors")
X, T = DATA["x"], DATA["t"]
CASES = json.loads((RECORDED / "cases.json").read_text())


def step(model):
    for rows in (slice(0, 20), slice(20, 40)):
        nn.functional.mse_loss(model(X[rows]), T[rows]).backward()


@pytest.mark.parametrize("case", list(CASES))
def test_tensors_are_those_of_the_reference_up_to_signs(case):
    """Recorded with version 0.21.2 of the reference from the same seeds."""
    fields = dict(CASES[case])
    recorded = {name: t for name, t in DATA.items() if name.startswith(f"{case}.")}
    for name, cls in (("corda_config", CordaConfig), ("lora_ga_config", LoraGAConfig)):
        if name in fields:
            fields[name] = cls(**fields[name])
    config, model = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["l1", "l2"], **fields}), two()
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, lambda: [model(X[:20]), model(X[20:])])
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: step(model))
    state = get_peft_model(model, config).state_dict()
    assert recorded and {name.removeprefix(f"{case}.") for name in recorded} <= set(state)
    for name, then in recorded.items():
        now = state[name.removeprefix(f"{case}.")]
        if "lora" in name:
            now, then = now.abs(), then.abs()
        torch.testing.assert_close(now, then, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("ipm", [3.5163641, 1.7295648], [21.7923641, 10.9128780]),
        ("kpm", [0.1056500, 0.0284419], [2.2981725, 1.5298747]),
    ],
)
def test_corda_weighs_each_call_by_its_uppermost_entry(method, first, second):
    """Singular values of W C as version 0.21.2 of the reference has them."""
    model = two()
    config = LoraConfig(
        r=2, target_modules=["l1", "l2"], init_lora_weights="corda", corda_config=CordaConfig(corda_method=method)
    )
    preprocess_corda(model, config, lambda: [model(X[:20] - 1), model(X[20:] + 0.5)])
    torch.testing.assert_close(model.l1.eigens.S_WC, torch.tensor(first), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.l2.eigens.S_WC, torch.tensor(second), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga"])
@pytest.mark.parametrize("rslora", [False, True])
def test_saved_as_plain_lora_of_twice_the_rank(init, rslora, tmp_path):
    model, config = two(), config_for(init, use_rslora=rslora, rank_pattern={"l2": 3}, alpha_pattern={"l1": 5})
    config.target_modules = {"l1", "l2"}
    prepared_two(model, config)
    peft_model = get_peft_model(model, config)
    peft_model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    y = peft_model(X)
    peft_model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of options that count for nothing now
        loaded = PeftModel.from_pretrained(two(), tmp_path / "end")
    config = loaded.peft_config["default"]
    assert config.r == 2 * R and config.rank_pattern == {"l2": 6} and config.init_lora_weights is True
    torch.testing.assert_close(loaded(X), y, atol=1e-4, rtol=1e-4)
    assert torch.equal(loaded.base_model.model.l1.get_base_layer().weight, two().l1.weight)
    assert torch.equal(peft_model.unload().l1.weight, two().l1.weight)


def test_what_loftq_has_rounded_away_is_told_of_where_plain_lora_is_written(tmp_path):
    peft_model = get_peft_model(two(), LoraConfig(r=2, target_modules=["l1"], init_lora_weights="loftq"))
    peft_model.save_pretrained(tmp_path / "start")
    with pytest.warns(PeftWarning, match="LoftQ has rounded.*Saved without"):
        peft_model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))


def prepared_two(model, config):
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, lambda: model(X))
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: step(model))


def test_a_start_of_another_shape_is_refused_and_nothing_written(tmp_path):
    for r, name in ((2, "one"), (3, "two")):
        config = LoraConfig(r=r, target_modules=["l1"], init_lora_weights="pissa")
        peft_model = get_peft_model(two(), config)
        peft_model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="another adapter"):
        peft_model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "one"))
    assert not (tmp_path / "end").exists()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "lora_ga"])
def test_loading_a_file_that_says_how_it_started(init, low_cpu_mem_usage, tmp_path):
    """The tensors of a PiSSA or OLoRA belong to what is left of the weight; the others' to the base as it is."""
    config = LoraConfig(r=2, target_modules=["l1"], init_lora_weights=init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(two(), config)
        nn.init.normal_(peft_model.base_model.model.l1.lora_B["default"].weight)
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(two(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(loaded(X), peft_model(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", "eva", "mica"])
def test_loading_repeats_no_decomposition(init, tmp_path, monkeypatch):
    """Of what has been converted to plain LoRA, and of starts that leave the base as it is."""
    model, config = two(), config_for(init)
    config.target_modules = {"l1", "l2"}
    prepared_two(model, config)
    peft_model = get_peft_model(model, config)
    converted = init not in ("eva", "mica")
    peft_model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    more = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")} if converted else {}
    peft_model.save_pretrained(tmp_path / "end", **more)
    for name in ("linalg.svd", "linalg.qr", "linalg.inv_ex", "svd_lowrank"):
        monkeypatch.setattr(f"torch.{name}", lambda *args, **kwargs: pytest.fail("decomposes"))
    loaded = PeftModel.from_pretrained(two(), tmp_path / "end")
    torch.testing.assert_close(loaded(X), peft_model(X), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_a_start_decomposes_layer_by_layer_and_shows_how_far_it_is(init, capfd):
    """In matrices of one layer: the base's, the original that is kept aside for each, and one decomposition."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(40))).requires_grad_(False)
    config = LoraConfig(r=2, target_modules=[str(i) for i in range(40)], init_lora_weights=init)
    with Peak() as peak:
        get_peft_model(model, config)
    pairs = 40 * 2 * 2 / 64
    assert peak.most / (64 * 64 * 4) < 2 * 40 + pairs + 6
    assert "Starting adapter default" in capfd.readouterr().err


def test_a_start_with_draws_is_repeated_under_its_seed_and_the_rest_is_said(tmp_path):
    """As the reference repeats it; there without a word."""
    config = LoraConfig(r=2, target_modules=["l1"], init_lora_weights="pissa_niter_0")
    torch.manual_seed(3)
    peft_model = get_peft_model(two(seeded=False), config)
    nn.init.normal_(peft_model.base_model.model.l1.lora_B["default"].weight)
    with pytest.warns(PeftWarning, match="loading cannot repeat it"):
        peft_model.save_pretrained(tmp_path)
    for seed, right in ((3, True), (4, False)):
        torch.manual_seed(seed)
        with pytest.warns(PeftWarning, match="draws a random projection"):
            loaded = PeftModel.from_pretrained(two(seeded=False), tmp_path)
        assert torch.allclose(loaded(X), peft_model(X), atol=1e-5) == right


def test_what_was_not_prepared_is_told():
    config = LoraConfig(r=2, target_modules=["l1"], init_lora_weights="corda")
    with pytest.warns(PeftWarning, match="preprocess_corda"):
        peft_model = get_peft_model(two(), config)
    torch.testing.assert_close(peft_model(X), two()(X))


def test_a_base_without_values_is_refused_by_name():
    with torch.device("meta"):
        model = two()
    with pytest.raises(ValueError, match="'l1'.*meta device"):
        get_peft_model(model, LoraConfig(target_modules=["l1"], init_lora_weights="pissa"))
    assert type(model.l1) is nn.Linear


def test_grouped_convolutions_and_embeddings():
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3, groups=2), "table": nn.Embedding(9, 4)})
    with pytest.raises(ValueError, match="no grouped kernel"):
        get_peft_model(model, LoraConfig(target_modules=["conv"], init_lora_weights="pissa"))
    before = model["table"].weight.detach().clone()
    layer = get_peft_model(model, LoraConfig(r=2, target_modules=["table"], init_lora_weights="olora"))
    layer = layer.base_model.model["table"]
    assert torch.equal(layer.get_base_layer().weight, before) and not layer.lora_embedding_A["default"].any()


def test_experts_start_one_by_one():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6, 8))

        def forward(self, x):
            return torch.einsum("eoi,bi->beo", self.w, x)

    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts()})
    plain = copy.deepcopy(model["experts"])
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=[], target_parameters=["experts.w"], init_lora_weights="pissa"
    )
    layer = get_peft_model(model, config).base_model.model["experts"]
    for w, rest in zip(plain.w, layer.get_base_layer().w):
        u, s, vt = torch.linalg.svd(w)
        torch.testing.assert_close(rest, w - u[:, :2] * s[:2] @ vt[:2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(X), plain(X), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", True])
def test_a_start_afterwards_is_the_start_before(init, dora):
    plain = two()
    peft_model = get_peft_model(two(), LoraConfig(r=2, target_modules=["l1"], use_dora=dora))
    nn.init.normal_(peft_model.base_model.model.l1.lora_B["default"].weight)
    options = {
        "corda": {"run_model": lambda: peft_model(X), "corda_method": "kpm"},
        "lora_ga": {"train_step": lambda: step(peft_model), "scale": "unit"},
    }
    peft.initialize(peft_model, init, **options.get(init, {}))
    torch.testing.assert_close(peft_model(X), plain(X), atol=1e-5, rtol=1e-5)
    layer = peft_model.base_model.model.l1
    rewritten = not torch.equal(layer.get_base_layer().weight, plain.l1.weight)
    assert rewritten == (init is not True) and peft_model.peft_config["default"].init_lora_weights == init
    assert all(p.requires_grad for p in layer.adapters["default"].parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of options that count for nothing now
        peft.initialize(peft_model, "olora")  # the one before is undone
    torch.testing.assert_close(peft_model(X), plain(X), atol=1e-5, rtol=1e-5)
    assert torch.equal(peft_model.unload().l1.weight, plain.l1.weight)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mica_afterwards_and_away_from_it(dora, dtype):
    plain, x = two().to(dtype), X.to(dtype)
    fields = {"r": 2, "target_modules": ["l1"], "use_dora": dora}
    made = get_peft_model(two().to(dtype), LoraConfig(init_lora_weights="mica", **fields))
    peft_model = get_peft_model(two().to(dtype), LoraConfig(**fields))
    nn.init.normal_(peft_model.base_model.model.l1.lora_B["default"].weight)
    y = peft_model.eval()(x)  # what a layer has learned of its adapter must not outlive it
    assert not torch.equal(y, plain(x))
    peft.initialize(peft_model, "mica")
    one, other = (model.base_model.model.l1.adapters["default"] for model in (made, peft_model))
    assert type(one) is type(other)
    for name, p in made.base_model.model.named_parameters():
        found = peft_model.base_model.model.get_parameter(name)
        assert torch.equal(p, found) and p.dtype == found.dtype and p.requires_grad == found.requires_grad
    torch.testing.assert_close(peft_model(x), plain(x), atol=1e-2, rtol=1e-2)
    peft.initialize(peft_model, "gaussian")
    layer = peft_model.base_model.model.l1
    assert (
        all(p.requires_grad for p in layer.lora_B.parameters()) and layer.lora_B["default"].weight.count_nonzero() == 0
    )
    torch.testing.assert_close(peft_model(x), plain(x), atol=1e-2, rtol=1e-2)


def test_a_start_afterwards_that_cannot_be_leaves_the_model():
    peft_model = get_peft_model(two(), LoraConfig(r=2, target_modules=["l1"]))
    before = copy.deepcopy(peft_model.state_dict())
    with pytest.raises(ValueError, match="no LoRA called 'other'"):
        peft.initialize(peft_model, "pissa", "other")
    with pytest.raises(ValueError, match="no option 'rho'"):
        peft.initialize(peft_model, "pissa", rho=2)
    with pytest.raises(ValueError, match="no option 'method'. Did you mean 'corda_method'"):
        peft.initialize(peft_model, "corda", method="kpm")
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        peft.initialize(peft_model, "pissa")
    peft_model.unmerge_adapter()
    base = peft_model.base_model.model.l1.base_layer.to("meta")
    with pytest.raises(ValueError, match="'l1' has no values yet"):
        peft.initialize(peft_model, "pissa")
    assert peft_model.peft_config["default"].init_lora_weights is True
    base.to_empty(device="cpu").load_state_dict(two().l1.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in peft_model.state_dict().items())


@pytest.mark.parametrize(
    "variant",
    [
        {"use_bdlora": {"target_modules_bd_a": ["l1"], "nblocks": 2}},
        {"use_qalora": True, "qalora_group_size": 2},
        {"use_gating": True},
        {"kasa_config": {}},
        {"alora_invocation_tokens": [1]},
    ],
    ids=str,
)
def test_a_start_afterwards_is_refused_where_one_before_is(variant):
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        get_peft_model(two(), LoraConfig(r=2, target_modules=["l1"], init_lora_weights="pissa", **variant))
    peft_model = get_peft_model(two(), LoraConfig(r=2, target_modules=["l1"], **variant))
    before = copy.deepcopy(peft_model.state_dict())
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        peft.initialize(peft_model, "pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        peft_model.base_model.model.l1.reset_lora_parameters("default", "pissa")
    assert all(torch.equal(t, before[name]) for name, t in peft_model.state_dict().items())


@pytest.mark.parametrize("start", ["corda", "lora_ga", "eva"])
def test_a_start_whose_data_fail_leaves_the_start_before(start):
    def broken(*_):
        raise RuntimeError("no data")
        yield

    peft_model = get_peft_model(two(), LoraConfig(r=2, target_modules=["l1"], init_lora_weights="pissa"))
    nn.init.normal_(peft_model.base_model.model.l1.lora_B["default"].weight)
    y, before = peft_model(X), copy.deepcopy(peft_model.state_dict())
    data = {"corda": "run_model", "lora_ga": "train_step", "eva": "dataloader"}[start]
    with pytest.raises(ValueError, match=data):
        peft.initialize(peft_model, start)
    with pytest.raises(RuntimeError, match="no data"):
        peft.initialize(peft_model, start, **{data: broken() if start == "eva" else lambda: next(broken())})
    assert peft_model.peft_config["default"].init_lora_weights == "pissa" and torch.equal(peft_model(X), y)
    assert all(torch.equal(t, before[name]) for name, t in peft_model.state_dict().items())


def test_data_are_run_without_any_adapter():
    peft_model = get_peft_model(two(), LoraConfig(r=2, target_modules=["l1"], init_lora_weights="pissa"))
    peft_model.add_adapter("l2", LoraConfig(r=2, target_modules=["l1", "l2"], init_lora_weights=False))
    peft_model.base_model.set_adapter(["default", "l2"])
    plain, seen = two()(X), []

    def forward(model, batch):
        seen.append(model(batch))

    options = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    peft.initialize(peft_model, "eva", dataloader=[X], forward_fn=forward, **options)
    assert seen and all(torch.equal(y, plain) for y in seen)


def test_caches_of_corda_and_lora_ga(tmp_path):
    files = {"cache_file": str(tmp_path / "in" / "c.pt"), "covariance_file": str(tmp_path / "v.pt")}
    fields = {"r": 2, "target_modules": ["l1"]}
    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(**files), **fields)
    first, second = two(), two()
    preprocess_corda(first, config, lambda: first(X))
    preprocess_corda(second, config)  # no data needed
    assert torch.equal(first.l1.eigens.V_WC, second.l1.eigens.V_WC)
    with pytest.raises(ValueError, match="made for another model"):
        preprocess_corda(
            two(), LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(**files), target_modules=["l2"])
        )
    config = LoraConfig(init_lora_weights="lora_ga", **fields)
    preprocess_loraga(first, config, lambda: step(first), cache_file=str(tmp_path / "g.pt"))
    preprocess_loraga(second, config, lambda: pytest.fail("runs"), cache_file=str(tmp_path / "g.pt"))
    assert torch.equal(first.l1._peft_loraga_grad, second.l1._peft_loraga_grad)
    assert first.l1.weight.requires_grad and first.l1.weight.grad is None


def test_old_names_of_the_starts():
    plain = two()
    layer = get_peft_model(two(), LoraConfig(r=2, target_modules=["l1"])).base_model.model.l1
    for call in (
        lambda: layer.pissa_init("default", "pissa_niter_3"),
        lambda: layer.olora_init("default"),
        lambda: layer.orthogonal_init("default"),
    ):
        call()
        torch.testing.assert_close(layer(X), plain.l1(X), atol=1e-5, rtol=1e-5)
    layer.loftq_init("default", LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 8}))
    torch.testing.assert_close(layer(X), plain.l1(X), atol=0.1, rtol=0.1)
    layer.delete_adapter("default")
    assert torch.equal(layer.get_base_layer().weight, plain.l1.weight)


@pytest.mark.parametrize("storage", list(BASES))
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_on_quantised_bases(storage, init):
    """What is left is quantised again, or the start is refused with the reason; the codes come back bit for bit."""
    model = BASES[storage]().requires_grad_(False)  # kernels of trained and of frozen layers may differ
    x = torch.randn(4, model[0].in_features)
    model(x)  # bitsandbytes repacks its codes in the first call
    y, before = model(x), [storage_of(model[i], "weight").read(model[i], "weight").clone() for i in (0, 2)]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=init)
    kept = storage_of(model[0], "weight")
    if not (kept.can_read and kept.can_write):
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}' rewrites"):
            get_peft_model(model, config)
        return
    peft_model = get_peft_model(model, config)
    rest = (peft_model(x) - y).norm() / y.norm()
    assert rest < 0.25  # as far as four bits round
    back = peft_model.unload()
    after = [storage_of(back[i], "weight").read(back[i], "weight") for i in (0, 2)]
    assert all(map(torch.equal, before, after)) and torch.equal(back(x), y)


def test_on_an_offloaded_base():
    accelerate = pytest.importorskip("accelerate")
    plain, offloaded = two(), accelerate.cpu_offload(two(), "cpu")
    config = LoraConfig(r=2, target_modules=["l1", "l2"], init_lora_weights="pissa")
    wanted, found = get_peft_model(two(), copy.deepcopy(config)), get_peft_model(offloaded, config)
    for name in ("l1", "l2"):
        one, other = (m.base_model.model.get_submodule(name) for m in (wanted, found))
        torch.testing.assert_close(one.lora_A["default"].weight, other.lora_A["default"].weight)
        assert other.get_base_layer().weight.is_meta
        torch.testing.assert_close(other.storage.read(other.get_base_layer(), "weight"), one.get_base_layer().weight)
    torch.testing.assert_close(found(X), plain(X), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.unload()(X), plain(X))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_bfloat16(init):
    model = two().to(torch.bfloat16)
    before, x = copy.deepcopy(model), X.bfloat16()
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["l1"], init_lora_weights=init))
    layer = peft_model.base_model.model.l1
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert layer.get_base_layer().weight.dtype == torch.bfloat16
    torch.testing.assert_close(peft_model(x), before(x), atol=0.1, rtol=0.05)
    assert torch.equal(peft_model.unload().l1.weight, before.l1.weight)
