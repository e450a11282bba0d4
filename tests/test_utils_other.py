"""Helpers of ``peft.utils``: preparing bases, module lookup, sharding policy, devices, empty initialisation."""

import sys
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import import_utils
from peft.meanwhile import having, in_mode
from peft.utils import constants, integrations, other


def llama(dtype=torch.bfloat16, layers=1, **marks):
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, value in marks.items():
        setattr(model, name, value)
    return model


# ---- Preparing bases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [{}, {"is_loaded_in_8bit": True}, {"is_loaded_in_4bit": True}])
def test_kbit_preparation_freezes_and_casts(marks):
    model = llama(**marks)
    model.model.norm.double()
    assert other.prepare_model_for_kbit_training(model) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.float64
    assert model.is_gradient_checkpointing == bool(marks)


@pytest.mark.parametrize("method", ["gptq", "aqlm", "eetq", "hqq", "torchao"])
def test_kbit_preparation_leaves_the_dtypes_of_other_libraries(method):
    model = other.prepare_model_for_kbit_training(llama(quantization_method=method))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.is_gradient_checkpointing


def test_kbit_preparation_skips_packed_4bit_weights():
    class Params4bit(nn.Parameter):
        pass

    module = nn.Module()
    module.packed = Params4bit(torch.zeros(2, dtype=torch.bfloat16))
    module.plain = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    other.prepare_model_for_kbit_training(module)
    assert (module.packed.dtype, module.plain.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_kbit_preparation_lets_gradients_through_checkpoints(kwargs):
    model = other.prepare_model_for_kbit_training(llama(is_loaded_in_4bit=True), gradient_checkpointing_kwargs=kwargs)
    trained = model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    model.train()
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    assert trained.grad is not None
    assert trained.grad.abs().sum() > 0
    assert len(model.model.embed_tokens._forward_hooks) <= 1
    model.disable_input_require_grads()
    assert not model.model.embed_tokens._forward_hooks


def test_kbit_preparation_of_models_of_other_origin():
    class Plain(nn.Module):
        is_loaded_in_8bit = True

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(3, 2)
            self.enabled = 0

        def get_input_embeddings(self):
            return self.embed

    class WithCheckpoints(Plain):
        def gradient_checkpointing_enable(self):
            self.enabled += 1

    with pytest.raises(TypeError, match="Plain has no gradient_checkpointing_enable"):
        other.prepare_model_for_kbit_training(Plain())
    other.prepare_model_for_kbit_training(Plain(), use_gradient_checkpointing=False)
    model = other.prepare_model_for_kbit_training(WithCheckpoints())
    assert model.enabled == 1
    assert model.embed(torch.tensor([0])).requires_grad
    with pytest.warns(UserWarning, match="gradient_checkpointing_kwargs are ignored"):
        other.prepare_model_for_kbit_training(WithCheckpoints(), gradient_checkpointing_kwargs={"use_reentrant": True})


def test_cast_mixed_precision_params():
    model = nn.ModuleDict({"frozen": nn.Linear(2, 2).requires_grad_(False), "trained": nn.Linear(2, 2).half()})
    model.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    other.cast_mixed_precision_params(model, torch.bfloat16)
    assert model["frozen"].weight.dtype == torch.bfloat16
    assert model["trained"].weight.dtype == torch.float32
    assert model.codes.dtype == torch.int8


# ---- Lookup and tensors ---------------------------------------------------------------------------------------------


def test_get_submodules():
    inner = nn.Linear(2, 2)
    block = nn.Sequential(inner)
    model = nn.Sequential(nn.Linear(2, 2), block)
    assert other._get_submodules(model, "1.0") == (block, inner, "0")
    assert other._get_submodules(model, "1") == (model, block, "1")
    with pytest.raises(AttributeError, match="7"):
        other._get_submodules(model, "7.0")


def test_matches_end_on_a_dot():
    assert other._is_valid_match("model.layers.q", "layers.q")
    assert other._is_valid_match("q", "q")
    assert not other._is_valid_match("model.mylayers.q", "layers.q")
    assert not other._is_valid_match("model.layers.q", "layers")


def test_input_embeddings_name():
    assert other._get_input_embeddings_name(llama()) == "model.embed_tokens"
    assert other._get_input_embeddings_name(nn.Linear(2, 2), "fallback") == "fallback"


def test_batch_size_and_shifted_tokens():
    assert other._get_batch_size(torch.zeros(3, 4), torch.zeros(2, 5, 6)) == 3
    assert other._get_batch_size(None, torch.zeros(2, 5, 6)) == 2
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        other._get_batch_size(None, None)
    labels = torch.tensor([[5, 6, -100, 7], [1, 2, 3, 4]])
    assert other.shift_tokens_right(labels, 0, 9).tolist() == [[9, 5, 6, 0], [9, 1, 2, 3]]
    with pytest.raises(ValueError, match="pad_token_id"):
        other.shift_tokens_right(labels, None, 9)


def test_transpose_keeps_parameters_and_memory():
    weight = nn.Parameter(torch.randn(2, 3))
    turned = other.transpose(weight, True)
    assert isinstance(turned, nn.Parameter)
    assert turned.shape == (3, 2)
    assert other.id_tensor_storage(turned) == other.id_tensor_storage(weight)
    assert other.transpose(weight, False) is weight


def test_storages_are_told_apart():
    base = torch.zeros(4)
    assert other.id_tensor_storage(base) == other.id_tensor_storage(base[1:])
    assert other.id_tensor_storage(base) != other.id_tensor_storage(base.clone())
    meta = torch.zeros(4, device="meta")
    assert other.id_tensor_storage(meta) == other.id_tensor_storage(meta[1:])
    assert other.id_tensor_storage(meta) != other.id_tensor_storage(torch.zeros(4, device="meta"))


def test_quantization_config_only_of_its_method():
    model = types.SimpleNamespace(quantization_method="gptq", config=types.SimpleNamespace(quantization_config="it"))
    assert other.get_quantization_config(model, "gptq") == "it"
    assert other.get_quantization_config(model, "awq") is None
    assert other.get_quantization_config(nn.Linear(2, 2), "gptq") is None


# ---- Sharding -------------------------------------------------------------------------------------------------------


def test_fsdp_policy_wraps_layers_and_trained_leaves(monkeypatch):
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    model = llama().requires_grad_(False)
    adapter = model.model.layers[0].adapter = nn.Linear(2, 2)
    policy = other.fsdp_auto_wrap_policy(model)

    def wrapped(policy):
        return [m for m in model.modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]

    assert wrapped(policy) == [model.model.layers[0], adapter]
    assert policy(module=model, recurse=True, nonwrapped_numel=0)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP, LlamaAttention")
    layer = model.model.layers[0]
    assert wrapped(other.fsdp_auto_wrap_policy(model)) == [layer.self_attn, layer.mlp, adapter]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoder")
    with pytest.raises(ValueError, match="'LlamaDecoder'.*LlamaDecoderLayer"):
        other.fsdp_auto_wrap_policy(model)


# ---- Integrations ---------------------------------------------------------------------------------------------------


def test_dense_weights_are_returned_as_they_are():
    layer = nn.Linear(2, 3)
    assert integrations.dequantize_module_weight(layer) is layer.weight
    assert integrations.dequantize_bnb_weight(layer.weight) is layer.weight
    with pytest.raises(AttributeError, match="weight"):
        integrations.dequantize_module_weight(nn.ReLU())
    with pytest.raises(TypeError, match="Tensor"):
        integrations.dequantize_bnb_weight(torch.zeros(2))


def test_8bit_weights_are_dequantised_by_row():
    class Int8Params(nn.Parameter):
        pass

    dense = torch.randn(4, 6)
    scales = dense.abs().amax(dim=1)
    codes = (dense / scales[:, None] * 127).round().to(torch.int8)
    weight = Int8Params(codes, requires_grad=False)
    assert integrations.get_bnb_param_type(weight) == "8bit"
    result = integrations.dequantize_bnb_weight(weight, state=types.SimpleNamespace(SCB=scales))
    assert (result - dense).abs().max() <= scales.max() / 127 / 2 + 1e-6
    weight.SCB = scales
    assert torch.equal(integrations.dequantize_bnb_weight(weight), result)


@pytest.mark.parametrize("buffers", [False, True])
def test_init_empty_weights(buffers):
    @integrations.skip_init_on_device
    def real():
        return nn.BatchNorm1d(2)

    with integrations.init_empty_weights(include_buffers=buffers):
        empty = nn.BatchNorm1d(2)
        kept = real()
        empty_again = nn.Linear(2, 2)
    assert empty.weight.is_meta
    assert empty.weight.requires_grad
    assert isinstance(empty.weight, nn.Parameter)
    assert empty_again.bias.is_meta
    assert empty.running_mean.is_meta == buffers
    assert not any(tensor.is_meta for tensor in kept.state_dict().values())
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ({"": 0}, {0: 0, 1: 0}),
        ({"model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}, {0: 0, 1: 1}),
        ({"transformer.h.0": "cpu", "transformer.h.1": 0}, {0: 0, 1: 0}),
        ({"model.layers.0": "cpu", "model.layers.1": "disk"}, {0: "cpu", 1: "cpu"}),
    ],
)
def test_layer_device_map(device_map, expected):
    assert integrations.get_layer_device_map(llama(layers=2, hf_device_map=device_map)) == expected


def test_layer_device_map_must_be_complete():
    assert integrations.get_layer_device_map(llama()) is None
    with pytest.raises(RuntimeError, match="no layer 1 of 2"):
        integrations.get_layer_device_map(llama(layers=2, hf_device_map={"model.layers.0": 0}))


def test_caches_move_to_the_device_of_their_layer():
    model = llama(layers=2)
    cache = model(torch.tensor([[1, 2]])).past_key_values
    model.hf_device_map = {"model.layers.0": "meta", "model.layers.1": "meta"}
    integrations.map_cache_to_layer_device_map(model, cache)
    assert [layer.values.device.type for layer in cache.layers] == ["meta", "meta"]


def test_libraries_are_not_looked_for_where_they_are_not_used():
    assert not integrations.check_deepspeed_zero3_enabled()
    weight = nn.Linear(2, 2).weight
    with integrations.gather_params_ctx(weight):
        assert weight.shape == (2, 2)
    assert integrations.dtensor_from_local_like(weight, weight) is weight


# ---- Tables and availability ----------------------------------------------------------------------------------------


def test_target_tables_do_not_share_their_lists():
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert lora["llama"] == ["q_proj", "v_proj"]
    assert constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING["phi"] == ["q_proj", "v_proj"]
    tables = [table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")]
    lists = [id(targets) for table in tables for targets in table.values() if isinstance(targets, list)]
    assert len(lists) == len(set(lists))


def test_bloom_and_starcoder_prefixes():
    keys, values = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    layers = constants.bloom_model_postprocess_past_key_value((keys, values))
    assert [tuple(tensor.shape) for tensor in layers[0]] == [(12, 6, 5), (12, 5, 6)]
    assert torch.equal(layers[1][1], values[1].reshape(12, 5, 6))
    assert torch.equal(layers[1][0].flatten(), keys[1].transpose(1, 2).flatten())
    (layer,) = constants.starcoder_model_postprocess_past_key_value((torch.stack((keys[0], values[0])),))
    assert torch.equal(layer, torch.cat((keys[0][:, 0], values[0][:, 0]), dim=-1))


def test_availability_is_found_without_importing(monkeypatch, tmp_path):
    """A distribution that fails when imported is found all the same; one that is too old is refused by name."""

    def install(name, version):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.delitem(sys.modules, name, raising=False)

    install("torchao", "0.17.0")
    install("bitsandbytes", "0.38.0")
    install("gptqmodel", "6.9.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    checks = [
        import_utils.is_torchao_available,
        import_utils.is_torchao_ge_v0_18_0,
        import_utils.is_bnb_available,
        import_utils.is_bnb_4bit_available,
        import_utils.is_gptqmodel_available,
    ]
    for check in checks:
        check.cache_clear()
    try:
        assert [check() for check in checks[:4]] == [True, False, True, False]
        with pytest.raises(ImportError, match=r"gptqmodel 6\.9\.0 is too old: 7\.0\.0"):
            import_utils.is_gptqmodel_available()
    finally:
        for check in checks:
            check.cache_clear()
    assert "torchao" not in sys.modules


# ---- For a while ----------------------------------------------------------------------------------------------------


def test_what_is_otherwise_for_a_while_is_as_before_afterwards_even_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[1].eval()  # a module may be in another mode than the one around it
    model[0].bias.requires_grad_(False)
    with (
        pytest.raises(RuntimeError),
        in_mode(model, training=False),
        having(model.parameters(), requires_grad=True, grad=None),
    ):
        assert not any(module.training for module in model.modules())
        assert all(p.requires_grad for p in model.parameters())
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [True, False]
