"""Names and methods that others import or call do what their callers expect."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import ConvNet, tiny_llama

import peft
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.compat import methods, trained_modules
from peft.compat.attention import TRANSFORMERS_MODEL_CONFIG
from peft.compat.layer import LayerCompat
from peft.compat.parameters import _LoraParameterProxy
from peft.core.model.walk import layers_of
from peft.helpers import DoraCaching
from peft.tuners import tuners_utils
from peft.tuners.lora import GPTQLoraLinear, Linear, LoraLayer
from peft.tuners.lora.gptq import dispatch_default, dispatch_gptq
from peft.tuners.lora.norm_cache import remembered
from peft.utils import quantization_utils
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.save_and_load import get_embedding_layer_name, has_valid_embedding_base_layer


def two(**fields):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0"], **fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    return model


def asked(layer, name, *args, **kwargs):
    """A method of the mixin, for a layer that may not have taken it in yet."""
    return getattr(LayerCompat, name)(layer, *args, **kwargs)


# What third parties were seen to import, where 0.21 has it and the name's own place here is another.
IMPORTED = """
    peft.auto check_file_exists_on_hf_hub
    peft.tuners.adaption_prompt.utils llama_apply_rotary_pos_emb llama_compute_query_states
    peft.utils.save_and_load _maybe_shard_state_dict_for_tp
    peft.utils.transformers_weight_conversion _convert_peft_config_moe
    peft.tuners.lora.variants LoraVariant
    peft.mapping get_peft_model PeftType MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    peft.mapping_func PEFT_TYPE_TO_CONFIG_MAPPING BaseTuner
    peft.peft_model PeftType TaskType shift_tokens_right _get_batch_size BaseTunerLayer WEIGHTS_NAME _set_trainable
    peft.peft_model PEFT_TYPE_TO_CONFIG_MAPPING SAFETENSORS_WEIGHTS_NAME set_peft_model_state_dict load_peft_weights
    peft.peft_model TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING id_tensor_storage infer_device
    peft.helpers LoraLayer PeftModel
    peft.tuners.adalora is_bnb_available
    peft.tuners.adalora.layer check_adapters_to_merge transpose LoraLayer
    peft.tuners.adamss.asa_callback AdamssAsaCallback
    peft.tuners.ia3.model ModulesToSaveWrapper _freeze_adapter _get_submodules
    peft.tuners.lora BufferDict register_peft_method is_bnb_4bit_available LoraVariant
    peft.tuners.lora.bnb dequantize_bnb_weight BaseTunerLayer
    peft.tuners.lora.dora DoraLinearLayer DoraEmbeddingLayer DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer
    peft.tuners.lora.layer BaseTunerLayer LoraVariant transpose gather_params_ctx dequantize_module_weight
    peft.tuners.lora.layer _get_in_out_features check_deepspeed_zero3_enabled
    peft.tuners.lora.model get_pattern_key _get_submodules is_bnb_available onload_layer
    peft.tuners.lora.variants ALoraLinearVariant DoraLinearVariant DoraEmbeddingVariant DoraConv1dVariant
    peft.tuners.lora.variants DoraConv2dVariant KasaLinearVariant ArrowLinearVariant calculate_alora_offsets
    peft.tuners.mixed.model MixedModel PREFIXES COMPATIBLE_TUNER_TYPES
    peft.tuners.osf.utils decompose_weight_matrix project_gradient_to_orthogonal_space
    peft.tuners.shira.mask_functions random_mask
    peft.tuners.trainable_tokens.layer check_deepspeed_zero3_enabled gather_params_ctx
    peft.tuners.tuners_utils AuxiliaryTrainingWrapper DUMMY_TARGET_MODULES NoMatchingPeftModuleError PeftConfig
    peft.tuners.vera.layer BufferDict transpose
    peft.tuners.xlora.classifier XLoraClassifier
    peft.utils.loftq_utils _loftq_init_new
    peft.utils.other match_target_against_key check_file_exists_on_hf_hub is_torch_tpu_available
    peft.utils.save_and_load _insert_adapter_name_into_state_dict _find_mismatched_keys PeftType EMBEDDING_LAYER_NAMES
"""


@pytest.mark.parametrize("line", IMPORTED.strip().split("\n"), ids=lambda line: line.split()[0])
def test_names_that_others_import(line):
    module, *names = line.split()
    for name in names:
        namespace = {}
        exec(f"from {module} import {name}", namespace)
        assert namespace[name] is not None
    with pytest.raises(ImportError, match="NoSuchThing"):
        exec(f"from {module} import NoSuchThing")


# ---- Layer classes and dispatchers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["c3a:C3ALinear", "adalora:SVDLinear", "miss:MissLinear", "hra:HRAConv2d", "waveft.layer:WaveFTLinear"]
)
def test_old_names_are_the_classes_of_adapted_layers(path):
    import importlib

    module, name = path.split(":")
    cls = getattr(importlib.import_module(f"peft.tuners.{module}"), name)
    method = module.split(".")[0]
    config = {"c3a": peft.C3AConfig, "adalora": peft.AdaLoraConfig, "miss": peft.MissConfig, "hra": peft.HRAConfig,
              "waveft": peft.WaveFTConfig}[method]  # fmt: skip
    fields = {"c3a": {"block_size": 4}, "waveft": {"n_frequency": 3}, "adalora": {"total_step": 10}}.get(
        method, {"r": 2}
    )
    base = nn.Conv2d(4, 4, 3) if name.endswith("Conv2d") else nn.Linear(4, 4)
    model = get_peft_model(nn.Sequential(base), config(target_modules=["0"], **fields))
    assert isinstance(model.base_model.model[0], cls)


def test_classes_of_libraries_tell_by_the_base_layer():
    layer = two().base_model.model[0]
    assert isinstance(layer, Linear) and not isinstance(layer, GPTQLoraLinear)
    torchao = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 64))
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    layer = get_peft_model(base, LoraConfig(target_modules=["0"])).base_model.model[0]
    assert isinstance(layer, peft.tuners.lora.torchao.TorchaoLoraLinear) and not isinstance(layer, GPTQLoraLinear)
    backend = quantization_utils.resolve_quantization_backend(layer.get_base_layer())
    assert type(backend) is quantization_utils.TorchaoBackend


def test_dispatchers_take_what_is_theirs():
    config = LoraConfig(r=2, init_lora_weights=False)
    base = nn.Linear(4, 4)
    assert dispatch_gptq(base, "default", config) is None
    layer = dispatch_default(base, "default", config)
    assert isinstance(layer, Linear) and layer.get_base_layer() is base and layer.active_adapters == ["default"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.get_delta_weight("default").T)


# ---- Calls of layers ------------------------------------------------------------------------------------------------

INPUTS = {
    "Linear": (nn.Linear(4, 4), torch.randn(3, 4)),
    "Conv2d": (nn.Conv2d(4, 4, 1), torch.randn(3, 4, 3, 3)),
    "Embedding": (nn.Embedding(5, 4), torch.arange(3)),
}
OF_LAYERS = [cls for method, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()
             if getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(method), "layer_cls", None)]  # fmt: skip
LEAST = {"Linear": 25, "Conv2d": 25, "Embedding": 25}  # how many methods adapt such a layer with the config's defaults


@pytest.mark.parametrize("kind", INPUTS)
def test_layers_are_called_by_keywords(kind):
    base, x = INPUTS[kind]
    done = 0
    for config in OF_LAYERS:
        fields = {"token_indices": [1]} if config is peft.TrainableTokensConfig else {}
        try:
            model = get_peft_model(nn.Sequential(copy.deepcopy(base)), config(target_modules=["0"], **fields)).eval()
            expected = model.base_model.model[0](x)
        except (ValueError, TypeError):
            continue
        done += 1
        layer = model.base_model.model[0]
        for name in ("input", "x"):
            torch.testing.assert_close(layer(**{name: x}), expected, msg=config.__name__)
        with pytest.raises(TypeError, match="input"):
            layer()
        layer.enable_adapters(False)
        torch.testing.assert_close(layer(x=x), base(x), msg=config.__name__)
    assert done >= LEAST[kind]
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    layer, names = model.base_model.model[0], ["default", "__base__", "default"]
    torch.testing.assert_close(layer(input=x, adapter_names=names), layer(x, adapter_names=names))


def test_wrappers_say_where_their_tensors_are():
    model = get_peft_model(
        ConvNet(), LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"], trainable_token_indices={"emb": [1]})
    )
    root = model.base_model.model
    for module in model.modules():
        if hasattr(type(module), "adapter_layer_names"):
            containers = [module.get_submodule(name) for name in module.adapter_layer_names]
            trains = {id(p) for container in containers for p in container.parameters()}
            assert {id(p) for p in module.adapter_parameters("default")} <= trains
    assert root.lin1.adapter_layer_names == ("modules_to_save",) and root.lin1.other_param_names == ()
    assert root.emb.adapter_layer_names == ("token_adapter.trainable_tokens_delta",)


# ---- Methods of layers and tuners -----------------------------------------------------------------------------------


def test_forward_helpers_of_layers():
    model = two()
    model.add_adapter("other", LoraConfig(target_modules=["0"], init_lora_weights=False))
    layer, x = model.base_model.model[0], torch.randn(3, 4)
    asked(layer, "_check_forward_args", x)
    asked(layer, "_check_forward_args", x, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="has 2 entries and the batch 3 rows"):
        asked(layer, "_check_forward_args", x, adapter_names=["default"] * 2)
    names = ["default", "other", "__base__"]
    mixed = asked(layer, "_mixed_batch_forward", x, adapter_names=names)
    torch.testing.assert_close(mixed, layer(x, adapter_names=names))
    assert asked(layer, "_cast_input_dtype", x, torch.bfloat16).dtype == torch.bfloat16
    assert asked(layer, "_cast_input_dtype", None, torch.bfloat16) is None
    with peft.helpers.disable_input_dtype_casting(model):
        assert asked(layer, "_cast_input_dtype", x, torch.bfloat16) is x
    assert asked(layer, "_get_available_adapters") == {"default", "other"}
    assert asked(layer, "supports_lora_conversion") and not asked(layer, "supports_lora_conversion", "absent")
    asked(layer, "_move_adapter_to_device_of_base_layer", "default", torch.device("meta"))
    assert layer.lora_A["default"].weight.is_cuda is False and layer.lora_A["other"].weight.device.type == "cpu"
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        asked(layer, "_check_forward_args", x, adapter_names=["default"] * 3)


def test_weights_and_attributes_of_layers():
    layer = two().base_model.model[0]
    weight = asked(layer, "get_base_weight")
    torch.testing.assert_close(weight, layer.get_base_layer().weight)
    asked(layer, "set_base_weight", weight * 2)
    torch.testing.assert_close(layer.get_base_layer().weight, weight * 2)

    class Mixed(LayerCompat):
        def __init__(self, layer):
            self.kind, self._modules, self.get_base_layer = layer.kind, layer._modules, layer.get_base_layer

    mixed = Mixed(layer)
    assert mixed.fan_in_fan_out is False and mixed.quantization_backend is None
    assert mixed.frozen_peft_weight_names == {}
    mixed.fan_in_fan_out = True  # as third parties set it in their constructors
    assert mixed.fan_in_fan_out is True
    state = {"lora_A.default.weight": torch.ones(8, 4), "lora_B.default.weight": torch.ones(4, 8)}
    assert set(asked(layer, "adapter_state_dict", "default", state)) == {"lora_A.weight", "lora_B.weight"}


def test_layers_give_their_base_and_what_is_adapted_of_it():
    layer = two().base_model.model[0]
    before, x = layer.get_base_layer().weight.detach().clone(), torch.randn(3, 4)
    expected = layer(x)
    assert layer.parameter_name == "weight" and layer.get_param() is layer.get_base_layer().weight
    plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=["default"])
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(layer.unload_and_optionally_merge_module(False, False, None).weight, before)
    experts = nn.Module()
    experts.register_parameter("up", nn.Parameter(torch.ones(2, 3, 4)))
    holder = nn.Sequential(experts)
    wrapper = get_peft_model(holder, LoraConfig(target_parameters=["0.up"], r=1)).base_model.model[0]
    assert wrapper.parameter_name == "up" and wrapper.get_param() is experts.up


def test_one_module_at_a_time_as_other_libraries_do_it():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    tuner, config = model.base_model, model.peft_config["default"]
    assert tuner._check_target_module_exists(config, "0") and not tuner._check_target_module_exists(config, "1")
    target = tuner.model[1]
    tuner._create_and_replace(config, "default", target, "1", tuner.model, current_key="1")
    assert isinstance(tuner.model[1], LoraLayer) and tuner.model[1].get_base_layer() is target
    assert tuner.model[1].active_adapters == ["default"]
    model.requires_grad_(True)
    tuner._mark_only_adapters_as_trainable(tuner.model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{i}.lora_{x}.default.weight" for i in "01" for x in "AB"
    }
    assert tuner.uses_shared_state is False and peft.VeraModel.uses_shared_state is True
    with pytest.raises(ValueError, match="ReLU is no kind of layer"):
        tuner._create_new_module(config, "default", nn.ReLU())


def test_layers_of_registered_classes():
    class Own(Linear):
        pass

    config = LoraConfig(r=2, target_modules=["0"])
    config._register_custom_module({nn.Linear: Own})
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    assert type(model.base_model.model[0]) is Own
    assert "_custom_modules" not in config.to_dict()


def test_layers_that_others_make(monkeypatch):
    before = peft.LoraModel._create_new_module

    def create(peft_config, adapter_name, target, **kwargs):
        layer = before(peft_config, adapter_name, target, **kwargs)
        layer.theirs = True
        return layer

    monkeypatch.setattr(peft.LoraModel, "_create_new_module", staticmethod(create))
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), LoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert layer.theirs and list(layer.adapters) == ["default"] and layer.key == "0"
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    assert model.base_model.model[0] is layer and list(layer.adapters) == ["default", "second"]


def test_a_replaced_hook_of_injection_leaves_out_and_redirects(monkeypatch):
    before, seen = peft.LoraModel._create_and_replace, []

    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).clamp(-1, 1)

    def hook(self, config, name, target, target_name, parent, current_key=None, **kwargs):
        seen.append(current_key)
        if current_key == "1":
            return
        if isinstance(target, Clipped):
            target, target_name, parent = target.linear, "linear", target
        before(self, config, name, target, target_name, parent, current_key=current_key, **kwargs)

    monkeypatch.setattr(peft.LoraModel, "_create_and_replace", hook)
    base = nn.Sequential(Clipped(), nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1", "2"]))
    assert seen == ["0", "1", "2"]
    assert [name for name, _ in layers_of(model.base_model.model)] == ["0.linear", "2"]
    with pytest.raises(ValueError, match="cannot be adapted"):
        get_peft_model(nn.Sequential(nn.Tanh()), LoraConfig(r=2, target_modules=["0"]))


def test_replaced_steps_of_casting_and_unloading(monkeypatch):
    """As ms-swift keeps a dtype of its own, and unsloth clears up after a merge."""
    cast, unload, seen = peft.LoraModel._cast_adapter_dtype, tuners_utils.BaseTuner._unload_and_optionally_merge, []
    monkeypatch.setattr(peft.LoraModel, "_cast_adapter_dtype", lambda self, name, _=True: cast(self, name, False))

    def cleared(self, *args, **kwargs):
        seen.append((args, kwargs))
        return unload(self, *args, **kwargs)

    monkeypatch.setattr(tuners_utils.BaseTuner, "_unload_and_optionally_merge", cleared)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)).bfloat16(), config)
    assert model.base_model.model[0].lora_A["default"].weight.dtype == torch.bfloat16
    x = torch.randn(2, 4).bfloat16()
    want = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), want, rtol=0.05, atol=0.05)
    assert type(get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).unload()[0]) is nn.Linear
    assert len(seen) == 2


def test_a_replaced_choice_of_parameters(monkeypatch):
    """As axolotl chooses them: it hands each on by ``_create_and_replace``."""
    before, seen = tuners_utils.BaseTuner._inject_parameters, []

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(2, 4, 6)), nn.Parameter(torch.randn(2, 6, 4))

        def forward(self, x):
            return x @ self.up[0] @ self.down[1]

    def choose(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        seen.extend(before(self, peft_config, model, adapter_name, low_cpu_mem_usage))
        self._create_and_replace(
            peft_config, adapter_name, model[0], "0", model, current_key="0.up", parameter_name="up"
        )
        return seen

    monkeypatch.setattr(tuners_utils.BaseTuner, "_inject_parameters", choose)
    base = nn.Sequential(Experts(), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["1"], target_parameters=["0.down"], init_lora_weights=False)
    model = get_peft_model(base, config)
    layers = {layer.parameter_name: layer for _, layer in layers_of(model.base_model.model)}
    assert seen == ["0.down"] and set(layers) == {"weight", "up", "down"}
    layer = layers["up"]
    plain = layer.get_base_layer().up.detach().clone()
    with layer._activate_lora(["default"]):
        torch.testing.assert_close(layer.get_base_layer().up, plain + layer.get_delta_weight("default"))
    assert torch.equal(layer.get_base_layer().up, plain)


def test_tables_are_looked_up_and_queries_rotated():
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 4, padding_idx=1)), LoraConfig(r=2, target_modules=["0"]))
    layer, table, rows = model.base_model.model[0], torch.randn(9, 2), torch.tensor([3, 1])
    assert torch.equal(layer._embed(rows, table), table[rows])
    shifted = layer._embed(rows, table, lambda given: given[0] + 1, torch.neg)
    assert torch.equal(shifted, -table[rows + 1])
    utils = sys.modules["peft.tuners.adaption_prompt"]
    q, (cos, sin), at = torch.randn(2, 3, 2, 4), torch.randn(2, 1, 1, 5, 4), torch.tensor([[0, 1], [3, 4]])
    turned = torch.stack([-q[..., 2], -q[..., 3], q[..., 0], q[..., 1]], -1)
    want = q * cos[0, 0][at][:, None] + turned * sin[0, 0][at][:, None]
    torch.testing.assert_close(utils.llama_apply_rotary_pos_emb(q, cos, sin, at), want)


def test_a_start_is_subtracted():
    torch.manual_seed(0)
    start, trained = two(r=2), two(r=2)
    for parameter in trained.parameters():
        parameter.data = parameter.data + 0.1
    state = get_peft_model_state_dict(trained)
    found = start.base_model.subtract_mutated_init(state, "default")
    a, b = (next(t for k, t in found.items() if f"lora_{x}" in k) for x in "AB")
    assert a.shape == (4, 4) and b.shape == (4, 4)
    now, then = (m.base_model.model[0].get_delta_weight("default") for m in (trained, start))
    torch.testing.assert_close(b @ a * trained.base_model.model[0].scaling["default"], now - then)


def test_adalora_ranks_are_cut():
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(total_step=10, init_r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    layer, pattern = model.base_model.model[0], {"0.lora_E": [True, False, True, False]}
    before = get_peft_model_state_dict(model)
    cut = model.base_model.resize_state_dict_by_rank_pattern(pattern, before, "default")
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    assert layer.lora_A["default"].shape == (2, 6) and layer.lora_B["default"].shape == (5, 2)
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[name], cut[name]) for name in after)
    kept = [0, 2]
    a, e, b = (before[f"base_model.model.0.lora_{x}"] for x in "AEB")
    expected = b[:, kept] @ (a[kept] * e[kept]) * layer.scaling["default"] / (4 + 1e-5)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_adalora_settles_ranks_by_what_it_has_seen_before():
    """As in 0.21.2 the last step of the budget takes in no gradients; ``rankallocator`` takes the length of a run."""
    torch.manual_seed(0)
    fields = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "target_modules": ["0"], "total_step": 9}
    config = peft.AdaLoraConfig(**fields, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    model.base_model.rankallocator.set_total_step(4)
    assert config.total_step == 4
    for step in range(4):
        seen = {key: t.clone() for key, t in model.base_model.rankallocator.sensitivity.importance.items()}
        model(torch.randn(8, 6)).square().sum().backward()
        model.base_model.update_and_allocate(step)
        now = model.base_model.rankallocator.sensitivity.importance
        assert all(torch.equal(now[key], t) for key, t in seen.items()) == (step in (0, 3))
    assert len(model.base_model.model[0].left["default"]) == sum(config.rank_pattern["0.lora_E"]) == 2


def test_adalora_with_steps_of_others(monkeypatch):
    """ms-swift puts a forward and the masking of its own in; others read and replace what the allocator knows."""
    model_cls, allocator_cls = peft.AdaLoraModel, peft.tuners.adalora.RankAllocator

    def forward(self, *args, **kwargs):
        outputs = self.model.forward(*args, **kwargs)
        name, terms = self.trainable_adapter_name, []
        for key, p in self.model.named_parameters():
            if ("lora_A" in key or "lora_B" in key) and name in key:
                gram = p @ p.T if "lora_A" in key else p.T @ p
                terms.append((gram - torch.eye(len(gram))).norm())
        outputs.loss = outputs.loss + self.peft_config[name].orth_reg_weight * sum(terms) / len(terms)
        return outputs

    def mask_to_budget(self, model, budget):
        scores, parameters = {}, {n: p for n, p in model.named_parameters() if f".{self.adapter_name}" in n}
        for name in (n for n in parameters if "lora_E" in n):
            means = [self._element_score(name.replace("lora_E", "lora_A")).mean(1, keepdim=True)]
            means += [self._element_score(name.replace("lora_E", "lora_B")).mean(0).view(-1, 1)]
            scores[name] = self._combine_ipt(self._element_score(name), torch.cat(means, 1)).view(-1, 1)
        cut = torch.cat(list(scores.values())).view(-1).kthvalue(self.init_bgt - budget).values
        for name, score in scores.items():
            parameters[name].data.masked_fill_(score <= cut, 0.0)
        return {name: (score > cut).view(-1).tolist() for name, score in scores.items()}

    def train(replaced):
        with pytest.MonkeyPatch.context() as patch:
            if replaced:
                patch.setattr(model_cls, "forward", forward)
                patch.setattr(allocator_cls, "mask_to_budget", mask_to_budget)
            torch.manual_seed(0)
            fields = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "target_modules": ["q_proj"]}
            config = peft.AdaLoraConfig(**fields, total_step=7, task_type="CAUSAL_LM", init_lora_weights=False)
            model, losses, ids = get_peft_model(tiny_llama(), config), [], torch.arange(6)[None]
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for step in range(7):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                model.base_model.update_and_allocate(step)
                optimizer.zero_grad()
                losses.append(loss.item())
            kept = {name.removesuffix(".default"): mask for name, mask in config.rank_pattern.items()}
            return model.base_model.rankallocator, losses, kept

    (allocator, own, left), (_, others, kept) = train(False), train(True)
    assert own == pytest.approx(others) and left == kept
    assert (allocator.init_bgt, allocator.target_bgt) == (8, 4)
    assert [allocator.budget_schedule(step) for step in (1, 2, 6)] == [(8, False), (5, True), (4, True)]
    assert allocator.ipt.keys() == allocator.exp_avg_ipt.keys() == allocator.exp_avg_unc.keys()
    assert all(name.endswith(".default") for name in allocator.ipt)
    allocator.mask_using_rank_pattern(None, dict.fromkeys(left, [True, False, False, False]))
    assert all((adapter.lora_E != 0).sum() <= 1 for adapter in allocator.adapters.values())


@pytest.mark.parametrize("topk, numbers", [(False, 48), (True, 28)])
def test_vblora_counts_what_a_file_holds(topk, numbers, capsys):
    config = peft.VBLoRAConfig(r=2, num_vectors=4, vector_length=4, topk=2, target_modules=["0"],
                               save_only_topk_weights=topk, modules_to_save=["1"])  # fmt: skip
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)
    assert model.base_model.get_nb_savable_parameters() == (numbers, 72)
    both = type("Both", (methods.VBLoRACompat,), {"get_nb_savable_parameters": lambda self: (numbers, 72)})
    both().print_savable_parameters()
    assert f"{numbers} || total params to-be-saved: {numbers + 72}" in capsys.readouterr().out


def test_small_methods_of_single_tuners():
    index = peft.UniLoraModel.generate_index(10, 4, 0)
    assert index.tolist() == [2, 3, 3, 1, 0, 1, 2, 0, 3, 2]
    assert peft.LoHaModel.layers_mapping[nn.Linear] is peft.tuners.loha.Linear
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.PolyConfig(target_modules=["0"], n_tasks=2, r=2))
    x, tasks = torch.randn(2, 4), torch.tensor([0, 1])
    torch.testing.assert_close(model.base_model.forward(x, task_ids=tasks), model(x, task_ids=tasks))


def test_a_further_llama_adapter():
    config = peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    second = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
    model.base_model.add_adapter("second", second)
    assert model.base_model.active_adapters == ["second"] and list(model.peft_config) == ["default", "second"]


# ---- Functions ------------------------------------------------------------------------------------------------------


def test_patterns_features_and_short_names():
    assert get_pattern_key(["a", "b.c"], "x.b.c") == "b.c" and get_pattern_key(["a"], "xa") == "xa"
    assert tuners_utils._get_in_out_features(nn.Conv2d(2, 3, 1)) == (2, 3)
    assert tuners_utils._get_in_out_features(nn.LayerNorm(3)) == (None, None)
    assert tuners_utils._find_minimal_target_modules(["a.b.c", "a.d.c"], ["a.b.e", "x.c.f"]) == {"c"}
    assert tuners_utils._find_minimal_target_modules(["a.b.c"], ["z.b.c"]) == {"a.b.c"}
    for wrong in ([], [""]):
        with pytest.raises(ValueError, match="target_modules"):
            tuners_utils._find_minimal_target_modules(wrong, ["a"])
    assert not tuners_utils._ExcludedModule()
    config = LoraConfig(target_modules="all-linear")
    assert "q_proj" in tuners_utils._maybe_include_all_linear_layers(config, tiny_llama()).target_modules


def test_where_embeddings_are():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    adapted, head = model.get_input_embeddings(), model.get_output_embeddings()
    place = "base_model.model.model.embed_tokens"
    assert get_embedding_layer_name(model, adapted, True) == f"{place}.base_layer"
    assert get_embedding_layer_name(model, adapted, False) == place
    assert get_embedding_layer_name(model, head, True) is None
    assert get_embedding_layer_name(model, head, False) == "base_model.model.lm_head"
    assert has_valid_embedding_base_layer(adapted) and not has_valid_embedding_base_layer(head)


def test_trained_modules_one_by_one():
    model = two()
    root = model.base_model.model
    trained_modules._set_trainable(root, "default", ["1"], inference_mode=False)
    assert root[1].active_adapters == ["default"] and root[1].modules_to_save["default"].weight.requires_grad
    with pytest.raises(ValueError, match="is called"):
        trained_modules._set_trainable(root, "default", ["absent"], False, strict_module_check=True)
    trained_modules._set_trainable(root, "second", ["1"], inference_mode=False, activate_adapter=False)
    assert root[1].active_adapters == ["default"]
    trained_modules._set_adapter(root, "second")
    assert root[1].active_adapters == ["second"] and root[0].active_adapters == ["default"]
    trained_modules._freeze_adapter(root, "second")
    assert not root[1].modules_to_save["second"].weight.requires_grad


def test_additional_modules_of_a_config():
    model = ConvNet()
    config = LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"], trainable_token_indices={"emb": [1, 2]})
    trained_modules.set_additional_trainable_modules(model, config, None, "default")
    assert model.lin1.active_adapters == ["default"] and model.emb.active_adapters == ["default"]
    assert model.lin1.modules_to_save["default"].weight.requires_grad
    trained_modules.set_additional_trainable_modules(model, config, None, "second", activate_adapter=False)
    assert model.lin1.active_adapters == ["default"] and "second" in model.lin1.modules_to_save


@pytest.mark.parametrize("as_dict", [True, False])
def test_prompt_sizes_from_a_config(as_dict):
    llama = tiny_llama().config
    given = llama.to_dict() if as_dict else llama
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    trained_modules._prepare_prompt_learning_config(prompt, given)
    assert prompt.token_dim == llama.hidden_size and prompt.num_layers == llama.num_hidden_layers
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    trained_modules._prepare_prompt_learning_config(prefix, given)
    assert prefix.num_attention_heads == llama.num_key_value_heads
    assert prefix.token_dim == llama.head_dim * llama.num_key_value_heads


@pytest.mark.parametrize("bits", [4, 8])
def test_backends_of_bitsandbytes_read_and_write(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    cls = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    base = cls(64, 64, **({} if bits == 4 else {"has_fp16_weights": False}))
    base.load_state_dict(nn.Linear(64, 64).state_dict())
    base = nn.Sequential(base).to("cpu")
    if bits == 8 and base[0].weight.dtype != torch.int8:
        pytest.skip("this build of bitsandbytes has no 8 bits on this device")
    backend = quantization_utils.resolve_quantization_backend(base[0])
    assert backend.backend_name == f"bnb {bits}bit" and backend.supports_merge
    before = backend.get_base_weight(base[0])
    layer = get_peft_model(base, LoraConfig(target_modules=["0"])).base_model.model[0]
    backend.set_base_weight(layer, before * 2)
    after = backend.get_base_weight(layer.get_base_layer())
    assert (after - before * 2).norm() < 0.1 * before.norm()


def test_what_is_not_quantised_has_no_backend(monkeypatch):
    assert quantization_utils.resolve_quantization_backend(nn.Linear(2, 2)) is None
    assert quantization_utils.resolve_quantization_backend(nn.ReLU()) is None
    assert quantization_utils.get_quantization_kwargs(nn.Linear(2, 2)) == {}
    assert quantization_utils.quantization_extra_repr(nn.Linear(2, 2)) == ""
    forward_only = quantization_utils.ForwardOnlyQuantizationBackend("gptq")
    with pytest.raises(TypeError, match="kept by gptq cannot be read"):
        forward_only.get_base_weight(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="is not quantised"):
        quantization_utils.QuantizationBackend().get_base_weight(nn.Linear(2, 2))
    assert peft.utils.get_gptqmodel_quant_linear(None) is None
    asked = {}

    def choose(bits, group_size, sym=True, device_map=None):
        asked.update(bits=bits, group_size=group_size, sym=sym, device_map=device_map)
        return nn.Linear

    monkeypatch.setattr("peft.compat.helpers.is_gptqmodel_available", lambda: True)
    monkeypatch.setitem(sys.modules, "gptqmodel.utils.importer", SimpleNamespace(hf_select_quant_linear=choose))
    given = {"bits": 4, "group_size": 128, "sym": False, "desc_act": True}
    assert peft.utils.get_gptqmodel_quant_linear(given, device_map="cpu") is nn.Linear
    assert asked == {"bits": 4, "group_size": 128, "sym": False, "device_map": "cpu"}
    with pytest.raises(ValueError, match="needs group_size"):
        peft.utils.get_gptqmodel_quant_linear({"bits": 4})


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_layers_are_onloaded_and_keep_changes(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = two()
    root, x = model.base_model.model, torch.randn(2, 4)
    if where == "cpu":
        accelerate.cpu_offload(root[0].base_layer, torch.device("cpu"))
    else:
        accelerate.disk_offload(root[0].base_layer, str(tmp_path), torch.device("cpu"))
    assert root[0].base_layer.weight.is_meta
    with tuners_utils.onload_layer(root[0]):
        assert not root[0].base_layer.weight.is_meta
        root[0].base_layer.weight.data.mul_(2)
    assert root[0].base_layer.weight.is_meta
    plain = two().base_model.model[0].get_base_layer()
    torch.testing.assert_close(root[0].base_layer(x), nn.functional.linear(x, plain.weight * 2, plain.bias))


def test_queries_of_an_attention():
    model = tiny_llama()
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 3, model.config.hidden_size)
    positions = model.model.rotary_emb(x, torch.arange(3)[None])
    compute = TRANSFORMERS_MODEL_CONFIG["llama"].compute_query_states
    query = compute(attention, hidden_states=x, position_embeddings=positions, attention_mask=None)
    plain = attention.q_proj(x).view(1, 3, -1, attention.head_dim).transpose(1, 2)
    turned = torch.cat([-plain[..., plain.shape[-1] // 2 :], plain[..., : plain.shape[-1] // 2]], -1)
    torch.testing.assert_close(query, plain * positions[0][:, None] + turned * positions[1][:, None])


def test_a_change_as_a_parametrisation():
    layer, delta = nn.Linear(3, 3), torch.randn(3, 3)
    before = layer.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(layer, "weight", _LoraParameterProxy(delta))
    torch.testing.assert_close(layer.weight, before + delta)


def test_reads_on_the_model():
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM"))
    base = model.get_base_model()
    assert model.base_model_prepare_inputs_for_generation == base.prepare_inputs_for_generation
    model.base_model_prepare_inputs_for_generation = len  # as subclasses of others do
    assert model.base_model_prepare_inputs_for_generation is len
    assert model._is_prompt_learning is False


# ---- Shadow networks ------------------------------------------------------------------------------------------------


def test_a_detached_shadow_computes_and_generates():
    from peft.tuners.shadow import DetachedShadowModel, ShadowCache, ShadowCarrier

    torch.manual_seed(0)
    model = tiny_llama()
    head, projection = nn.Linear(64, model.config.vocab_size), nn.Linear(model.config.hidden_size, 64)
    alone = DetachedShadowModel(model.model, projection, head).eval()
    ids = torch.arange(6)[None]
    expected = head(projection(model.model(ids)[0]))
    output = alone(ids, labels=ids)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:]))
    text = alone.generate(ids, max_new_tokens=3, do_sample=False)
    slow = alone.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(text, slow) and text.shape == (1, 9)
    table = model.model.get_input_embeddings()
    shared = DetachedShadowModel(model.model, projection, head, input_embeddings=table).eval()
    torch.testing.assert_close(shared(ids).logits, expected)
    classes = DetachedShadowModel(model.model, projection, nn.Linear(64, 3), is_classification=True).eval()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert classes(ids, attention_mask=mask, labels=torch.tensor([2])).logits.shape == (1, 3)
    assert not classes.can_generate() and alone.can_generate()

    carrier = ShadowCarrier(torch.ones(1), torch.zeros(1))
    assert carrier.hidden.item() == 1 and carrier.shadow.item() == 0
    from transformers import DynamicCache

    caches = [DynamicCache(), DynamicCache()]
    for cache, length in zip(caches, (4, 2)):
        cache.update(torch.arange(2.0 * length).view(2, 1, length, 1), torch.ones(2, 1, length, 1), 0)
    both = ShadowCache(*caches)
    assert both.get_seq_length() == 4 and len(both) == 1 and not both.is_compileable
    both.reorder_cache(torch.tensor([1, 0]))
    assert caches[0].layers[0].keys[0, 0, 0, 0] == 4 and caches[1].layers[0].keys[0, 0, 0, 0] == 2
    both.update(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1), 0)
    assert (caches[0].get_seq_length(), caches[1].get_seq_length()) == (5, 2)


# ---- DoRA's norms ---------------------------------------------------------------------------------------------------


def test_norms_are_remembered_while_nothing_changes():
    holder, weight, count = nn.Module().eval(), nn.Parameter(torch.ones(3, 3)), []

    def norm(scaling=1.0):
        def make():
            count.append(1)
            return (weight * scaling).norm(dim=1)

        return remembered(holder, [weight], scaling, make)

    with DoraCaching():
        first = norm()
        assert torch.equal(norm(), first) and len(count) == 1
        assert not torch.equal(norm(2.0), first) and len(count) == 2
        with torch.no_grad():
            weight.mul_(3)
        assert torch.equal(norm(), first * 3) and len(count) == 3
        holder.train()
        norm(), norm()
        assert len(count) == 5 and "_remembered" not in vars(holder)
        holder.eval()
        with DoraCaching(enabled=False):
            norm(), norm()
        assert len(count) == 7 and DoraCaching.active
    norm(), norm()
    assert len(count) == 9 and not DoraCaching.active
    caching = DoraCaching()
    caching(enabled=True)
    norm(), norm()
    assert len(count) == 10
    caching(enabled=False)
    norm(), norm()
    assert len(count) == 12


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 4, 2), nn.Embedding(5, 4), nn.Linear(4, 4)], ids=type)
def test_dora_computes_its_norm_once_within_the_context(layer, monkeypatch):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, use_dora=True)).eval()
    adapter = model.base_model.model[0].adapters["default"]
    for tensor in adapter.pair():
        tensor.data.normal_()
    x = torch.arange(3) if isinstance(layer, nn.Embedding) else torch.randn(2, 4, 4)
    wanted, own, count = model(x), type(adapter)._norm, []
    monkeypatch.setattr(type(adapter), "_norm", lambda self, base: (count.append(1), own(self, base))[1])
    with DoraCaching(), torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), wanted)
        assert len(count) == 1
        adapter.pair()[1].mul_(2)
        assert not torch.allclose(model(x), wanted) and len(count) == 2
        model.train()
        model(x), model(x)
        assert len(count) == (2 if isinstance(layer, nn.Linear) else 4)  # a kernel computes a linear layer's own


# ---- Variants of LoRA as others know them --------------------------------------------------------------------------


def test_a_variant_that_others_derive(tmp_path):
    """A layer of a third party returns an object of a class of its own, which has no state and gets the layer."""
    from peft.tuners.lora.layer import LoraVariant

    class Doubled(LoraVariant):
        @staticmethod
        def init(module, adapter_name, **kwargs):
            assert adapter_name in module.lora_A

        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
            return result + 2 * module.scaling[active_adapter] * up(down(x))

        @staticmethod
        def merge_safe(module, active_adapter, orig_weight):
            down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
            return orig_weight + 2 * module.scaling[active_adapter] * up @ down

    class Own(Linear):
        def resolve_lora_variant(self, *, config, **kwargs):
            return Doubled() if config.r == 2 else None

    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    config._register_custom_module({nn.Linear: Own})
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), config)
    layer, x = model.base_model.model[0], torch.randn(5, 4)
    assert isinstance(layer.lora_variant["default"], Doubled)
    weight = layer.base_layer.weight.detach().clone()
    change = 2 * layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = nn.functional.linear(x, weight + change, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight, weight + change)
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)
    plain = LoraConfig(r=3, target_modules=["0"])
    plain._register_custom_module({nn.Linear: Own})
    model.add_adapter("plain", plain)
    assert list(layer.lora_variant) == ["default"]


def test_variants_by_their_names_of_old():
    from peft.tuners.lora.variants import ALoraLinearVariant, DoraConv2dVariant, DoraLinearVariant, KasaLinearVariant

    dora = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], use_dora=True, r=2))
    layer = dora.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    variant, x = layer.lora_variant["default"], torch.randn(3, 4)
    assert isinstance(variant, DoraLinearVariant) and isinstance(variant, DoraConv2dVariant)
    assert not isinstance(variant, (ALoraLinearVariant, KasaLinearVariant))
    # What a copy of 0.21's forward does with it.
    result = variant.forward(layer, active_adapter="default", x=x, result=layer.base_layer(x))
    torch.testing.assert_close(result, layer(x))

    class Own(Linear):
        def resolve_lora_variant(self, *, config, **kwargs):
            return DoraLinearVariant() if config.use_dora else None

    made = Own(nn.Linear(4, 4), "default", LoraConfig(r=2, use_dora=True))
    assert isinstance(made.lora_variant["default"], DoraLinearVariant)
    merged = DoraLinearVariant.merge_safe(layer, "default", layer.base_layer.weight)
    torch.testing.assert_close(nn.functional.linear(x, merged, layer.base_layer.bias), layer(x))


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding"])
def test_magnitudes_compute_dora_by_themselves(kind):
    """Layers of others make one of these and call it; it gives what a layer of ours adds to its base."""
    import peft.tuners.lora.dora as dora

    torch.manual_seed(0)
    base = {"Linear": nn.Linear(4, 3), "Conv2d": nn.Conv2d(2, 3, 3), "Embedding": nn.Embedding(7, 4)}[kind]
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_alpha=6))
    layer = model.base_model.model[0]
    held = layer.lora_magnitude_vector["default"]
    assert type(held) is getattr(dora, f"Dora{kind}Layer") and f"lora.dora.Dora{kind}Layer()" in str(model)
    for parameter in layer.adapter_parameters("default"):
        parameter.data.normal_()
    own = type(held)(fan_in_fan_out=False)
    if kind == "Embedding":
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        own.update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=3.0)
        norm = (base.weight.T + 3 * b @ a).norm(dim=1)
        held.weight.data = own.weight.data * 2
        tokens = torch.tensor([[1, 5]])
        g, added = held(tokens, lora_A=a.T, lora_B=b.T, scaling=3.0, base_layer=base, embed_fn=nn.functional.embedding)
        torch.testing.assert_close(g * base(tokens) + added, layer(tokens))
    else:
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        own.update_layer(base_layer=base, lora_A=a.weight, lora_B=b.weight, scaling=3.0)
        change = 3 * b.weight.flatten(1) @ a.weight.flatten(1)
        norm = (base.weight.flatten(1) + change).norm(dim=1).view_as(held.weight)
        held.weight.data = own.weight.data * 2
        x = torch.randn(2, *((4,) if kind == "Linear" else (2, 5, 5)))
        added = held(x, lora_A=a, lora_B=b, scaling=3.0, base_layer=base)
        torch.testing.assert_close(base(x) + added, layer(x))
        torch.testing.assert_close(
            held(x, lora_A=a, lora_B=b, scaling=3.0, base_layer=base, base_result=base(x)), added
        )
    torch.testing.assert_close(own.weight, norm)


def test_a_replaced_dequantize_module_weight_acts_where_magnitudes_read_the_base(monkeypatch):
    import peft.utils.integrations
    from peft.tuners.lora.dora import DoraLinearLayer

    own, base, zero = DoraLinearLayer(), nn.Linear(4, 3), torch.zeros(3, 2)
    monkeypatch.setattr(peft.utils.integrations, "dequantize_module_weight", lambda module: 2 * module.weight)
    own.update_layer(base_layer=base, lora_A=torch.zeros(2, 4), lora_B=zero, scaling=1.0)
    torch.testing.assert_close(own.weight, 2 * base.weight.norm(dim=1))


def test_offsets_of_invocations():
    from peft.tuners.lora.variants import calculate_alora_offsets

    configs = {"a": LoraConfig(alora_invocation_tokens=[5, 6]), "b": LoraConfig()}
    ids = torch.tensor([[1, 5, 6, 2, 5, 6, 9], [1, 2, 3, 4, 5, 6, 7], [1] * 7, [0, 0, 0, 0, 0, 5, 6]])
    assert calculate_alora_offsets(configs, "a", ids) == [3, 3, None, 2]
    assert calculate_alora_offsets(configs, "b", ids) == [None] * 4
    assert calculate_alora_offsets(configs, "a", ids, adapter_names=["a", "b", "__base__", "a"]) == [3, None, None, 2]


# ---- Functions that others call ------------------------------------------------------------------------------------


def test_names_in_files_and_shapes():
    from peft.utils.save_and_load import _find_mismatched_keys, _insert_adapter_name_into_state_dict

    names = ["m.q.lora_A.weight", "m.q.lora_E", "m.head.weight", "m.e.lora_embedding_A"]
    told = _insert_adapter_name_into_state_dict(dict.fromkeys(names), "x", "lora_")
    assert list(told) == ["m.q.lora_A.x.weight", "m.q.lora_E.x", "m.head.weight", "m.e.lora_embedding_A.x"]
    model, state = nn.Linear(3, 2), {"weight": torch.zeros(2, 4), "bias": torch.zeros(2), "more": torch.zeros(1)}
    assert _find_mismatched_keys(model, state) == (state, [])
    left, other = _find_mismatched_keys(model, state, ignore_mismatched_sizes=True)
    assert list(left) == ["bias", "more"] and other == [("weight", (2, 4), (2, 3))]


def test_parts_of_osf_by_its_functions():
    from peft.tuners.osf.utils import decompose_weight_matrix, project_gradient_to_orthogonal_space

    weight = torch.randn(6, 4)
    parts = decompose_weight_matrix(weight, top_k=2)
    made = sum(parts[f"U_{at}"] * parts[f"S_{at}"] @ parts[f"V_{at}"] for at in ("high", "low"))
    torch.testing.assert_close(made, weight)
    assert parts["rank_high"] == 2 and isinstance(parts["U_low"], nn.Parameter)
    parts["U_low"].grad, parts["V_low"].grad = torch.randn(6, 2), torch.randn(2, 4)
    project_gradient_to_orthogonal_space(parts)
    torch.testing.assert_close(parts["U_high"].T @ parts["U_low"].grad, torch.zeros(2, 2))
    torch.testing.assert_close(parts["V_low"].grad @ parts["V_high"].T, torch.zeros(2, 2))


def test_a_file_on_the_hub_is_asked_for(monkeypatch):
    import huggingface_hub

    from peft.utils.other import check_file_exists_on_hf_hub

    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *args, **kwargs: asked.append((args, kwargs)) or True)
    assert check_file_exists_on_hf_hub("a/b", "config.json", subfolder="in", revision="v1", local_files_only=False)
    assert asked == [(("a/b", "in/config.json"), {"revision": "v1"})]

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "file_exists", fail)
    with pytest.warns(UserWarning, match="a/b has config.json: no network"):
        assert check_file_exists_on_hf_hub("a/b", "config.json") is None


def test_adamss_in_a_trainer(tmp_path):
    """The callback of 0.21 lets a Trainer leave ever fewer subspaces to train."""
    from transformers import Trainer, TrainingArguments

    from peft.tuners.adamss.asa_callback import AdamssAsaCallback

    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    config = peft.AdamssConfig(r=8, num_subspaces=4, target_modules=["q_proj", "v_proj"], use_asa=True,
                               asa_target_subspaces=2, init_warmup=0, final_warmup=3, mask_interval=1)  # fmt: skip
    model = get_peft_model(tiny_llama(), config)
    before = sum(p.requires_grad for p in model.parameters())
    rows = [{"input_ids": list(range(i, i + 6)), "labels": list(range(i, i + 6))} for i in range(8)]
    args = TrainingArguments(str(tmp_path), max_steps=5, per_device_train_batch_size=2, report_to=[],
                             save_strategy="no", use_cpu=True)  # fmt: skip
    Trainer(model, args, train_dataset=rows, callbacks=[AdamssAsaCallback()]).train()
    assert sum(p.requires_grad for p in model.parameters()) == 4 < before
