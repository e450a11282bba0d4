"""Compacter and invertible adapters: against their formulas, on the architectures that users have, and their files."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build, inputs
from in_blocks import differs, gives, logits, refused, stir, takes_turns, trains
from safetensors.torch import load_file
from torch import nn
from toys import Mlp

from peft import (
    BottleneckConfig,
    CompacterConfig,
    InvertibleConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.core.model.walk import layers_of
from peft.tuners.compacter import Phm, new_rule, phm_matrix
from peft.tuners.invertible import Coupling


pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = ("llama", "bert", "t5", "vit", "wav2vec2")


KINDS = {
    "compacter": lambda **fields: CompacterConfig(**{"reduction_factor": 4, **fields}),
    "invertible": lambda **fields: InvertibleConfig(**fields),
}


def adapted(name: str, kind: str, stirred: bool = True, **fields: Any) -> PeftModel:
    torch.manual_seed(2)
    model = get_peft_model(build(name), KINDS[kind](**fields))
    if stirred:
        stir(model, size=0.3)
    return model


# --- what both do on every architecture --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
class TestOnModels:
    """Decoder, encoder, encoder-decoder, vision and audio."""

    def test_it_trains_saves_loads_and_goes(self, name, kind, tmp_path):
        model, base = adapted(name, kind, stirred=False), logits(build(name), name)
        assert (logits(model, name) - base).abs().max() < 0.05
        stir(model, size=0.3)
        trains(model, name, rate=0.02)
        assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
        trained = logits(model, name)
        differs(trained, base)
        with model.disable_adapter():
            gives(logits(model, name), base)
        model.save_pretrained(str(tmp_path))
        with pytest.raises(ValueError, match="no one weight equals it"):
            model.merge_and_unload()
        bare = model.unload()
        gives(logits(bare, name), base)
        gives(logits(PeftModel.from_pretrained(bare, str(tmp_path)), name), trained)

    def test_rows_of_a_batch_have_their_own(self, name, kind):
        model = adapted(name, kind)
        fields = {"compacter": {"preset": "compacter++", "shared_phm_rule": False}, "invertible": {"coupling": "glow"}}
        model.add_adapter("other", KINDS[kind](**fields[kind]))
        stir(model, "other", seed=5, size=0.3)
        takes_turns(model, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_is_generation_without(name, kind):
    model, ids = adapted(name, kind), inputs(name)["input_ids"]
    said = [
        model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*said)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model, gradients = adapted("llama", kind), []
    for checkpointed in (False, True):
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model.train()(**inputs("llama")).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for found, wanted in zip(*gradients, strict=True):
        gives(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_acts_on_its_own(kind):
    model = adapted("llama", kind)
    wanted, twin = logits(model, "llama"), copy.deepcopy(model)
    stir(model, seed=7, size=0.3)
    differs(logits(model, "llama"), wanted)
    gives(logits(twin, "llama"), wanted)


# --- Compacter ---------------------------------------------------------------------------------------------------


def by_loops(rule: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """sum_i R_i (x) W_i, entry by entry: (R (x) W)[a p + u, b q + v] = R[a, b] W[u, v]."""
    n, p, q = factors.shape
    total = np.zeros((n * p, n * q))
    for i in range(n):
        for a in range(n):
            for b in range(n):
                for u in range(p):
                    for v in range(q):
                        total[a * p + u, b * q + v] += rule[i, a, b] * factors[i, u, v]
    return total


FORMS = [
    {},
    {"phm_rank": 2, "phm_dim": 2},
    {"factorized_phm_rule": True, "phm_bias": False},
    {"shared_phm_rule": False, "factorized_phm_W": False},
    {"shared_phm_rule": False, "factorized_phm_rule": True, "phm_dim": 2},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_network_is_what_the_formula_says(form):
    """u(h) = W_up^T f(h W_down + b) + c with W = sum_i R_i (x) W_i, W_i = L_i Q_i, R_i = c_i r_i where factorised."""
    model = adapted("llama", "compacter", **form)
    layer = next(layer for _, layer in layers_of(model))
    network, shared = layer.compacter_feedforward["default"], layer.compacter_rule["default"]

    def matrix(projection: nn.Module) -> np.ndarray:
        held = {name: p.detach().double().numpy() for name, p in projection.named_parameters()}
        rule = {name: p.detach().double().numpy() for name, p in shared.items()}
        rule = rule or {name.removeprefix("rule."): value for name, value in held.items() if "rule." in name}
        rule = rule["rule"] if "rule" in rule else np.stack([c @ r for c, r in zip(rule["left"], rule["right"])])
        if "W" in held:
            return by_loops(rule, held["W"])
        return by_loops(rule, np.stack([left @ right for left, right in zip(held["W_left"], held["W_right"])]))

    def shift(projection: nn.Module) -> Any:
        return 0 if projection.bias is None else projection.bias.detach().double().numpy()

    h = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    inner = h.double().numpy() @ matrix(network.down) + shift(network.down)
    wanted = torch.nn.functional.gelu(torch.from_numpy(inner)).numpy() @ matrix(network.up) + shift(network.up)
    with torch.no_grad():
        gives(layer.adapters["default"].change("feedforward", h, h), torch.from_numpy(wanted).float())
    assert (network.down.bias is None) == (form.get("phm_bias") is False)
    assert len(shared) == (0 if form.get("shared_phm_rule") is False else 1 + bool(form.get("factorized_phm_rule")))


def test_the_matrix_is_a_sum_of_kronecker_products():
    rule, factors = torch.randn(3, 3, 3), torch.randn(3, 2, 5)
    wanted = sum(torch.kron(r, w) for r, w in zip(rule, factors))
    gives(phm_matrix(rule, factors), wanted.T)


def test_the_shared_rule_is_one_tensor_saved_once(tmp_path):
    model = adapted("llama", "compacter")
    rules = {id(layer.compacter_rule["default"]["rule"]) for _, layer in layers_of(model)}
    assert len(rules) == 1
    model.save_pretrained(str(tmp_path))
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert [name for name in file if "rule" in name] == ["base_model.compacter_rule.rule"]
    assert "base_model.model.model.layers.0.compacter_attention.down.W_left" in file
    assert sum(t.numel() for t in file.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = CompacterConfig.from_pretrained(str(tmp_path))
    assert (config.peft_type, config.mh_adapter, config.non_linearity) == ("COMPACTER", True, "gelu")


@pytest.mark.parametrize(
    ("form", "spread"),
    [({}, 1e-4), ({"shared_phm_rule": False}, 1e-2), ({"factorized_phm_rule": True, "phm_init_range": 0.3}, 0.3)],
)
def test_the_start_is_that_of_the_paper(form, spread):
    torch.manual_seed(0)
    config = CompacterConfig(phm_dim=16, **form)
    rule, matrix = torch.cat([p.flatten() for p in new_rule(config).values()]), Phm(config, 512, 64)
    assert 0.8 * spread < rule.std() < 1.2 * spread and rule.mean().abs() < 0.2 * spread
    for factor, sizes in ((matrix.W_left, (32, 1)), (matrix.W_right, (1, 4))):  # Xavier's of each L_i and Q_i
        wanted = (2 / sum(sizes)) ** 0.5
        assert factor.shape == (16, *sizes) and 0.8 * wanted < factor.std() < 1.2 * wanted
    assert matrix.bias.abs().max() == 0


def test_compacter_plus_plus_has_the_second_place_alone():
    places = {
        preset: {name.split(".compacter_")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
                 and ".compacter_" in name}
        for preset in ("compacter", "compacter++")
        for model in [adapted("bert", "compacter", preset=preset)]
    }  # fmt: skip
    assert places == {"compacter": {"attention", "feedforward", "rule"}, "compacter++": {"feedforward", "rule"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "compacter+"}, "compacter"),
        ({"reduction_factor": 3}, "phm_dim=4 does not divide both 16 and 5"),
        ({"phm_dim": 3}, "phm_dim=3 does not divide"),
        ({"phm_rank": 0}, "phm_rank"),
        ({"scaling": "chanel"}, "CompacterConfig: scaling is a number"),
        ({"init_weights": "bert"}, "init_weights"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    base = build("llama")
    with refused(base, message, (ValueError, TypeError)):
        get_peft_model(base, CompacterConfig(**{"reduction_factor": 4, **fields}))


# --- invertible adapters -----------------------------------------------------------------------------------------


def by_the_formula(x: torch.Tensor, coupling: Coupling, glow: bool) -> torch.Tensor:
    """NICE: y1 = x1 + F(x2), y2 = x2 + G(y1); Glow: y1 = e(s2) x1 + t2, y2 = e(s1) x2 + t1."""
    half = x.shape[-1] // 2
    halves = [x[..., :half], x[..., half:]]
    for own, network in ((0, coupling.first), (1, coupling.second)):
        made = network[2](torch.relu(network[0](halves[1 - own])))
        size = halves[own].shape[-1]
        if glow:
            halves[own] = halves[own] * torch.exp(3.18 * torch.atan(made[..., :size] / 5)) + made[..., size:]
        else:
            halves[own] = halves[own] + made
    return torch.cat(halves, -1)


@pytest.mark.parametrize("width", [16, 7])
@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_a_coupling_is_what_the_formula_says_and_is_undone(kind, width):
    torch.manual_seed(0)
    coupling = Coupling(InvertibleConfig(coupling=kind), width)
    assert [layer.weight.shape[0] for layer in coupling.first[::2]] == [
        max(1, (width - width // 2) // 2),
        width // 2 * (2 if kind == "glow" else 1),
    ]
    with torch.no_grad():
        assert all(layer.weight.std() < 0.04 and layer.bias.abs().max() == 0 for layer in coupling.first[::2])
        for p in coupling.parameters():
            p.normal_(std=0.5)
        x = torch.randn(3, 5, width)
        y = coupling(x, False)
        differs(y, x)
        gives(y, by_the_formula(x, coupling, kind == "glow"))
        torch.testing.assert_close(coupling(y, True), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_it_stands_at_the_embeddings_and_its_inverse_before_the_head(name, kind):
    """The output is that of a base model with hooks that do the formula where blocks begin and the head reads."""
    model = adapted(name, "invertible", coupling=kind)
    coupling = next(layer for _, layer in layers_of(model)).invertible_coupling["default"]
    stacks = {"llama": ["model.layers.0"], "gpt2": ["transformer.h.0"]}
    base = build(name)
    for key in stacks.get(name, ["model.encoder.layers.0", "model.decoder.layers.0"]):
        base.get_submodule(key).register_forward_pre_hook(
            lambda module, args: (by_the_formula(args[0], coupling, kind == "glow"), *args[1:])
        )
    base.get_output_embeddings().register_forward_pre_hook(lambda module, args: (coupling(args[0], True), *args[1:]))
    gives(logits(model, name), logits(base, name))
    differs(logits(model, name), logits(build(name), name))


def test_without_blocks_in_between_the_inverse_gives_the_embeddings_back():
    model = adapted("llama", "invertible", coupling="glow")
    base, seen = build("llama"), {}
    for layer in model.get_base_model().model.layers:
        inner = getattr(layer, "base_layer", layer)
        inner.forward = lambda hidden, *args, **kwargs: hidden
    model.get_base_model().model.norm.forward = lambda hidden: hidden
    head = model.get_base_model().lm_head.base_layer
    head.register_forward_pre_hook(lambda module, args: seen.update(read=args[0]))
    logits(model, "llama")
    gives(seen["read"], base.get_input_embeddings()(inputs("llama")["input_ids"]))


def test_the_inverse_can_be_left_out_and_classifiers_have_none(tmp_path):
    for name, fields, places in (("llama", {"invert_output": False}, 1), ("bert", {}, 1), ("t5", {}, 3)):
        model = adapted(name, "invertible", **fields)
        layers = [layer for _, layer in layers_of(model)]
        assert len(layers) == places and len({id(layer.invertible_coupling["default"]) for layer in layers}) == 1
    model.save_pretrained(str(tmp_path))
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert len(file) == 8 and all(".encoder.block.0.invertible_coupling." in name for name in file)


def test_several_active_ones_follow_each_other_and_are_undone_in_reverse():
    model = adapted("llama", "invertible")
    model.add_adapter("other", InvertibleConfig(coupling="glow"))
    stir(model, "other", seed=5, size=0.3)
    model.base_model.set_adapter(["default", "other"])
    layer = next(layer for _, layer in layers_of(model))
    first, second = (layer.invertible_coupling[name] for name in ("default", "other"))
    base = build("llama")
    base.model.layers[0].register_forward_pre_hook(
        lambda module, args: (second(first(args[0], False), False), *args[1:])
    )
    base.lm_head.register_forward_pre_hook(lambda module, args: (first(second(args[0], True), True),))
    gives(logits(model, "llama"), logits(base, "llama"))


@pytest.mark.parametrize("first", [True, False])
def test_a_trained_copy_of_the_head_reads_what_the_inverse_gives(first, tmp_path):
    fields: dict[str, Any] = {"modules_to_save": ["lm_head"]}
    if first:
        model = adapted("llama", "invertible", **fields)
    else:  # the copy is there before, of an adapter that is not active
        model = get_peft_model(build("llama"), LoraConfig(r=2, **fields), adapter_name="other", mixed=True)
        model.add_adapter("default", InvertibleConfig(**fields))
        model.set_adapter("default")
        stir(model, size=0.3)
    base = build("llama")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("modules_to_save.default.weight"):
                p.add_(0.1)
                base.lm_head.weight.copy_(p)
    coupling = next(x for _, x in layers_of(model) if "default" in x).invertible_coupling["default"]
    base.model.layers[0].register_forward_pre_hook(lambda module, args: (coupling(args[0], False), *args[1:]))
    base.lm_head.register_forward_pre_hook(lambda module, args: (coupling(args[0], True),))
    gives(logits(model, "llama"), logits(base, "llama"))
    if first:
        model.save_pretrained(str(tmp_path))
        gives(logits(PeftModel.from_pretrained(build("llama"), str(tmp_path)), "llama"), logits(base, "llama"))


@pytest.mark.parametrize("order", [("invertible", "bottleneck", "lora"), ("bottleneck", "lora", "invertible")])
def test_with_a_bottleneck_it_is_a_language_adapter(order):
    """MAD-X: both are active, and a LoRA beside them; whichever comes first."""
    configs: dict[str, Any] = {
        "invertible": InvertibleConfig(),
        "bottleneck": BottleneckConfig(reduction_factor=2),
        "lora": LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    }
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), configs[order[0]], adapter_name=order[0], mixed=True)
    for name in order[1:]:
        model.add_adapter(name, configs[name])
    for seed, name in enumerate(configs):
        stir(model, name, seed=seed, size=0.3)
    model.set_adapter(list(order))
    base, held = build("llama"), dict(layers_of(model))
    coupling = next(x for x in held.values() if "invertible" in x).invertible_coupling["invertible"]
    base.model.layers[0].register_forward_pre_hook(lambda module, args: (coupling(args[0], False), *args[1:]))
    base.lm_head.register_forward_pre_hook(lambda module, args: (coupling(args[0], True),))
    for name, layer in held.items():
        if "lora" in layer:
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            weight = base.get_submodule(key).weight
            weight.data += layer.get_delta_weight("lora").detach()
    for block, (_, layer) in zip(base.model.layers, [x for x in held.items() if "bottleneck" in x[1]], strict=True):
        network = layer.bottleneck_feedforward["bottleneck"]
        x: dict[str, torch.Tensor] = {}
        block.post_attention_layernorm.register_forward_pre_hook(lambda module, args, x=x: x.update(x=args[0]))
        block.mlp.register_forward_hook(lambda module, args, h, x=x, network=network: h + network(h + x["x"], h))
    gives(logits(model, "llama"), logits(base, "llama"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coupling": "nise"}, "nice"),
        ({"reduction_factor": 0}, "reduction_factor"),
        ({"non_linearity": "rellu"}, "Did you mean 'relu'"),
    ],
)
def test_couplings_without_meaning_are_refused(fields, message):
    base = build("llama")
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, InvertibleConfig(**fields))
    assert not list(layers_of(base))


def test_models_without_a_place_are_refused():
    with pytest.raises(ValueError, match="0 transformer blocks"):
        get_peft_model(Mlp(), InvertibleConfig())
    with pytest.raises(ValueError, match="0 transformer blocks"):
        get_peft_model(Mlp(), CompacterConfig())
    base = build("llama")
    base.lm_head = nn.Linear(12, 40)
    with pytest.raises(ValueError, match="reads 12 features, and the blocks 16.*invert_output=False"):
        get_peft_model(base, InvertibleConfig())
    assert not list(layers_of(base))
