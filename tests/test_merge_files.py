"""Adapters merged into files, layer by layer, give what they give in memory: for every method and way of combining."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from laws import methods
from test_convert import Peak
from transformers import LlamaConfig, LlamaForCausalLM

from peft import IA3Config, LoraConfig, PeftModel, TrainableTokensConfig, convert_to_lora, get_peft_model
from peft.combining import WAYS, CombinationType
from peft.core.families import Copy
from peft.core.files.io import write_adapter
from peft.testing.cells import Method, perturb
from peft.tools.merging import merge_files
from peft.utils.error import ConfigError


WEIGHTS = [0.7, -0.4]
EVERY = [method for method in methods() if not method.switch]
TARGETS = {"trainable_tokens": ["embed_tokens"], "ln_tuning": ["input_layernorm"], "beft": ["q_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A llama of one layer whose attention has biases."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True}
    folder = tmp_path_factory.mktemp("merge") / "base"
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def opened(base: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base)


def saved(base: Path, folder: Path, *configs: Any) -> dict[str, str]:
    """Adapters of random numbers in folders, by name."""
    for place, config in enumerate(configs):
        name = "ab"[place]
        model = get_peft_model(opened(base), config, name)
        perturb(model, name, place + 1)
        model.save_pretrained(folder)
    return {name: str(folder / name) for name in "ab"[: len(configs)]}


def of_method(base: Path, folder: Path, method: Method) -> dict[str, str]:
    fields = (
        {"target_modules": TARGETS.get(method.name, ["q_proj", "gate_proj"])} if method.has("target_modules") else {}
    )
    if method.name == "ia3":
        fields["feedforward_modules"] = []
    second = method.given | dict(method.second)
    return saved(base, folder, *(method.config_cls(**given, **fields) for given in (method.given, second)))


def both(base: Path, adapters: dict[str, str]) -> Any:
    model = PeftModel.from_pretrained(opened(base), adapters["a"], "a")
    model.load_adapter(adapters["b"], "b")
    return model


def arguments(way: str) -> dict[str, Any]:
    """All that a way of combining uses, none of it as it is by default."""
    given = {"density": 0.6} if WAYS[way].pruning else {}
    return given | ({"majority_sign_method": "frequency"} if WAYS[way].election else {})


def assert_same(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = LlamaForCausalLM.from_pretrained(folder).state_dict()
    for name, value in wanted.items():
        if name not in found and name.endswith("bias"):  # a LoRA has a bias in all its layers or in none
            assert not value.any()
            continue
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=name)


OTHERS = [method for method in EVERY if method.name != "lora"]
ONE_OF_THEM = [[*WAYS][place % len(WAYS)] for place, _ in enumerate(OTHERS)]
"""A way for each method, which together are all, thrice."""


def test_all_ways_are_met() -> None:
    assert {*get_args(CombinationType)} == {*WAYS} == {*ONE_OF_THEM}


@pytest.mark.parametrize(("method", "way"), zip(OTHERS, ONE_OF_THEM), ids=[method.name for method in OTHERS])
def test_updates_of_a_method_are_combined_as_in_memory(method: Method, way: Any, base: Path, tmp_path: Path) -> None:
    adapters = of_method(base, tmp_path, method)
    given: Any = {"weights": WEIGHTS, **arguments(way)}
    if method.by_sample or method.waits or method.is_a(Copy):
        with pytest.raises(ValueError, match="no one weight equals it|whole modules"):
            merge_files(base, adapters, tmp_path / "out", combination=way, **given)
        assert not (tmp_path / "out").exists()
        return
    model = both(base, adapters)
    torch.manual_seed(3)
    config, tensors = convert_to_lora(model, 1.0, ["a", "b"], combination_type=way, **given)
    write_adapter(tmp_path / "lora", tensors, config)
    wanted = PeftModel.from_pretrained(opened(base), tmp_path / "lora").merge_and_unload().state_dict()
    torch.manual_seed(3)
    report = merge_files(base, adapters, tmp_path / "out", combination=way, **given)
    assert report.in_memory is None and report.changed
    assert_same(tmp_path / "out", wanted)


@pytest.mark.parametrize("way", WAYS)
def test_loras_are_combined_as_in_memory(way: Any, base: Path, tmp_path: Path) -> None:
    fields: Any = {"target_modules": ["q_proj", "gate_proj"], "lora_alpha": 3}
    other = 3 if WAYS[way].dense or way == "cat" else 2  # factors add up where ranks are the same
    adapters = saved(base, tmp_path, LoraConfig(r=2, **fields), LoraConfig(r=other, **fields))
    given = arguments(way) | ({"svd_rank": 4, "svd_clamp": 0.9} if WAYS[way].dense else {})
    model = both(base, adapters)
    torch.manual_seed(3)
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", combination_type=way, **given)
    model.set_adapter("c")
    torch.manual_seed(3)
    merge_files(base, adapters, tmp_path / "out", weights=WEIGHTS, combination=way, **given)
    assert_same(tmp_path / "out", model.merge_and_unload().state_dict())


def test_what_has_no_effect_is_said(base: Path, tmp_path: Path) -> None:
    fields: Any = {"target_modules": ["q_proj"]}
    adapters = saved(base, tmp_path / "lora", *[LoraConfig(**fields)] * 2)
    others = saved(base, tmp_path / "ia3", *[IA3Config(**fields, feedforward_modules=[])] * 2)

    def refused(adapters: dict[str, str], match: str, **given: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            merge_files(base, adapters, tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    for each in (adapters, others):
        refused(each, "density=0.5 has no effect on 'cat'; magnitude_prune, ", density=0.5)
        vote: Any = {"density": 0.5, "majority_sign_method": "frequency"}
        refused(
            each, "majority_sign_method='frequency' has no effect on 'dare_linear'", combination="dare_linear", **vote
        )
        refused(each, "svd_rank=3 has no effect on 'linear'", combination="linear", svd_rank=3)
    refused(others, "svd_clamp is of a LoRA's A and B", combination="svd", svd_clamp=0.5)
    with pytest.warns(UserWarning, match="density=0.5 has no effect on 'svd'"):
        both(base, adapters).add_weighted_adapter(["a", "b"], WEIGHTS, "c", density=0.5)
    with pytest.warns(UserWarning, match="majority_sign_method='frequency' has no effect on 'svd'"):
        convert_to_lora(both(base, others), 2, "a", majority_sign_method="frequency")
    with pytest.raises(TypeError):
        merge_files(base, others, tmp_path / "out", combination="svd", densities=0.5)
    with pytest.raises(ConfigError, match="holds an adapter. The base model comes first"):
        merge_files(adapters["a"], {"a": str(base)}, tmp_path / "out")


def test_what_files_cannot_hold_is_combined_in_memory(base: Path, tmp_path: Path) -> None:
    """Biases that the architecture gets by merging, and the draws of a combination, which are the same."""
    (beft,) = (method for method in EVERY if method.name == "beft")
    fields: Any = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    adapters = saved(base, tmp_path, *(beft.config_cls(**beft.given, **fields) for _ in range(2)))
    model = both(base, adapters)
    given: Any = {"weights": WEIGHTS, **arguments("dare_ties")}
    torch.manual_seed(3)
    config, tensors = convert_to_lora(model, 1.0, ["a", "b"], combination_type="dare_ties", **given)
    torch.manual_seed(3)
    report = merge_files(base, adapters, tmp_path / "out", combination="dare_ties", **given)
    assert "bias" in str(report.in_memory)
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj.bias
    torch.testing.assert_close(found, tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.bias"])


def test_methods_whose_tensors_do_not_add_up_have_an_exact_sum_in_files(base: Path, tmp_path: Path) -> None:
    (loha,) = (method for method in EVERY if method.name == "loha")
    adapters = of_method(base, tmp_path, loha)
    model, plain = both(base, adapters), opened(base)
    merge_files(base, adapters, tmp_path / "out", weights=WEIGHTS)
    wanted = plain.model.layers[0].self_attn.q_proj.weight.detach().clone()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wanted += sum(weight * layer.get_delta_weight(name) for name, weight in zip("ab", WEIGHTS))
    torch.testing.assert_close(opened(tmp_path / "out").model.layers[0].self_attn.q_proj.weight, wanted)


def test_what_one_adapter_trains_beside_its_layers_comes_along(base: Path, tmp_path: Path) -> None:
    """A head of its own in one of two; two heads are refused, and so are two that train the same tokens."""
    plain: Any = {"target_modules": ["q_proj"], "feedforward_modules": []}
    head = IA3Config(**plain, modules_to_save=["lm_head"])
    adapters = saved(base, tmp_path / "one", IA3Config(**plain), head)
    merge_files(base, adapters, tmp_path / "out", combination="ties", density=0.5)
    model = both(base, adapters)
    trained = model.base_model.model.lm_head.modules_to_save["b"].weight
    assert torch.equal(opened(tmp_path / "out").lm_head.weight, trained)
    with pytest.raises(ValueError, match="own version of the module 'lm_head'"):
        merge_files(base, saved(base, tmp_path / "two", head, head), tmp_path / "x", combination="svd")
    assert not (tmp_path / "x").exists()
    tokens = saved(base, tmp_path / "tokens", *[TrainableTokensConfig(token_indices=[1, 2])] * 2)
    merge_files(base, tokens, tmp_path / "summed", weights=WEIGHTS)
    model = both(base, tokens)
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "c")
    model.set_adapter("c")
    assert_same(tmp_path / "summed", model.merge_and_unload().state_dict())


def test_a_combination_holds_a_layer_at_a_time_however_many_there_are(tmp_path: Path) -> None:
    """The most bytes of tensors at a time, in matrices of the largest layer."""
    peaks = []
    for layers in (1, 5):
        sizes = {"vocab_size": 13, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        folder = tmp_path / str(layers)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder / "base", max_shard_size="100KB")
        config = IA3Config(target_modules=["down_proj"], feedforward_modules=[])
        adapters = saved(folder / "base", folder, *[config] * 2)
        with Peak() as peak:
            merge_files(folder / "base", adapters, folder / "out", combination="ties", density=0.5)
        peaks.append(peak.most / (64 * 256 * 4))
    assert peaks[0] < 15 and abs(peaks[1] - peaks[0]) < 1, peaks
