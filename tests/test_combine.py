"""Weighted combinations of adapters: what they add up to, where they sit, and what is refused."""

import copy
import inspect

import pytest
import torch
from torch import nn
from toys import TOYS, tiny_llama

from peft import (
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peft.core.combine.ways import WAYS
from peft.kernels.decompositions import factorize, factorize_product
from peft.tuners.lora.pairs import split_pair
from peft.utils import merge_utils


TARGETS = {
    "mlp": {"target_modules": ["lin0", "lin1"]},
    "sequence": {"target_modules": ["emb", "lin", "trans", "conv", "head"]},
    "picture": {"target_modules": ["first", "grouped", "point"]},
    "volume": {"target_modules": ["conv", "head"]},
    "attention": {"target_modules": ["attn", "head"]},
    "experts": {"target_modules": ["lin"], "target_parameters": ["up", "down", "gate"]},
    "transposed_experts": {"target_parameters": ["up", "down"]},
}
WEIGHTS = [0.7, -1.2]
RANDOM = {"init_lora_weights": False}


def inputs(toy):
    torch.manual_seed(11)
    if toy in ("mlp", "experts", "transposed_experts"):
        return torch.randn(3, 6)
    if toy == "sequence":
        return torch.randint(13, (3, 7))
    shapes = {"picture": (3, 2, 9, 8), "volume": (3, 2, 4, 5, 3), "attention": (3, 5, 8)}
    return torch.randn(shapes[toy])


def base(toy):
    torch.manual_seed(0)
    return TOYS[toy]().eval()


def pair(toy="mlp", first=None, second=None):
    """A model with the adapters "x0" and "x1"."""
    one = {"r": 4, "lora_alpha": 8, **RANDOM, **TARGETS[toy], **(first or {})}
    two = {"r": 2, "lora_alpha": 3, **RANDOM, **TARGETS[toy], **(second or {})}
    model = get_peft_model(base(toy), LoraConfig(**one), "x0")
    model.add_adapter("x1", LoraConfig(**two))
    return model.eval()


def layers(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "adapter_names") and hasattr(m, "lora_alpha")}


def blocks(layer, name):
    """The update of one adapter as matrices [blocks, out, in]; zero where the layer lacks it."""
    if name not in layer:
        return 0
    down, up = split_pair(layer.adapters[name], *layer.adapters[name].pair())
    return (up @ down * layer.scaling[name]).detach()


def combine(model, way, weights=WEIGHTS, name="new", **options):
    model.add_weighted_adapter(["x0", "x1"], weights, name, combination_type=way, **options)
    return model


def snapshot(model):
    return {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_refused(model, match, *args, **options):
    before, configs, modules = snapshot(model), copy.deepcopy(model.peft_config), [id(m) for m in model.modules()]
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(*args, **options)
    now = snapshot(model)
    assert list(now) == list(before)
    for name, (identity, value, grad) in before.items():
        assert now[name][0] == identity and now[name][2] == grad and torch.equal(now[name][1], value)
    assert model.peft_config == configs
    assert [id(m) for m in model.modules()] == modules
    assert all("new" not in layer.adapter_names for layer in layers(model).values())


# ---- What the ways compute ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TARGETS)
@pytest.mark.parametrize("way", ["cat", "svd"])
def test_the_weighted_sum_of_updates_is_exact(toy, way):
    model = combine(pair(toy), way, **({"svd_rank": 6} if way == "svd" else {}))
    assert model.peft_config["new"].r == 6
    for name, layer in layers(model).items():
        wanted = sum(w * blocks(layer, n) for w, n in zip(WEIGHTS, ["x0", "x1"]))
        torch.testing.assert_close(blocks(layer, "new"), wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("toy", ["mlp", "sequence", "experts"])
def test_the_output_follows(toy):
    """With weights one and one, the combination does what both adapters do when active together."""
    model, x = combine(pair(toy), "cat", [1, 1]), inputs(toy)
    model.base_model.set_adapter(["x0", "x1"])
    both = model(x)
    model.set_adapter("new")
    torch.testing.assert_close(model(x), both, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("toy", TARGETS)
def test_linear_sums_the_factors(toy):
    model = combine(pair(toy, second={"r": 4}), "linear")
    for layer in layers(model).values():
        factors = [w * layer.scaling[n] for w, n in zip(WEIGHTS, ["x0", "x1"])]
        a, b = zip(*(layer.adapters[n].pair() for n in ("x0", "x1")))
        new_a, new_b = layer.adapters["new"].pair()
        wanted_a = abs(factors[0]) ** 0.5 * a[0] - abs(factors[1]) ** 0.5 * a[1]  # the second weight is negative
        torch.testing.assert_close(new_a, wanted_a)
        torch.testing.assert_close(new_b, sum(abs(f) ** 0.5 * part for f, part in zip(factors, b)))


@pytest.mark.parametrize("second", [{}, {"r": 4, "rank_pattern": {"lin1": 3}}], ids=["rank", "pattern"])
@pytest.mark.parametrize("way", [way for way in WAYS if not WAYS[way].dense and way != "cat"])
def test_factors_of_different_ranks_have_no_sum(way, second):
    model, both = pair(second=second), ["x0", "x1"]
    density = 0.5 if WAYS[way].pruning else None
    with pytest.raises(ValueError, match="'cat'.*'svd'"):
        model.add_weighted_adapter(both, [0.7, -1.2], "new", combination_type=way, density=density)
    assert list(model.peft_config) == both
    model.add_weighted_adapter(["x1"], [-0.5], "part", combination_type="linear")
    for layer in layers(model).values():
        torch.testing.assert_close(blocks(layer, "part"), -0.5 * blocks(layer, "x1"))


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way].pruning])
def test_pruning_ways_follow_their_definition(way):
    model = pair(second={"r": 4})
    torch.manual_seed(3)
    combine(model, way, density=0.6, majority_sign_method="frequency", svd_rank=6)
    define = {"magnitude_prune": merge_utils.magnitude_prune, "dare_linear": merge_utils.dare_linear}
    define |= {"ties": merge_utils.ties, "dare_ties": merge_utils.dare_ties, "della": merge_utils.della}
    define |= {"breadcrumbs": merge_utils.breadcrumbs, "knots": merge_utils.knots}
    function = define[way.removesuffix("_svd")]
    votes = "majority_sign_method" in inspect.signature(function).parameters
    vote = {"majority_sign_method": "frequency"} if votes else {}
    torch.manual_seed(3)
    for layer in layers(model).values():
        scales = [layer.scaling[n] for n in ("x0", "x1")]
        if way.endswith("_svd"):
            updates = [blocks(layer, n) for n in ("x0", "x1")]
            wanted = function(updates, torch.tensor(WEIGHTS), density=0.6, **vote)
            down, up = factorize(wanted, 6)
            torch.testing.assert_close(blocks(layer, "new"), up @ down, rtol=1e-4, atol=1e-5)
            continue
        factors = torch.tensor([w * s for w, s in zip(WEIGHTS, scales)])
        for part, weights in ((0, factors.sign() * factors.abs().sqrt()), (1, factors.abs().sqrt())):
            tensors = [layer.adapters[n].pair()[part].detach() for n in ("x0", "x1")]
            wanted = function(tensors, weights, density=0.6, **vote)
            torch.testing.assert_close(layer.adapters["new"].pair()[part], wanted)


def test_density_one_prunes_nothing():
    model = pair(second={"r": 4})
    for way in ("magnitude_prune", "dare_linear"):
        combine(model, way, name=way, density=1)
    combine(model, "linear", name="linear")
    for layer in layers(model).values():
        for way in ("magnitude_prune", "dare_linear"):
            torch.testing.assert_close(blocks(layer, way), blocks(layer, "linear"))


def test_svd_is_the_best_approximation_of_its_rank():
    model = combine(pair(), "svd", svd_rank=3)
    for layer in layers(model).values():
        wanted = sum(w * blocks(layer, n) for w, n in zip(WEIGHTS, ["x0", "x1"]))[0]
        rest = torch.linalg.svdvals(wanted)[3:]
        torch.testing.assert_close((blocks(layer, "new")[0] - wanted).norm(), rest.norm(), rtol=1e-4, atol=1e-5)
    assert pair().peft_config["x0"].r == combine(pair(), "svd").peft_config["new"].r  # the largest rank by default


def test_svd_clamp_limits_the_entries():
    model = combine(combine(pair(), "svd", name="free"), "svd", svd_clamp=0.8)
    for layer in layers(model).values():
        entries = torch.cat([t.flatten() for t in layer.adapters["free"].pair()])
        limit = torch.quantile(entries, 0.8)
        for free, new in zip(layer.adapters["free"].pair(), layer.adapters["new"].pair()):
            torch.testing.assert_close(new, free.clamp(-limit, limit), rtol=1e-4, atol=1e-5)
            assert not torch.equal(new, free)


@pytest.mark.parametrize("shape", [(9, 7), (4, 7), (2, 5, 9)])
def test_factorize_and_its_short_cut_agree(shape):
    torch.manual_seed(0)
    *batch, out, inner = shape
    down, up = torch.randn(*batch, 3, inner), torch.randn(*batch, out, 3)
    for rank in (1, 3, 12):
        thin, dense = factorize_product(down, up, rank), factorize(up @ down, rank)
        for a, b in (thin, dense):
            assert (a.shape, b.shape) == ((*batch, rank, inner), (*batch, out, rank))
        torch.testing.assert_close(thin[1] @ thin[0], dense[1] @ dense[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense[1] @ dense[0], up @ down, rtol=1e-4, atol=1e-5)


def test_half_precision_adapters_are_combined_in_float32():
    torch.manual_seed(0)
    model = get_peft_model(
        base("mlp").bfloat16(), LoraConfig(**TARGETS["mlp"], **RANDOM), "x0", autocast_adapter_dtype=False
    )
    model.add_adapter("x1", LoraConfig(**TARGETS["mlp"], **RANDOM), autocast_adapter_dtype=False)
    combine(model, "cat", [0.3, 0.3])
    for layer in layers(model).values():
        assert layer.adapters["new"].pair()[0].dtype == torch.bfloat16
        wanted = sum(0.3 * blocks(layer, n).float() for n in ("x0", "x1"))
        torch.testing.assert_close(blocks(layer, "new").float(), wanted, rtol=0.05, atol=0.05)


# ---- The new adapter ------------------------------------------------------------------------------------------------


def test_it_is_inactive_frozen_and_described_by_its_config():
    model = pair(first={"use_rslora": True, "alpha_pattern": {"lin0": 5}, "rank_pattern": {"lin1": 3}})
    before, random = snapshot(model), torch.random.get_rng_state()
    combine(model, "cat")
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.active_adapters == ["x0"]
    now = snapshot(model)
    assert all(now[name][0] == i and torch.equal(now[name][1], v) and now[name][2] == g
               for name, (i, v, g) in before.items())  # fmt: skip
    assert all(not grad for name, (_, _, grad) in now.items() if name not in before)
    config = model.peft_config["new"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (6, 6, False)
    assert (config.rank_pattern, config.alpha_pattern) == ({}, {})
    for layer in layers(model).values():
        assert layer.scaling["new"] == 1
        wanted = sum(w * blocks(layer, n) for w, n in zip(WEIGHTS, ["x0", "x1"]))
        torch.testing.assert_close(blocks(layer, "new"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
        ({"target_modules": ["lin0"]}, {"target_modules": "lin[01]"}),
        ({"target_modules": "lin.", "exclude_modules": ["lin1"]}, {"target_modules": ["lin1"]}),
        ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "rank_pattern": {"lin0": 7}}),
    ],
)
@pytest.mark.parametrize("way", ["cat", "linear", "svd"])
def test_other_targets_and_ranks_and_a_round_trip_through_files(tmp_path, first, second, way):
    if way == "linear":
        first, second = ({**options, "r": 4, "rank_pattern": {}} for options in (first, second))
    model, x = combine(pair("mlp", first, second), way), inputs("mlp")
    for layer in layers(model).values():
        assert ("new" in layer) == ("x0" in layer or "x1" in layer)
        if way == "cat" or "x0" not in layer or "x1" not in layer:
            wanted = sum(w * blocks(layer, n) for w, n in zip(WEIGHTS, ["x0", "x1"]))
            torch.testing.assert_close(blocks(layer, "new"), wanted, rtol=1e-4, atol=1e-5)
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(base("mlp"), tmp_path / "new")
    torch.testing.assert_close(loaded(x), model(x))
    assert layers(loaded).keys() == {name for name, layer in layers(model).items() if "new" in layer}


class Twice(nn.Module):
    """`lin`, and a `lin` further inside: one name is the tail of the other."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"lin": nn.Linear(4, 4)})

    def forward(self, x):
        return self.inner["lin"](self.lin(x))


def test_exactly_the_adapted_modules_are_targeted():
    model = get_peft_model(Twice(), LoraConfig(target_modules="lin", **RANDOM), "x0")
    model.add_adapter("x1", LoraConfig(target_modules=["lin"], exclude_modules=["inner.lin"], **RANDOM))
    combine(model, "cat")
    assert [name for name, layer in layers(model).items() if "new" in layer] == ["base_model.model.lin"]


def test_bias_of_b_is_combined():
    model = combine(pair("mlp", {"lora_bias": True}), "cat")
    for layer in layers(model).values():
        layer.lora_B["x0"].bias.data.normal_()
    model.delete_adapter("new")
    combine(model, "cat")
    for layer in layers(model).values():
        torch.testing.assert_close(layer.lora_B["new"].bias, 0.7 * 2 * layer.lora_B["x0"].bias)


def test_what_one_adapter_trains_besides_is_copied():
    options = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    model, x = pair("mlp", options, {"target_modules": ["lin0"]}), inputs("mlp")
    model.base_model.model.lin1.modules_to_save["x0"].weight.data.normal_()
    combine(model, "cat", [1, 0])
    expected = model(x)
    model.set_adapter("new")
    torch.testing.assert_close(model(x), expected)


def test_trained_biases_of_one_adapter_are_copied_and_stay_applied():
    model, x = pair("mlp", {"bias": "all"}), inputs("mlp")
    model.set_adapter("x0")
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.requires_grad, name
            p.data.normal_()
    expected = model(x)
    combine(model, "cat", [1, 0])
    torch.testing.assert_close(model(x), expected)
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))
    model.set_adapter("new")
    torch.testing.assert_close(model(x), expected)


def test_tied_embedding_and_head():
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True, **RANDOM)
    model = get_peft_model(tiny_llama(tie=True).eval(), config, "x0")
    model.add_adapter("x1", copy.deepcopy(config))
    combine(model, "cat", [1, 1])
    ids = torch.arange(10).view(2, 5)
    model.base_model.set_adapter(["x0", "x1"])
    both = model(input_ids=ids).logits
    model.set_adapter("new")
    torch.testing.assert_close(model(input_ids=ids).logits, both, rtol=1e-4, atol=1e-5)


# ---- Errors ---------------------------------------------------------------------------------------------------------


def test_refusals_leave_nothing_behind():
    model, both = pair(), ["x0", "x1"]
    assert_refused(model, "'zz' not found.*'x0', 'x1'", ["x0", "zz"], [1, 1], "new")
    assert_refused(model, "2 adapters need as many weights, got 1", both, [1], "new")
    assert_refused(model, "weight of adapter 'x1' is nan", both, [1, float("nan")], "new")
    assert_refused(model, "list with at least one adapter", [], [], "new")
    assert_refused(model, "list with at least one adapter", "x0", [1], "new")
    assert_refused(model, "'x1' already exists", both, [1, 1], "x1")
    assert_refused(model, "cannot be the name", both, [1, 1], "a.b")
    assert_refused(model, "'liner'. Did you mean 'linear'", both, [1, 1], "new", combination_type="liner")
    assert_refused(model, "'ties' needs density", both, [1, 1], "new", combination_type="ties")
    assert_refused(model, "svd_rank .* at least 1, got 0", both, [1, 1], "new", svd_rank=0)
    assert_refused(model, r"svd_clamp .* in \(0, 1\], got 3", both, [1, 1], "new", svd_clamp=3)
    # these two fail in the middle, when the new adapter is there already
    assert_refused(model, "svd_driver='gesvd'.*on cpu", both, [1, 1], "new", svd_driver="gesvd")
    options = {"combination_type": "ties", "density": 0.5, "majority_sign_method": "loudest"}
    assert_refused(model, "loudest", both, [1, 1], "new", **options)
    combine(model, "cat")


def test_dora_is_refused_with_the_reason():
    model = pair("mlp", {"use_dora": True})
    assert_refused(model, r"\['x0'\] use DoRA.*norm of the adapted weight", ["x0", "x1"], [1, 1], "new")


def test_two_trained_heads_or_biases_are_refused():
    options = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    model = pair("mlp", options, options)
    assert_refused(model, "own version of the module 'lin1'", ["x0", "x1"], [1, 1], "new")
    model = pair("mlp", {"bias": "all"}, {"bias": "all"})
    assert_refused(model, "each train biases", ["x0", "x1"], [1, 1], "new")


# ---- Other methods --------------------------------------------------------------------------------------------------


def test_ia3_vectors_are_summed():
    torch.manual_seed(0)
    first = IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"], init_ia3_weights=False)
    model = get_peft_model(base("mlp"), first, "x0")
    model.add_adapter("x1", IA3Config(target_modules=["lin0"], feedforward_modules=[], init_ia3_weights=False))
    model.add_weighted_adapter(["x0", "x1"], [0.25, 0.5], "new")
    inner = model.base_model.model
    torch.testing.assert_close(inner.lin0.ia3_l["new"], 0.25 * inner.lin0.ia3_l["x0"] + 0.5 * inner.lin0.ia3_l["x1"])
    # x1 does not scale lin1: there it counts as ones
    torch.testing.assert_close(inner.lin1.ia3_l["new"], 0.25 * inner.lin1.ia3_l["x0"] + 0.5)
    assert model.active_adapters == ["x0"]
    assert not inner.lin0.ia3_l["new"].requires_grad
    with pytest.raises(ValueError, match="need as many weights"):
        model.add_weighted_adapter(["x0", "x1"], [1], "other")
    with pytest.raises(ValueError, match="'new' already exists"):
        model.add_weighted_adapter(["x0", "x1"], [1, 1], "new")


def test_ia3_vectors_of_inputs_and_outputs_do_not_add_up():
    model = get_peft_model(base("mlp"), IA3Config(target_modules=["lin0"], feedforward_modules=[]), "x0")
    model.add_adapter("x1", IA3Config(target_modules=["lin0"], feedforward_modules=["lin0"]))
    with pytest.raises(ValueError, match="differ in (the shape of ia3_l|feedforward)"):
        model.add_weighted_adapter(["x0", "x1"], [1, 1], "new")
    assert list(model.peft_config) == ["x0", "x1"]
    assert model.base_model.model.lin0.adapter_names == ["x0", "x1"]


def test_methods_without_combination_say_so():
    model = get_peft_model(base("mlp"), LoHaConfig(target_modules=["lin0"]), "x0")
    model.add_adapter("x1", LoHaConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="LoHaModel cannot be combined.*not linear.*convert_to_lora"):
        model.add_weighted_adapter(["x0", "x1"], [1, 1], "new")


def test_adapters_side_by_side_in_different_layers():
    torch.manual_seed(0)
    model = get_peft_model(base("mlp"), HiraConfig(target_modules=["lin0"], r=2, init_weights=False), "x0")
    model.add_adapter("x1", HiraConfig(target_modules=["lin0", "lin1"], r=3, init_weights=False))
    model.add_weighted_adapter(["x0", "x1"], [2, 0.5], "new")
    inner, config = model.base_model.model, model.peft_config["new"]
    assert config.r == 5 and config.target_modules == {"lin0", "lin1"}
    first, second = inner.lin0.adapters, inner.lin1.adapters
    torch.testing.assert_close(first["new"].product(), 2 * first["x0"].product() + 0.5 * first["x1"].product())
    torch.testing.assert_close(second["new"].product(), 0.5 * second["x1"].product())


def test_tokens_of_either_adapter():
    model = get_peft_model(tiny_llama(), TrainableTokensConfig(token_indices=[5, 1]), "x0")
    model.add_adapter("x1", TrainableTokensConfig(token_indices=[2, 5]))
    layer = model.get_base_model().get_input_embeddings()
    old = layer.get_base_layer().weight
    with torch.no_grad():
        for name in ("x0", "x1"):
            layer.trainable_tokens_delta[name].normal_()
    model.add_weighted_adapter(["x0", "x1"], [2, 0.5], "new")
    assert model.peft_config["new"].token_indices == [1, 2, 5]
    first, second = (layer.trainable_tokens_delta[name] for name in ("x0", "x1"))
    wanted = [
        old[1] + 2 * (first[1] - old[1]),
        old[2] + 0.5 * (second[0] - old[2]),
        old[5] + 2 * (first[0] - old[5]) + 0.5 * (second[1] - old[5]),
    ]
    torch.testing.assert_close(layer.trainable_tokens_delta["new"], torch.stack(wanted))


def test_adapters_of_one_method_in_a_mixed_model():
    torch.manual_seed(0)
    model = get_peft_model(base("mlp"), LoraConfig(target_modules=["lin0"], init_lora_weights=False), "x0", mixed=True)
    model.add_adapter("x1", LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    model.add_adapter("x2", LoHaConfig(target_modules=["lin0"]))
    model.add_weighted_adapter(["x0", "x1"], [1, 2], "new", combination_type="cat")
    delta = model.base_model.model.lin0.base_layer.get_delta_weight
    torch.testing.assert_close(delta("new"), delta("x0") + 2 * delta("x1"))
    with pytest.raises(ValueError, match="different methods .LOHA, LORA.*convert_to_lora"):
        model.add_weighted_adapter(["x0", "x2"], [1, 2], "other")


def test_prompts_have_no_sum():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "x0")
    with pytest.raises(ValueError, match="PROMPT_TUNING.*not linear"):
        model.add_weighted_adapter(["x0"], [1], "new")
