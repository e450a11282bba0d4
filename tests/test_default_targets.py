"""What is adapted when `target_modules` is left out: the tables, and what a model's structure shows beyond them."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from toys import Mlp, tiny_llama
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers.initialization import no_init_weights

from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from peft.core.base.kinds import kind_of
from peft.core.model.roles import find_roles
from peft.core.model.targeting import matches, resolve_targets
from peft.core.model.walk import embeddings_of, layers_of, walk


# Which layers act as queries and values in an architecture, by the names that its authors gave them; and the layer
# that leads from the wide activations of the feed-forward block back, where there is one and it is linear.
KNOWN = {
    "q_proj v_proj | down_proj": "afmoe apertus arcee bailing_hybrid bitnet blt cohere cohere2 cwm dia diffllama doge "
    "ernie4_5 eurobert exaone4 gemma gemma2 gemma3_text glm glm4 glm4_moe granite helium "
    "hunyuan_v1 llama minicpm ministral3 mistral olmo olmo2 olmo3 qwen2 qwen3 seed_oss smollm3",
    "q_proj v_proj | fc2": "audio-spectrogram-transformer bart beit biogpt blenderbot blenderbot-small clip "
    "clip_vision_model clipseg deit dinov2 fsmt ijepa kosmos-2 m2m_100 marian mbart mvp opt pegasus "
    "pegasus_x phi plbart speech_to_text vit vit_mae vit_msn vivit whisper xglm",
    "q_proj v_proj attention | fc2": "siglip",
    "q_proj v_proj | output_dense": "data2vec-audio hubert sew speecht5 unispeech unispeech-sat wav2vec2 wavlm",
    "q_proj v_proj | c_proj": "gpt_neo starcoder2",
    "q_proj v_proj | fc_out": "gptj",
    "q_proj v_proj | w2": "lfm2",
    "q_proj v_proj | ": "gpt_oss granitemoe mixtral olmoe phimoe qwen3_moe timesfm vits",
    "query value | output.dense": "bert bert-generation big_bird camembert convbert data2vec-text data2vec-vision dpt "
    "electra ernie layoutlm layoutlmv3 markuplm megatron-bert mra nystromformer rembert roberta roformer splinter "
    "tapas videomae visual_bert xlm-roberta yolos yoso",
    "query value | ffn_output": "albert",
    "query value | ": "squeezebert",
    "query value value_global query_global | output.dense": "longformer",
    "query_proj value_proj | output.dense": "deberta-v2",
    "query_proj value_proj | output": "prophetnet",
    "in_proj | output.dense": "deberta",
    "q v | wo": "longt5 mt5 switch_transformers t5 udop umt5",
    "q v | output.dense": "mpnet",
    "q_lin v_lin | lin2": "distilbert flaubert xlm",
    "linear_q linear_v | output_dense": "wav2vec2-bert wav2vec2-conformer",
    "project_q project_v | w_out": "cpmant",
    "projection_query projection_value | output.dense": "cvt",
    "query_key_value | dense_4h_to_h": "bloom falcon fuyu gpt_neox gpt_neox_japanese persimmon",
    "c_attn | c_proj": "gpt2 gpt_bigcode imagegpt openai-gpt decision_transformer",
    "qkv_proj | fc_out": "codegen",
    "qkv_proj | down_proj": "phi3",
    "Wqkv | Wo": "modernbert",
    "Wqkv | down_proj": "mpt",
    "qkv | lin2": "sam_vision_model",
    "qkv | fc2": "hiera vitdet",
    "att_proj | out_proj": "bark",
    "q_b_proj kv_b_proj | ": "deepseek_v2 deepseek_v3 minicpm3",
    "Wq Wv | 2": "ctrl",
}
ARCHITECTURES = {
    name: tuple(set(part.split()) for part in names.split("|"))
    for names, architectures in KNOWN.items()
    for name in architectures.split()
    if name in CONFIG_MAPPING
}

COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
COUNTS += ("num_encoder_layers", "num_decoder_layers", "num_experts", "n_routed_experts", "num_local_experts")


def shrunk(config: PreTrainedConfig, depth: int = 0) -> PreTrainedConfig:
    """The config with two layers, and two experts, where it says how many there are."""
    for name in COUNTS:
        if isinstance(value := getattr(config, name, None), int) and value > 2:
            with suppress(NotImplementedError):  # a sum of two others
                setattr(config, name, 2)
    if isinstance(vars(config).get("layer_types"), list):
        config.layer_types = config.layer_types[:2]
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig) and depth < 2:
            shrunk(part, depth + 1)
    return config


def build(model_type: str) -> nn.Module:
    """A model without memory, as wide as its authors made it, of two layers."""
    with torch.device("meta"), no_init_weights():
        return AutoModel.from_config(shrunk(CONFIG_MAPPING[model_type]()))


def _named(found: list[str], names: set[str]) -> bool:
    """Whether the layers found are called by these names, and each name is that of some."""
    return all(matches(names, key) for key in found) and all(any(matches([n], key) for key in found) for n in names)


def test_enough_architectures_are_known() -> None:
    assert len(ARCHITECTURES) > 120, sorted(ARCHITECTURES)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_projections_and_feedforward_layers_are_found_by_structure(model_type: str) -> None:
    """No table is asked: what the structure shows is what the authors named so, in every block."""
    model = build(model_type)
    for roles, part in (("query", "value"), 0), (("feedforward",), 1):
        found = find_roles(model, roles)
        rows = [ARCHITECTURES[model_type], *ARCHITECTURES.values()]  # a release may rename an architecture's layers
        assert any(_named(found, row[part]) for row in rows), found
    for key in find_roles(model, ("query", "key", "value", "feedforward")):
        module = model.get_submodule(key)
        assert kind_of(module) is not None and module not in embeddings_of(model)


@pytest.mark.parametrize(
    "model_type", ["llama", "bert", "glm4", "distilbert", "t5", "vit", "phi3", "whisper", "cohere"]
)
def test_the_defaults_adapt_a_model(model_type: str) -> None:
    for config, roles in (
        (LoraConfig(r=2), ("query", "value")),
        (IA3Config(), ("key", "value", "feedforward")),
        (LNTuningConfig(), ("norm",)),
    ):
        model = build(model_type)
        known = model_type in ("llama", "bert", "t5")  # which have rows in the tables
        wanted = find_roles(model, roles)
        adapted = [
            path.removesuffix(".base_layer") for path, _ in layers_of(get_peft_model(model, config).base_model.model)
        ]
        assert adapted and (known or sorted(adapted) == sorted(wanted))
        assert not any(layer.get_base_layer() in embeddings_of(model) for _, layer in layers_of(model))


@pytest.mark.parametrize(
    "model_type, names",
    [
        ("llama", {"q_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("bert", {"query", "value"}),
        ("roberta", {"query", "value"}),
    ],
)
def test_the_tables_come_first(model_type: str, names: set[str]) -> None:
    config = LoraConfig(r=2)
    get_peft_model(build(model_type), config)
    assert config.target_modules == names


def test_structure_where_the_table_names_nothing() -> None:
    config = LoraConfig(r=2)
    resolve_targets(config, tiny_llama(), {"llama": ["query_key_value"]}, None)
    assert config.target_modules == {"q_proj", "v_proj"}


def test_a_feedforward_layer_of_ia3_scales_its_input() -> None:
    config = IA3Config()
    model = get_peft_model(build("glm4"), config)
    assert config.feedforward_modules == {"down_proj"} and config.target_modules == {"k_proj", "v_proj", "down_proj"}
    for path, layer in layers_of(model.base_model.model):
        assert layer.is_feedforward == path.endswith("down_proj")


def test_short_names_mean_nothing_else() -> None:
    """BERT calls the attention's output `output.dense` as well as the block's; a name has to tell them apart."""
    model = build("bert")
    config = IA3Config()
    model.config.model_type = "unheard-of"
    model = get_peft_model(model, config)
    dense = {name for name in config.target_modules if name.endswith("dense")}
    assert len(dense) == 2 and not any("attention" in name for name in dense)


class TestNothingFound:
    """The error says what linear layers there are, and how to name them."""

    def refusal(self, model: nn.Module, config: Any) -> str:
        before = [type(site.module) for site in walk(model)]
        with pytest.raises(ValueError) as caught:
            get_peft_model(model, config)
        assert [type(site.module) for site in walk(model)] == before
        return str(caught.value)

    def test_a_state_space_model(self) -> None:
        message = self.refusal(build("mamba"), LoraConfig(r=2))
        for word in (
            "MambaModel",
            "'mamba'",
            "query, value",
            "in_proj",
            "x_proj",
            "out_proj",
            "target_modules",
            "regex",
        ):
            assert word in message
        assert "all-linear" in message

    def test_a_plain_module(self) -> None:
        message = self.refusal(Mlp(), LoraConfig(r=2))
        assert "Mlp" in message and "lin0, lin1" in message and "query, value" in message

    def test_no_linear_layer_at_all(self) -> None:
        message = self.refusal(nn.Sequential(nn.Conv1d(3, 4, 1)), LoraConfig(r=2))
        assert "no linear layers" in message and "0 (Conv1d)" in message

    def test_following_the_advice_works(self) -> None:
        config = dataclasses.replace(LoraConfig(r=2), target_modules=["in_proj", "x_proj"])
        assert len(list(layers_of(get_peft_model(build("mamba"), config).base_model.model))) == 4
