"""Swapping an adapter for another in place: same parameters, other values, nothing compiled anew."""

import copy

import pytest
import torch
from torch import nn
from toys import TOYS, Mlp, tiny_llama

from peft import (
    HiraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


TARGETS = {
    "mlp": {"target_modules": ["lin0", "lin1"]},
    "sequence": {"target_modules": ["emb", "lin", "trans", "conv", "head"]},
    "picture": {"target_modules": ["first", "grouped", "point"]},
    "attention": {"target_modules": ["attn", "head"]},
    "experts": {"target_modules": ["lin"], "target_parameters": ["up", "down"]},
    "transposed_experts": {"target_parameters": ["up", "gate"]},
}
RATES = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}


def inputs(toy):
    torch.manual_seed(11)
    if toy in ("mlp", "experts", "transposed_experts"):
        return torch.randn(3, 6)
    if toy == "sequence":
        return torch.randint(13, (3, 7))
    return torch.randn(3, 2, 9, 8) if toy == "picture" else torch.randn(3, 5, 8)


def base(toy):
    torch.manual_seed(0)
    return TOYS[toy]().eval()


def adapted(toy, seed, **options):
    model = base(toy)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{**RATES, **TARGETS[toy], **options})).eval()


def saved(folder, toy, seed, **options):
    adapted(toy, seed, **options).save_pretrained(folder)
    return folder


def snapshot(model):
    return {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert now[name][0] == identity
        assert torch.equal(now[name][1], value), name


# ---- The same as a fresh load -------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TARGETS)
@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize("target_rank", [None, 8])
def test_swapped_equals_fresh_load(tmp_path, toy, rank, target_rank):
    saved(tmp_path, toy, 2, r=rank, lora_alpha=9)
    model = adapted(toy, 1)
    if target_rank:
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
    x, before = inputs(toy), snapshot(model)
    first = model(x)
    hotswap_adapter(model, tmp_path, "default")
    fresh = PeftModel.from_pretrained(base(toy), tmp_path)
    torch.testing.assert_close(model(x), fresh(x))
    assert not torch.allclose(model(x), first, atol=1e-3)
    after = snapshot(model)
    assert {name: identity for name, (identity, _) in after.items()} == {n: i for n, (i, _) in before.items()}
    assert model.peft_config["default"].r == rank
    assert model.peft_config["default"].lora_alpha == 9


@pytest.mark.parametrize("toy", TARGETS)
def test_preparing_changes_no_output(toy):
    model = adapted(toy, 1)
    x = inputs(toy)
    before = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=10)
    torch.testing.assert_close(model(x), before)
    if toy not in ("picture",):
        model.merge_adapter()
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
    prepare_model_for_compiled_hotswap(model, target_rank=10)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_swapping_back_and_forth_leaves_no_trace(tmp_path):
    first, second = saved(tmp_path / "1", "mlp", 1), saved(tmp_path / "2", "mlp", 2, r=7)
    model, x = adapted("mlp", 1), inputs("mlp")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    expected = model(x)
    hotswap_adapter(model, second, "default")
    hotswap_adapter(model, first, "default")
    torch.testing.assert_close(model(x), expected)


def test_ranks_by_layer_and_trained_modules_are_swapped(tmp_path):
    options = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    other = adapted("mlp", 2, rank_pattern={"lin0": 3}, **options)
    other.base_model.model.lin1.modules_to_save["default"].weight.data.normal_()
    other.save_pretrained(tmp_path)
    model, x = adapted("mlp", 1, **options), inputs("mlp")
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), other(x))


def test_dora_is_swapped_with_its_magnitudes(tmp_path):
    other = adapted("mlp", 2, use_dora=True)
    other.base_model.model.lin0.lora_magnitude_vector["default"].weight.data.mul_(1.7)
    other.save_pretrained(tmp_path)
    model, x = adapted("mlp", 1, use_dora=True), inputs("mlp")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), other(x))


def test_layers_that_the_new_adapter_lacks_get_no_update(tmp_path):
    saved(tmp_path, "mlp", 2, target_modules=["lin1"], r=6)
    model, x = adapted("mlp", 1), inputs("mlp")
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), PeftModel.from_pretrained(base("mlp"), tmp_path)(x))
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(base("mlp"), tmp_path / "again")(x), model(x))


def test_only_the_named_adapter_changes(tmp_path):
    saved(tmp_path, "mlp", 3)
    model, x = adapted("mlp", 1), inputs("mlp")
    model.add_adapter("two", LoraConfig(**RATES, **TARGETS["mlp"]))
    before = model(x)
    hotswap_adapter(model, tmp_path, "two")
    torch.testing.assert_close(model(x), before)
    model.set_adapter("two")
    torch.testing.assert_close(model(x), PeftModel.from_pretrained(base("mlp"), tmp_path)(x))


def test_a_merged_adapter_comes_out_first(tmp_path):
    saved(tmp_path, "mlp", 2)
    model, x = adapted("mlp", 1), inputs("mlp")
    model.merge_adapter()
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), PeftModel.from_pretrained(base("mlp"), tmp_path)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config_cls", [IA3Config, HiraConfig, OFTConfig])
def test_other_methods_swap_where_shapes_agree(tmp_path, config_cls):
    options = {
        IA3Config: {"feedforward_modules": ["lin1"], "init_ia3_weights": False},
        HiraConfig: {"r": 3, "init_weights": False},
        OFTConfig: {"oft_block_size": 2, "init_weights": False},
    }[config_cls]

    def make(seed):
        model = base("mlp")
        torch.manual_seed(seed)
        return get_peft_model(model, config_cls(target_modules=["lin0", "lin1"], **options)).eval()

    other, model, x = make(2), make(1), inputs("mlp")
    other.save_pretrained(tmp_path)
    assert not torch.allclose(model(x), other(x), atol=1e-3)
    prepare_model_for_compiled_hotswap(model)
    before = snapshot(model)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), other(x))
    assert {n: i for n, (i, _) in snapshot(model).items()} == {n: i for n, (i, _) in before.items()}


def test_embedding_and_head_of_a_language_model(tmp_path):
    def make(seed, rank):
        torch.manual_seed(0)
        model = tiny_llama(tie=True).eval()
        torch.manual_seed(seed)
        targets = ["embed_tokens", "q_proj", "down_proj"]
        return get_peft_model(
            model, LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, ensure_weight_tying=True)
        ).eval()

    model, other, ids = make(1, 4), make(2, 3), torch.arange(12).view(2, 6)
    other.save_pretrained(tmp_path)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)


# ---- Plain models, names of compiled models ---------------------------------------------------------------------


def test_plain_model_with_injected_adapter():
    from peft import inject_adapter_in_model

    torch.manual_seed(1)
    config = LoraConfig(**RATES, **TARGETS["mlp"])
    model, x = inject_adapter_in_model(config, base("mlp")), inputs("mlp")
    other = adapted("mlp", 2, r=2)
    tensors = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(other).items()}
    hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    torch.testing.assert_close(model(x), other(x))
    assert model.peft_config["default"].r == 2


class Eager:
    """A torch.compile backend that runs the captured graph as it is and counts the graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("toy", ["mlp", "sequence"])
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_model_is_not_compiled_again(tmp_path, toy, whole):
    folders = [saved(tmp_path / str(rank), toy, rank, r=rank, lora_alpha=3 * rank + 1) for rank in (2, 7)]
    model, x = adapted(toy, 1), inputs(toy)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    backend = Eager()
    if whole:
        compiled = torch.compile(model, backend=backend)
    else:
        inner = model.base_model.model
        inner.lin0 = inner.lin = torch.compile(inner.lin0 if toy == "mlp" else inner.lin, backend=backend)
        if toy == "mlp":
            del inner.lin
        else:
            del inner.lin0
        compiled = model
    first = compiled(x)
    graphs = backend.graphs
    assert graphs
    for folder in folders:
        hotswap_adapter(compiled, folder, "default")
        swapped = compiled(x)
        torch.testing.assert_close(swapped, PeftModel.from_pretrained(base(toy), folder)(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(swapped, first, atol=1e-3)
    assert backend.graphs == graphs


def test_without_preparation_another_scale_compiles_again(tmp_path):
    """The test above can fail: this is what it would see."""
    saved(tmp_path, "mlp", 2, lora_alpha=31)
    model, x = adapted("mlp", 1), inputs("mlp")
    torch._dynamo.reset()
    backend = Eager()
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    graphs = backend.graphs
    hotswap_adapter(compiled, tmp_path, "default")
    compiled(x)
    assert backend.graphs > graphs


def test_an_optimizer_goes_on_with_the_same_parameters(tmp_path):
    saved(tmp_path, "mlp", 2)
    model, x = adapted("mlp", 1), inputs("mlp")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    hotswap_adapter(model, tmp_path, "default")
    before = model(x)
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.allclose(model(x), before)


def test_training_after_preparation_keeps_the_padding_empty():
    model, x = adapted("mlp", 1), inputs("mlp")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    layer = model.base_model.model.lin0
    assert not layer.lora_A["default"].weight[4:].any()
    assert not layer.lora_B["default"].weight[:, 4:].any()
    assert layer.lora_A["default"].weight.shape == (6, 6)


# ---- Files after padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TARGETS)
def test_a_padded_adapter_is_saved_at_its_own_rank(tmp_path, toy):
    model, x = adapted(toy, 1), inputs(toy)
    shapes = {name: t.shape for name, t in get_peft_model_state_dict(model).items()}
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert {name: t.shape for name, t in get_peft_model_state_dict(model).items()} == shapes
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(toy), tmp_path)(x), model(x))


# ---- Errors ---------------------------------------------------------------------------------------------------------


def attempt(model, tensors, config, match, name="default"):
    before, old = snapshot(model), copy.deepcopy(model.peft_config.get(name))
    scales = [layer.scaling.copy() for layer in model.modules() if hasattr(layer, "lora_A") and layer.scaling]
    with pytest.raises(ValueError, match=match):
        hotswap_adapter_from_state_dict(model, tensors, name, config)
    assert_unchanged(model, before)
    assert model.peft_config.get(name) == old
    assert scales == [layer.scaling for layer in model.modules() if hasattr(layer, "lora_A") and layer.scaling]


def test_unknown_and_missing_and_misshapen_tensors_change_nothing():
    model, other = adapted("mlp", 1), adapted("mlp", 2)
    config, tensors = other.peft_config["default"], get_peft_model_state_dict(other)
    prefix = "base_model.model.lin0."
    attempt(model, {**tensors, "x.lora_A.weight": torch.ones(4, 6)}, config, "unexpected keys found: x.lora_A.weight")
    half = {name: t for name, t in tensors.items() if name != f"{prefix}lora_B.weight"}
    attempt(model, half, config, "'lin0' has only one of its two factors")
    wide = {**tensors, f"{prefix}lora_A.weight": torch.ones(4, 7)}
    attempt(model, wide, config, r"size mismatch for base_model.model.lin0.lora_A.*\[4, 7\].*\[4, 6\]")
    attempt(
        model,
        {**tensors, f"{prefix}lora_B.weight": torch.ones(8, 3)},
        config,
        r"size mismatch for base_model.model.lin0.lora_B.*\[8, 3\]",
    )
    attempt(model, tensors, config, "'zz' not found.*'default'", name="zz")


def test_missing_trained_module_changes_nothing():
    model = adapted("mlp", 1, target_modules=["lin0"], modules_to_save=["lin1"])
    other = adapted("mlp", 2, target_modules=["lin0"])
    attempt(model, get_peft_model_state_dict(other), other.peft_config["default"], "missing keys: .*lin1")


def test_an_adapter_that_stands_on_another_base_weight_is_refused():
    """PiSSA's file means its tensors on what its start has left of the base weight."""
    pissa = adapted("mlp", 1, init_lora_weights="pissa")
    same = adapted("mlp", 2, init_lora_weights="pissa")
    for p in same.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    hotswap_adapter_from_state_dict(pissa, get_peft_model_state_dict(same), "default", same.peft_config["default"])
    assert torch.equal(pissa(inputs("mlp")), same(inputs("mlp")))
    for other in (adapted("mlp", 2), adapted("mlp", 2, init_lora_weights="pissa", r=3, lora_alpha=6)):
        for new, old in ((pissa, other), (other, pissa)):
            state, config = get_peft_model_state_dict(new), new.peft_config["default"]
            attempt(old, state, config, "path_initial_model_for_weight_conversion")


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_rslora", True), ("lora_dropout", 0.1), ("alpha_pattern", {"lin0": 3}), ("use_dora", True)],
)
def test_incompatible_configs(field, value):
    model, other = adapted("mlp", 1), adapted("mlp", 2)
    config = LoraConfig(**{**RATES, **TARGETS["mlp"], field: value})
    attempt(model, get_peft_model_state_dict(other), config, f"Configs are incompatible: for {field}")
    check_hotswap_configs_compatible(config, copy.deepcopy(config))


def test_configs_that_may_differ_and_methods_that_may_not():
    plain = LoraConfig(**TARGETS["mlp"])
    check_hotswap_configs_compatible(plain, LoraConfig(r=3, lora_alpha=2, target_modules=["x"], rank_pattern={"x": 5}))
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and IA3"):
        check_hotswap_configs_compatible(plain, IA3Config(target_modules=["x"]))
    check_hotswap_configs_compatible(IA3Config(target_modules=["x"]), IA3Config(target_modules=["y"]))
    with pytest.raises(ValueError, match="for oft_block_size, 2 != 4"):
        check_hotswap_configs_compatible(OFTConfig(oft_block_size=2), OFTConfig(oft_block_size=4))


def test_preparation_refuses_what_it_cannot_do():
    model = adapted("mlp", 1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="rank 4 in 'lin.', more than target_rank=3"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    assert_unchanged(model, before)
    compiled = torch.compile(model, backend=Eager())
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.raises(ValueError, match="check_compiled should be one of 'error', 'warn', or 'ignore', got 'foo'"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="foo")
    assert_unchanged(model, before)
    with pytest.warns(UserWarning, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=9, check_compiled="ignore")
    assert model.base_model.model.lin0.lora_A["default"].weight.shape[0] == 9
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(Mlp(), target_rank=8)
    with pytest.raises(ValueError, match="target_rank=7 does not divide over the 2 groups of 'grouped'"):
        prepare_model_for_compiled_hotswap(adapted("picture", 1), target_rank=7)


def test_given_config_is_widened_at_the_same_scale():
    config = LoraConfig(**RATES, target_modules=["lin0", "lin1"], rank_pattern={"lin1": 2})
    model, x = get_peft_model(base("mlp"), config), inputs("mlp")
    before = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=config)
    assert (config.r, config.rank_pattern) == (8, {"lin1": 8})
    assert (config.lora_alpha, config.alpha_pattern) == (12, {"lin1": 24})  # 6/4 and 6/2, times 8
    assert model.peft_config["default"].r == 4
    torch.testing.assert_close(model(x), before)
    wide = get_peft_model(base("mlp"), config)
    tensors = {name: p for name, p in model.state_dict().items() if "lora_" in name}
    wide.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(wide(x), before)


def test_scale_changes_still_work_after_preparation():
    model, x = adapted("mlp", 1), inputs("mlp")
    layers = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict) and isinstance(m, nn.Module)]
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = model(x)
    for layer in layers:
        layer.scale_layer(2.0)
    assert not torch.allclose(model(x), before, atol=1e-3)
    for layer in layers:
        layer.unscale_layer()
    torch.testing.assert_close(model(x), before)


def test_names_of_tensors_in_memory_are_understood() -> None:
    """diffusers passes the adapter's name in the keys, as they are in the model."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 4)))
    wanted = {name: torch.randn_like(t) for name, t in model.state_dict().items() if ".default." in name}
    hotswap_adapter_from_state_dict(model, wanted, "default", config)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in wanted.items())


# ---- Other methods --------------------------------------------------------------------------------------------------


def test_an_adapter_whose_file_is_smaller_than_its_tensors(tmp_path):
    """That each method can be swapped is a law; here the file says in another form what the tensors are."""

    def moved(seed):
        torch.manual_seed(0)
        targets = ["q_proj", "up_proj"]
        config = VBLoRAConfig(num_vectors=8, vector_length=8, target_modules=targets, save_only_topk_weights=True)
        model = get_peft_model(tiny_llama(), config).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape) * 0.3 if p.requires_grad else 0)
        return model

    ids = torch.tensor([[3, 14, 15, 9, 2, 6]])
    model, other = moved(1), moved(2)
    other.save_pretrained(tmp_path)
    before = {name: id(p) for name, p in model.named_parameters()}
    assert (model(ids).logits - other(ids).logits).abs().max() > 1e-4
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_new_values_of_an_adapter_act_in_mixed_batches_too():
    config = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(**config))
    model.add_adapter("other", LoraConfig(**config))
    x, rows = torch.randn(2, 4), ["default", "other"]
    with torch.no_grad():
        model.eval()(x, adapter_names=rows)  # which keeps the stack of both
        state = get_peft_model_state_dict(model, adapter_name="other")
        set_peft_model_state_dict(model, {name: 3 * value for name, value in state.items()}, "other")
        mixed = model(x, adapter_names=rows)
        model.set_adapter("other")
        torch.testing.assert_close(mixed[1:], model(x[1:]))
