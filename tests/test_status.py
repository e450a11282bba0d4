"""Records of a model's adapters, and counts of its parameters."""

import pytest
import torch
from torch import nn
from toys import Experts, Mlp, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftMixedModel,
    TrainableTokensConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.core.model.walk import layers_of
from peft.tools.status import count_parameters


def lora(**kwargs):
    return LoraConfig(**{"r": 2, "target_modules": ["lin0"], **kwargs})


@pytest.fixture
def model():
    """Two adapters on lin0; the first also trains lin1 whole."""
    model = get_peft_model(Mlp(), lora(modules_to_save=["lin1"]))
    model.add_adapter("other", lora(target_modules=["lin0", "lin1"]))
    return model


def test_layer_status_of_a_fresh_model(model):
    status = {s.name: s for s in get_layer_status(model)}
    assert list(status) == ["model.lin0", "model.lin1", "model.lin1.original_module"]
    first = status["model.lin0"]
    assert first.module_type == "lora.Linear"
    assert first.enabled is True
    assert first.active_adapters == ["default"]
    assert first.merged_adapters == []
    assert first.requires_grad == {"default": True, "other": False}
    assert first.available_adapters == ["default", "other"]
    assert first.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert first.quantization_backend is None
    assert status["model.lin1"].module_type == "ModulesToSaveWrapper"
    assert status["model.lin1"].available_adapters == ["default"]
    assert model.get_layer_status() == get_layer_status(model)


def test_model_status_of_a_fresh_model(model):
    status = get_model_status(model)
    trained = 2 * (6 + 8) + (8 * 4 + 4)
    frozen = (6 * 8 + 8) + 2 * 8 + (8 * 4 + 4) + 2 * (6 + 8) + 2 * (8 + 4)
    assert status.base_model_type == "Mlp"
    assert status.adapter_model_type == "LoraModel"
    assert status.peft_types == {"default": "LORA", "other": "LORA"}
    assert (status.trainable_params, status.total_params) == (trained, trained + frozen)
    assert status.num_adapter_layers == 3
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.quantization_backend is None
    assert model.get_model_status() == status


def test_status_follows_what_is_done_to_the_model(model):
    with model.disable_adapter():
        status = get_model_status(model)
        assert status.enabled is False
        assert status.trainable_params == 0
        assert status.requires_grad["default"] is False
    assert get_model_status(model).enabled is True
    model.set_adapter("other")
    status = get_model_status(model)
    assert status.active_adapters == ["other"]
    assert status.requires_grad == {"default": False, "other": True}
    assert {s.name: s.active_adapters for s in get_layer_status(model)}["model.lin1"] == []
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["other"]


def test_disagreement_is_irregular(model):
    (_, first), *_ = layers_of(model.get_base_model())
    first.merge(adapter_names=["other"])
    assert get_model_status(model).merged_adapters == "irregular"
    first.unmerge()
    first.enable_adapters(False)
    assert get_model_status(model).enabled == "irregular"
    first.enable_adapters(True)
    first.set_adapter("other")
    status = get_model_status(model)
    assert status.active_adapters == "irregular"
    assert status.requires_grad == {"default": "irregular", "other": "irregular"}
    first.lora_A["other"].weight.requires_grad_(False)
    assert get_layer_status(model)[0].requires_grad["other"] == "irregular"


def test_devices_of_an_adapter_that_is_not_loaded_yet():
    model = get_peft_model(Mlp(), lora())
    model.add_adapter("empty", lora(), low_cpu_mem_usage=True)
    assert get_model_status(model).devices == {"default": ["cpu"], "empty": ["meta"]}


def test_a_plain_model_with_injected_adapters():
    model = inject_adapter_in_model(lora(), Mlp())
    (layer,) = get_layer_status(model)
    status = get_model_status(model)
    assert layer.name == "lin0"
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("other", "None", {})
    assert status.trainable_params == 28
    assert get_model_status(inject_adapter_in_model(LoraConfig(), tiny_llama())).base_model_type == "LlamaForCausalLM"


def test_a_layer_names_what_is_switched_on_though_it_lacks_it(model):
    status = {s.name: s for s in get_layer_status(model)}["model.lin1.original_module"]
    assert status.active_adapters == ["default"] and status.available_adapters == ["other"]


@pytest.mark.parametrize(
    "config, name, module_type",
    [
        (LoraConfig(target_modules=["embed_tokens"]), "model.model.embed_tokens", "lora.Embedding"),
        (IA3Config(), "model.model.layers.0.self_attn.k_proj", "ia3.Linear"),
        (
            LNTuningConfig(target_modules=["norm"]),
            "model.model.norm",
            "ln_tuning.LNTuningLayer",
        ),
        (TrainableTokensConfig(token_indices=[1]), "model.model.embed_tokens", "TrainableTokensLayer"),
        (
            LoraConfig(trainable_token_indices=[1], target_modules=["q_proj"]),
            "model.model.embed_tokens.token_adapter",
            "TrainableTokensLayer",
        ),
    ],
)
def test_names_and_types(config, name, module_type):
    first = get_layer_status(get_peft_model(tiny_llama(), config))[0]
    assert (first.name, first.module_type) == (name, module_type)


def test_types_of_transposed_layers_and_parameters():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0))
    model = get_peft_model(gpt2, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert get_layer_status(model)[0].module_type == "lora.Linear"
    model = get_peft_model(Experts(), LoraConfig(target_parameters=["stack.up"]))
    assert get_layer_status(model)[0].module_type == "lora.ParamWrapper"


def test_a_mixed_model_names_its_methods():
    model = PeftMixedModel(Mlp(), lora())
    model.add_adapter("other", LoraConfig(r=3, target_modules=["lin1"]))
    status = get_model_status(model)
    assert status.peft_types == {"default": "LORA", "other": "LORA"}
    assert status.num_adapter_layers == 2


def test_a_model_without_adapters_is_refused():
    for function in (get_layer_status, get_model_status):
        with pytest.raises(ValueError, match="No adapter layers found in this Mlp"):
            function(Mlp())


def test_counts(capsys):
    model = get_peft_model(Mlp(), lora())
    assert count_parameters(model) == model.get_nb_trainable_parameters() == (28, 136)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 28 || all params: 136 || trainable%: 20.5882\n"


def test_packed_and_sharded_parameters_count_what_they_stand_for():
    class Params4bit(nn.Parameter):
        """Two weights in a byte, as bitsandbytes packs them."""

    class Model(nn.Module):
        def __init__(self, storage):
            super().__init__()
            packed = torch.zeros(6, dtype=torch.uint8) if storage == torch.uint8 else torch.zeros(3, dtype=storage)
            self.packed = Params4bit(packed, requires_grad=False)
            self.packed.quant_storage = storage
            self.sharded = nn.Parameter(torch.empty(0))
            self.sharded.ds_numel = 5

    assert count_parameters(Model(torch.uint8)) == (5, 12 + 5)
    assert count_parameters(Model(torch.bfloat16)) == (5, 12 + 5)  # three times two bytes
