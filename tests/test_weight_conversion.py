"""Adapters through transformers' own `load_adapter`, and those made for experts that are one parameter now."""

import copy

import pytest
import torch
from laws import VARIANTS, methods
from safetensors.torch import save_file
from toys import tiny_llama
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from peft import (
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_base_model_state_dict,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.experts import convert_config_for
from peft.utils.transformers_weight_conversion import (
    FlattenDims,
    PeftConcatenate,
    PermuteDims,
    build_peft_weight_mapping,
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)


IDS = torch.arange(10)[None]
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=3)).eval()


def qwen():
    """Experts, and a dense expert beside them whose modules have the same names."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES,
            intermediate_size=20,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=20,
            num_experts=3,
            num_experts_per_tok=2,
        )
    ).eval()


# Name in the model of old -> where the weight is now: (path, expert axis?, rows).
PLACES = {
    mixtral: {
        "block_sparse_moe.experts.{e}.w1": ("mlp.experts.gate_up_proj", slice(0, 24)),
        "block_sparse_moe.experts.{e}.w3": ("mlp.experts.gate_up_proj", slice(24, 48)),
        "block_sparse_moe.experts.{e}.w2": ("mlp.experts.down_proj", slice(None)),
        "block_sparse_moe.gate": ("mlp.gate.weight", slice(None)),
        "self_attn.q_proj": ("self_attn.q_proj.weight", slice(None)),
    },
    qwen: {
        "mlp.experts.{e}.gate_proj": ("mlp.experts.gate_up_proj", slice(0, 24)),
        "mlp.experts.{e}.up_proj": ("mlp.experts.gate_up_proj", slice(24, 48)),
        "mlp.experts.{e}.down_proj": ("mlp.experts.down_proj", slice(None)),
        "mlp.shared_expert.gate_proj": ("mlp.shared_expert.gate_proj.weight", slice(None)),
        "mlp.shared_expert.up_proj": ("mlp.shared_expert.up_proj.weight", slice(None)),
        "mlp.shared_expert.down_proj": ("mlp.shared_expert.down_proj.weight", slice(None)),
    },
}


def old_adapter(build, base, targets, scale, ranks=4):
    """An adapter as it was made for modules: (its tensors, the base model with it merged by hand)."""
    merged, tensors = copy.deepcopy(base), {}
    for number, layer in enumerate(merged.model.layers):
        for name, (path, rows) in PLACES[build].items():
            if name.rpartition(".")[2] not in targets:
                continue
            weight = layer.get_parameter(path)
            for e in range(3) if "{e}" in name else [None]:
                part = (weight if e is None else weight[e])[rows]
                rank = ranks if isinstance(ranks, int) else ranks[name.rpartition(".")[2]]
                a, b = torch.randn(rank, part.shape[1]), torch.randn(part.shape[0], rank)
                key = f"base_model.model.model.layers.{number}.{name.format(e=e)}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
                with torch.no_grad():
                    part += scale * b @ a
    return tensors, merged


CASES = [
    (mixtral, ["w1", "w2", "w3"]),
    (mixtral, ["w1", "w3", "q_proj"]),
    (mixtral, ["w2", "gate"]),
    (mixtral, ["w1", "w2", "w3", "gate", "q_proj"]),
    (qwen, ["gate_proj", "up_proj", "down_proj"]),
    (qwen, ["down_proj"]),
]


@pytest.mark.parametrize("build, targets", CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_modules_act_on_the_stacked_parameters(tmp_path, build, targets, rslora):
    base = build()
    tensors, merged = old_adapter(build, base, targets, scale=6 / (4**0.5 if rslora else 4))
    want, plain = merged(IDS).logits, base(IDS).logits
    assert (want - plain).abs().max() > 1e-2
    options = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": targets}
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(**options, lora_dropout=0.1).save_pretrained(tmp_path)
    info = base.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    torch.testing.assert_close(base(IDS).logits, want, rtol=1e-4, atol=1e-5)

    base.save_pretrained(tmp_path / "again")
    fresh = build()
    fresh.load_state_dict(state)
    fresh.load_adapter(str(tmp_path / "again"))
    torch.testing.assert_close(fresh(IDS).logits, want, rtol=1e-4, atol=1e-5)

    config, fresh = LoraConfig(**options), build()
    fresh.load_state_dict(state)
    model = get_peft_model(fresh, config).eval()
    converted = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
    assert set_peft_model_state_dict(model, converted) == ([], [])
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_a_peft_model_of_experts_is_saved_and_loaded(tmp_path):
    base = mixtral()
    tensors, merged = old_adapter(mixtral, base, ["w1", "w2", "w3", "gate"], scale=2)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(r=4, target_modules=["w1", "w2", "w3", "gate"], lora_dropout=0.05, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert again.load_adapter(tmp_path, "old") == ([], [])
    torch.testing.assert_close(again(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-5)
    again.set_adapter("old")
    torch.testing.assert_close(again(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-5)


def test_modules_of_different_ranks():
    base = mixtral()
    ranks = {"w1": 2, "w3": 4, "w2": 4}
    tensors, merged = old_adapter(mixtral, base, list(ranks), scale=2.0, ranks=ranks)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(ranks), rank_pattern={"w1": 2}, alpha_pattern={"w1": 4})
    model = get_peft_model(base, config).eval()
    set_peft_model_state_dict(model, convert_peft_adapter_state_dict_for_transformers(base, config, tensors))
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-5)
    config = LoraConfig(r=4, target_modules=list(ranks), alpha_pattern={"w1": 3})
    with pytest.raises(ValueError, match="different scales"):
        convert_config_for(mixtral(), config)


def test_a_config_for_experts():
    config = LoraConfig(r=4, target_modules=["w1", "w2", "w3", "gate", "q_proj"])
    model = mixtral()
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    assert config.target_modules == {"q_proj"}
    assert config.target_parameters == ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
    once = config.to_dict()
    convert_config_for(model, config)
    assert config.to_dict() == once
    layers = get_peft_model(model, config).base_model.model.model.layers
    experts = layers[0].mlp.experts
    assert experts.lora_A["default"].weight.shape == (3 * 4, 24)
    assert experts.base_layer.lora_A["default"].weight.shape == (3 * 8, 16)
    assert experts.base_layer.lora_B["default"].weight.shape == (48, 8 * 3)
    assert experts.scaling["default"] == experts.base_layer.scaling["default"] == 2


def test_names_beside_the_experts_stay_targets():
    config = LoraConfig(target_modules=["gate_proj", "up_proj"])
    convert_config_for(qwen(), config)
    assert config.target_modules == {"gate_proj", "up_proj"}
    assert config.target_parameters == ["mlp.experts.gate_up_proj"]


def test_all_linear_layers_include_the_experts():
    config = LoraConfig(target_modules="all-linear")
    convert_config_for(mixtral(), config)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert config.target_parameters == ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
    other = IA3Config(target_modules="all-linear", feedforward_modules=["o_proj"])
    get_peft_model(mixtral(), other)
    assert other.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_regexes_and_some_layers():
    config = LoraConfig(target_modules=r".*\.1\.(mlp\.experts\.\d+\.w[123]|self_attn\.q_proj)")
    convert_config_for(mixtral(), config)
    assert config.target_parameters == [f"model.layers.1.mlp.experts.{n}" for n in ("down_proj", "gate_up_proj")]
    model = get_peft_model(mixtral(), config)
    names = {name.split(".lora")[0] for name, p in model.named_parameters() if p.requires_grad}
    start = "base_model.model.model.layers.1."
    assert names == {start + n for n in ("self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer")}
    config = LoraConfig(target_modules=["w2"], layers_to_transform=[0])
    convert_config_for(mixtral(), config)
    assert config.target_parameters == ["model.layers.0.mlp.experts.down_proj"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["w1"]}, "mean w1 of the experts.*Target also w3"),
        ({"target_modules": ["experts.0.w2"]}, "all 3 experts in one parameter"),
        ({"target_modules": ["w2"], "lora_dropout": 0.1}, "lora_dropout=0.1 does not work with parameters"),
        ({"target_modules": ["w2"], "use_dora": True}, "use_dora=True does not work with parameters"),
    ],
)
def test_what_cannot_be_stacked_is_refused(options, message):
    model = mixtral()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**options))
    assert set(model.state_dict()) == before


def test_other_methods_cannot_adapt_experts():
    with pytest.raises(ValueError, match="only LoRA can adapt that"):
        get_peft_model(mixtral(), IA3Config(target_modules=["w2", "q_proj"], feedforward_modules=["w2"]))


def test_files_with_some_experts_are_refused():
    base = mixtral()
    tensors, _ = old_adapter(mixtral, base, ["w2"], scale=1)
    config = LoraConfig(r=4, target_modules=["w2"])
    inject_adapter_in_model(config, base)
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.2.w2.lora_B.weight"]
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.2.w2' are missing"):
        convert_peft_adapter_state_dict_for_transformers(base, config, tensors)


def test_files_without_experts_pass_through():
    config, tensors = LoraConfig(), {"base_model.model.x.lora_A.weight": torch.ones(1)}
    assert convert_peft_adapter_state_dict_for_transformers(tiny_llama(), config, tensors) is tensors
    assert convert_peft_adapter_state_dict_for_transformers(mixtral(), config, tensors) is tensors


def test_stacks_of_another_make_are_refused_when_targeted():
    unknown = WeightConverter(
        source_patterns=["mlp.experts.*.up_proj.weight"],
        target_patterns="mlp.experts.up_proj",
        operations=[MergeModulelist(dim=0), Transpose(1, 2)],
    )
    with pytest.raises(ValueError, match="no conversion of adapters is known"):
        build_peft_weight_mapping([unknown], "default", LoraConfig(target_modules=["up_proj"]))
    mapping = build_peft_weight_mapping([unknown], "default", LoraConfig(target_modules=["q_proj"]))
    assert not any(isinstance(entry, WeightConverter) for entry in mapping)
    build_peft_weight_mapping(None, "default", IA3Config())


def test_the_operations():
    a, b = torch.randn(3, 4, 2), torch.randn(3, 5, 1)
    joined = PeftConcatenate(dim=1).convert({"b": b, "a": [a]}, source_patterns=["a", "b"], target_patterns=["t"])
    assert list(joined) == ["t"]
    torch.testing.assert_close(joined["t"], torch.stack([torch.block_diag(a[e], b[e]) for e in range(3)]))
    assert isinstance(PeftConcatenate(), Concatenate)
    torch.testing.assert_close(FlattenDims((0, 1)).convert({"a": a})["a"], a.reshape(12, 2))
    torch.testing.assert_close(FlattenDims(1).convert({"a": a})["a"], a.reshape(3, 8))
    turned = PermuteDims((2, 0, 1)).convert({"a": [a]})["a"]
    assert turned.is_contiguous()
    torch.testing.assert_close(turned, a.permute(2, 0, 1))


# ---- transformers' methods on plain models --------------------------------------------------------------------------

METHODS = {
    "lora": LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
    "dora": LoraConfig(target_modules=["q_proj"], use_dora=True),
    "embedding": LoraConfig(target_modules=["embed_tokens"]),
    "tokens_beside": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "lora_bias": LoraConfig(target_modules=["q_proj"], lora_bias=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "hira": HiraConfig(r=2, target_modules=["q_proj"]),
    "ln_tuning": LNTuningConfig(target_modules=["norm"]),
    "tokens": TrainableTokensConfig(token_indices=[1, 3]),
    "vblora_topk": VBLoRAConfig(
        target_modules=["q_proj"], r=2, num_vectors=8, vector_length=8, save_only_topk_weights=True
    ),
}
METHODS |= {  # the others
    method.name: method.config_cls(**method.given, target_modules=["q_proj"])
    for method in methods()
    if method.name not in {*METHODS, "trainable_tokens", *VARIANTS}
}
REPEATED = {"adalora", "frod", "lily", "tinylora", "unilora", "vblora", "vblora_topk"}
"""Their layers share tensors, which transformers looks for at each layer, or make some again from the config."""


@pytest.mark.filterwarnings("ignore:lora_bias=True")
@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_and_saves_adapters(tmp_path, method):
    base = tiny_llama().eval()
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(METHODS[method])).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    want, plain = model(IDS).logits, base(IDS).logits
    assert (want - plain).abs().max() > 1e-6
    model.save_pretrained(tmp_path / "one")

    loaded = copy.deepcopy(base)
    info = loaded.load_adapter(str(tmp_path / "one"))
    assert not info.missing_keys or method in REPEATED
    assert not info.unexpected_keys
    torch.testing.assert_close(loaded(IDS).logits, want)
    # transformers itself leaves whole modules trainable
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if ".default" in n and "_to_save" not in n)
    loaded.disable_adapters()
    torch.testing.assert_close(loaded(IDS).logits, plain)
    loaded.enable_adapters()
    if method == "lora":  # transformers switches whole modules off, but not on again
        loaded.lm_head.enable_adapters(True)
    torch.testing.assert_close(loaded(IDS).logits, want)

    loaded.save_pretrained(tmp_path / "two")
    again = copy.deepcopy(base)
    again.load_adapter(str(tmp_path / "two"), adapter_name="other", is_trainable=True)
    assert again.active_adapters() == ["other"]
    assert any(p.requires_grad for n, p in again.named_parameters() if ".other" in n)
    torch.testing.assert_close(again.eval()(IDS).logits, want)  # what is new and trains is in training mode
    again.delete_adapter("other")
    torch.testing.assert_close(again(IDS).logits, plain)
    assert set(again.state_dict()) == set(base.state_dict())


def test_transformers_adds_adapters():
    model = tiny_llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    first = model(IDS).logits
    model.add_adapter(LoraConfig(target_modules=["v_proj"], init_lora_weights=False), adapter_name="other")
    assert model.active_adapters() == ["other"]
    assert (model(IDS).logits - first).abs().max() > 1e-4
    model.set_adapter("default")
    torch.testing.assert_close(model(IDS).logits, first)
    assert list(get_base_model_state_dict(model)) == list(tiny_llama().state_dict())


def test_transformers_adds_an_adapter_to_experts():
    model = mixtral()
    plain = model(IDS).logits
    model.add_adapter(LoraConfig(r=2, target_modules=["w1", "w2", "w3"]))
    torch.testing.assert_close(model(IDS).logits, plain)
    model(IDS).logits.sum().backward()
    graded = {n.split(".experts.")[1] for n, p in model.named_parameters() if p.grad is not None}
    assert graded == {f"{place}lora_{ab}.default.weight" for place in ("", "base_layer.") for ab in "AB"}
