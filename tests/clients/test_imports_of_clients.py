"""Names that other software imports from here, and the ways in which it patches, subclasses and calls what it finds.

Each case states what one program does, as its sources have it; the programs themselves are not needed.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IDS, fill, llama, logits, lora
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    LoraModel,
    PeftModel,
    TaskType,
    get_peft_model,
)


IMPORTS: dict[str, dict[str, str]] = {
    "axolotl": {
        "peft": "AdaptionPromptConfig LoftQConfig LoraConfig PeftConfig PeftMixedModel PeftModel TaskType "
        "get_peft_model PeftModelForCausalLM prepare_model_for_kbit_training",
        "peft.tuners.lora.model": "LoraModel",
        "peft.tuners.lora.layer": "LoraLayer ParamWrapper Linear",
        "peft.utils.transformers_weight_conversion": "convert_peft_config_for_transformers "
        "get_model_conversion_mapping",
        "peft.optimizers": "create_loraplus_optimizer",
        "peft.utils.other": "get_pattern_key",
        "peft.tuners.tuners_utils": "onload_layer BaseTunerLayer",
    },
    "LLaMA-Factory": {
        "peft": "LoraConfig LoraModel PeftModel TaskType get_peft_model OFTConfig",
        "peft.utils": "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME",
    },
    "ms-swift": {
        "peft": "AdaLoraConfig BOFTConfig BOFTModel IA3Config IA3Model LoftQConfig LoHaConfig LoKrConfig LoraModel "
        "OFTConfig PeftConfig PeftModel PeftModelForCausalLM PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
        "PeftModelForTokenClassification PrefixTuningConfig PromptEncoderConfig PromptLearningConfig "
        "PromptTuningConfig VeraConfig VeraModel get_peft_config get_peft_model get_peft_model_state_dict "
        "FourierFTModel",
        "peft.config": "PeftConfigMixin",
        "peft.tuners": "lora",
        "peft.tuners.lora": "Embedding LoraLayer",
        "peft.tuners.adalora": "AdaLoraModel RankAllocator",
        "peft.tuners.lora.aqlm": "dispatch_aqlm",
        "peft.tuners.lora.awq": "dispatch_awq",
        "peft.tuners.lora.eetq": "dispatch_eetq",
        "peft.tuners.lora.gptq": "dispatch_gptq",
        "peft.tuners.lora.hqq": "dispatch_hqq",
        "peft.tuners.lora.layer": "dispatch_default",
        "peft.tuners.lora.torchao": "dispatch_torchao TorchaoLoraLinear",
        "peft.tuners.lora.tp_layer": "dispatch_megatron LoraParallelLinear",
        "peft.utils.integrations": "gather_params_ctx",
        "peft.optimizers": "create_lorafa_optimizer",
    },
    "unsloth": {
        "peft": "LoraConfig TaskType get_peft_model PeftModelForCausalLM PeftModelForSequenceClassification",
        "peft.tuners.lora": "Linear Linear4bit",
        "peft.tuners.lora.bnb": "Linear4bit Linear8bitLt",
        "peft.tuners.lora.layer": "LoraLayer _LoraParameterProxy check_adapters_to_merge",
        "peft.utils.integrations": "dequantize_module_weight",
        "peft.utils.save_and_load": "get_peft_model_state_dict",
        "peft.tuners.tuners_utils": "_maybe_include_all_linear_layers",
    },
    "Ludwig": {
        "peft": "AdaLoraConfig AdaptionPromptConfig IA3Config LoraConfig PeftConfig PeftModel get_peft_model "
        "prepare_model_for_kbit_training",
        "peft.tuners.adaption_prompt.config": "TRANSFORMERS_MODEL_CONFIG",
    },
    "SimpleTuner": {
        "peft": "LoraConfig set_peft_model_state_dict",
        "peft.utils": "get_peft_model_state_dict",
        "peft.tuners.lora.layer": "LoraLayer",
        "peft.tuners.tuners_utils": "BaseTunerLayer check_adapters_to_merge",
        "peft.utils.other": "transpose",
    },
}


@pytest.mark.parametrize("client,module", [(client, module) for client in IMPORTS for module in IMPORTS[client]])
def test_names_are_there(client, module):
    found = importlib.import_module(module)
    missing = []
    for name in IMPORTS[client][module].split():
        try:
            getattr(found, name)
        except (AttributeError, ImportError):
            missing.append(name)
    assert not missing, f"{module} lacks {missing}"


def test_the_distribution_is_ours_and_answers_for_its_version():
    """Clients ask the metadata; nothing that they bring has taken the name."""
    from importlib.metadata import version

    from packaging.version import Version

    assert version("peft") == peft.__version__
    assert Version(peft.__version__) >= Version("0.21.2")


class TestAxolotl:
    def test_its_patch_of_injection_redirects_a_target(self, monkeypatch):
        """It replaces `LoraModel._create_and_replace`, to adapt a child of the target in the target's place."""

        class Clipped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.linear(x).clamp(-1, 1)

        original = LoraModel._create_and_replace

        def patched(self, peft_config, adapter_name, target, target_name, parent, current_key=None, **kw):
            if isinstance(target, Clipped):
                target, target_name, parent = target.linear, "linear", target
            return original(
                self, peft_config, adapter_name, target, target_name, parent, current_key=current_key, **kw
            )

        monkeypatch.setattr(LoraModel, "_create_and_replace", patched)
        model = get_peft_model(nn.Sequential(Clipped(), nn.Linear(4, 2)), LoraConfig(target_modules=["0"], r=2))
        assert type(model.base_model.model[0]) is Clipped
        assert hasattr(model.base_model.model[0].linear, "lora_A")

    def test_it_tries_the_conversion_of_a_config(self):
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers,
            get_model_conversion_mapping,
        )

        config = lora()
        model = llama()
        convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))
        assert set(config.target_modules) == {"q_proj", "v_proj"}

    def test_it_draws_every_pair_anew_and_asks_wrappers_of_experts(self):
        from peft.tuners.lora.layer import LoraLayer, ParamWrapper

        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Parameter(torch.randn(3, 6, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.einsum("bi,eio->bo", x, self.up)

        base = nn.Sequential(nn.Linear(6, 6), Experts())
        model = get_peft_model(base, LoraConfig(target_modules=["0"], target_parameters=["1.up"], r=2))
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and getattr(module, "lora_A", None):
                for adapter, linear in module.lora_A.items():
                    if linear.weight.dim() != 2:
                        continue
                    with torch.no_grad():
                        linear.weight.copy_(torch.ones_like(linear.weight))
                    found[name] = (isinstance(module, ParamWrapper), module.r[adapter], tuple(linear.weight.shape))
        assert found["base_model.model.0"] == (False, 2, (2, 6))
        wrapper = model.get_submodule("base_model.model.1")
        assert found["base_model.model.1"][0]
        assert wrapper.num_experts == 3
        assert found["base_model.model.1"][2][0] == 6

    def test_its_call_of_the_config(self):
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj"],
            target_parameters=[],
            layers_to_transform=None,
            layers_pattern=None,
            lora_dropout=0.1,
            fan_in_fan_out=None,
            modules_to_save=None,
            exclude_modules=None,
            bias="none",
            task_type=TaskType.CAUSAL_LM,
        )
        model = get_peft_model(llama(), config, autocast_adapter_dtype=False)
        model.print_trainable_parameters()

    def test_it_loads_with_a_device_map(self, tmp_path):
        model = fill(get_peft_model(llama(), lora(task_type="CAUSAL_LM")), 5, only="lora_")
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(
            llama(), tmp_path, is_trainable=True, max_memory={"cpu": "256GiB"}, device_map={"": "cpu"}
        )
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)

    def test_its_other_adapter(self, tmp_path):
        config = AdaptionPromptConfig(adapter_layers=1, adapter_len=4, task_type="CAUSAL_LM")
        model = get_peft_model(llama(), config)
        model.print_trainable_parameters()
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(llama(), tmp_path, torch_dtype=torch.float16)


class TestLlamaFactory:
    def test_it_merges_all_adapters_but_the_last_and_trains_that_one(self, tmp_path):
        places = {"subfolder": None, "offload_folder": "offload", "cache_dir": None, "revision": "main", "token": None}
        folders = [tmp_path / name for name in "ab"]
        for seed, folder in enumerate(folders):
            fill(get_peft_model(llama(), lora(task_type="CAUSAL_LM")), seed + 5, only="lora_").save_pretrained(folder)
        both = PeftModel.from_pretrained(llama(), folders[0], adapter_name="a")
        both.load_adapter(folders[1], "b")
        both.base_model.set_adapter(["a", "b"])
        model = PeftModel.from_pretrained(llama(), folders[0], **places).merge_and_unload()
        model = PeftModel.from_pretrained(model, folders[1], is_trainable=True, **places)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.data = parameter.data.to(torch.float32)
        torch.testing.assert_close(logits(model), logits(both))
        assert any(p.requires_grad for p in model.parameters())

    def test_its_names_for_files(self, tmp_path):
        get_peft_model(llama(), lora()).save_pretrained(tmp_path)
        assert os.path.exists(tmp_path / peft.utils.SAFETENSORS_WEIGHTS_NAME)

    def test_pissa_is_started_and_saved_as_plain_lora(self, tmp_path):
        try:
            model = get_peft_model(llama(), lora(init_lora_weights="pissa", task_type="CAUSAL_LM"))
        except ValueError as error:
            if "not supported yet" not in str(error):
                raise
            pytest.skip(str(error))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter += 0.1
        want = logits(model)
        model.save_pretrained(tmp_path / "backup")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(llama(), tmp_path / "plain")), want, rtol=1e-3, atol=1e-3
        )


class TestSwift:
    def test_a_config_with_fields_of_its_own(self, tmp_path):
        @dataclasses.dataclass
        class Config(LoraConfig):
            lora_dtype: str | None = None
            lorap_lr_ratio: float = 16.0

            def to_peft_config(self) -> LoraConfig:
                fields = dataclasses.asdict(self)
                del fields["lora_dtype"], fields["lorap_lr_ratio"]
                return LoraConfig(**fields)

        own = Config(r=4, target_modules=["q_proj"], lora_dtype="bf16")
        plain = own.to_peft_config()
        assert type(plain) is LoraConfig
        assert plain.target_modules == {"q_proj"}
        model = get_peft_model(llama(), own)
        assert model.peft_config["default"].lorap_lr_ratio == 16.0
        plain.save_pretrained(tmp_path)
        again = peft.PeftConfig.from_pretrained(tmp_path)
        assert Config(**again.to_dict()).r == 4

    @pytest.mark.parametrize("method", ["Lora", "Vera", "BOFT", "IA3", "FourierFT"])
    def test_its_patch_of_injection_leaves_modules_out(self, monkeypatch, method):
        """It replaces `_create_and_replace`, finds the target among the arguments and may return without doing it."""
        cls = getattr(peft, f"{method}Model")
        original = cls._create_and_replace
        seen = []

        def target_of(args: Any, kwargs: Any) -> nn.Module:
            return kwargs.get("target", next((a for a in args if isinstance(a, nn.Module)), None))

        def patched(self, *args: Any, **kwargs: Any) -> Any:
            target = target_of(args, kwargs)
            seen.append(type(target))
            if isinstance(target, Conv1D):
                return None
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "_create_and_replace", patched)
        kwargs: dict[str, Any] = {"target_modules": ["0", "1"]}
        if method == "IA3":
            kwargs["feedforward_modules"] = []
        if method == "BOFT":
            kwargs["boft_block_size"] = 2
        if method == "FourierFT":
            kwargs["n_frequency"] = 4
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, 8), Conv1D(8, 8)), getattr(peft, f"{method}Config")(**kwargs)
        )
        assert seen == [nn.Linear, Conv1D]
        assert hasattr(model.base_model.model[0], "base_layer")
        assert not hasattr(model.base_model.model[1], "base_layer")

    def test_its_patch_of_the_constructor(self, monkeypatch):
        from peft.tuners.lora import LoraLayer

        original = LoraModel.__init__

        def init(self, model, config, adapter_name):
            original(self, model, config, adapter_name)
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.lora_A[adapter_name].to(torch.bfloat16)

        monkeypatch.setattr(LoraModel, "__init__", init)
        model = LoraModel(llama(), {"default": lora()}, "default")
        assert any(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if "lora_A" in name)

    def test_methods_it_adds_to_the_wrapper(self, monkeypatch):
        monkeypatch.setattr(PeftModel, "activate_adapter", PeftModel.set_adapter, raising=False)
        model = get_peft_model(llama(), lora())
        model.add_adapter("two", lora())
        model.activate_adapter("two")
        assert model.active_adapter == "two"

    def test_its_reading_of_adalora(self):
        """It computes the regularisation and the masks by itself, from the names of parameters."""
        config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(llama(), config)
        tuner = model.base_model
        assert tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight == 0.5
        names = [name for name, _ in tuner.model.named_parameters() if "default" in name]
        for part in ("lora_A", "lora_B", "lora_E"):
            assert sum(f"{part}.default" in name for name in names) == 2
        allocator = tuner.rankallocator
        model(input_ids=IDS, labels=IDS).loss.backward()
        allocator.update_ipt(tuner.model)
        for name in names:
            if "lora_E" in name:
                score = allocator._element_score(name)
                entries = allocator._element_score(name.replace("lora_E", "lora_A"))
                assert allocator._combine_ipt(score, entries.mean(1, keepdim=True)).numel() == 4
        assert allocator.init_bgt == 8
        assert allocator.adapter_name == "default"

    def test_a_group_of_parameters_by_the_module_of_a_name(self):
        from functools import reduce

        model = get_peft_model(llama(), lora())
        for name, parameter in model.base_model.named_parameters():
            if parameter.requires_grad:
                module = reduce(getattr, name.split(".")[:-2], model.base_model)
                assert isinstance(module, nn.ModuleDict)


class TestUnsloth:
    def test_what_its_kernels_read_from_a_layer(self):
        model = fill(get_peft_model(llama(), lora(use_dora=True)), 5, only="lora_")
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.base_layer is layer.get_base_layer()
        assert not layer.disable_adapters
        assert not layer.merged
        adapter = layer.active_adapters[0] if hasattr(layer, "active_adapters") else layer.active_adapter
        weight, a, b = layer.base_layer.weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        assert layer.weight is weight
        assert layer.bias is None
        want = weight + layer.scaling[adapter] * b @ a
        assert want.shape == weight.shape
        assert layer.lora_magnitude_vector[adapter].weight.shape == (16,)
        assert layer.lora_dropout[adapter].__class__ is nn.Identity

    def test_it_gathers_layer_classes_from_the_files_of_the_folder(self):
        import peft.tuners.lora as folder

        found = {}
        for path in sorted(Path(folder.__file__).parent.glob("*.py")):
            if path.name == "__init__.py":
                continue
            module = importlib.import_module(f"peft.tuners.lora.{path.stem}")
            for name in dir(module):
                if name.startswith("Linear") or name.endswith("Linear"):
                    found[f"{path.stem}.{name}"] = getattr(module, name)
        assert isinstance(
            get_peft_model(llama(), lora()).base_model.model.model.layers[0].self_attn.q_proj, found["layer.Linear"]
        )
        assert all(callable(cls) for cls in found.values())

    def test_its_pattern_for_targets(self):
        pattern = (
            r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj))"
            r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"
        )
        model = get_peft_model(llama(), LoraConfig(target_modules=pattern, r=2))
        assert sum(hasattr(m, "lora_A") for m in model.modules()) == 4

    def test_forward_of_a_layer_can_be_replaced(self):
        """It gives instances, and the class, a forward of its own."""
        model = fill(get_peft_model(llama(), lora(task_type="CAUSAL_LM")), 5, only="lora_")
        want = logits(model)
        for module in model.modules():
            if hasattr(module, "lora_A"):

                def forward(x: torch.Tensor, layer: Any = module) -> torch.Tensor:
                    pair = layer.lora_B["default"](layer.lora_A["default"](x))
                    return layer.base_layer(x) + layer.scaling["default"] * pair

                module.forward = forward
        torch.testing.assert_close(logits(model), want)


class TestLudwig:
    @pytest.mark.parametrize(
        "config",
        [
            lambda: LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"),
            lambda: IA3Config(
                target_modules=None, feedforward_modules=None, fan_in_fan_out=False, modules_to_save=None,
                init_ia3_weights=True, task_type="CAUSAL_LM",
            ),
            lambda: AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
            lambda: AdaLoraConfig(
                r=8, lora_alpha=16, lora_dropout=0.05, bias="none", target_r=8, init_r=12, tinit=0, tfinal=0, deltaT=1,
                beta1=0.85, beta2=0.85, orth_reg_weight=0.5, total_step=10, rank_pattern=None,
            ),
        ],
        ids=["lora", "ia3", "adaption_prompt", "adalora"],
    )  # fmt: skip
    def test_its_configs(self, config, tmp_path):
        model = get_peft_model(llama(), config())
        model(input_ids=IDS, labels=IDS).loss.backward()
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=False)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)

    def test_it_unloads_with_a_progress_bar(self):
        model = fill(get_peft_model(llama(), lora(task_type="CAUSAL_LM")), 5, only="lora_")
        want = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload(progressbar=True)), want)


class TestSimpleTuner:
    def test_a_layer_of_its_own(self):
        """A module that is also a `LoraLayer`, registered for a class of base layers."""
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.tuners_utils import check_adapters_to_merge
        from peft.utils.other import transpose

        class Odd(nn.Linear):
            pass

        class OddLora(nn.Module, LoraLayer):
            def __init__(self, base_layer, adapter_name, config, r=0, lora_alpha=1, **kwargs):
                super().__init__()
                LoraLayer.__init__(self, base_layer)
                self.fan_in_fan_out = config.fan_in_fan_out
                self._active_adapter = adapter_name
                self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

            def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                result = self.base_layer(x)
                if self.disable_adapters or self.merged:
                    return result
                for name in self.active_adapters:
                    if name in self.lora_A:
                        pair = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
                        result = result + pair * self.scaling[name]
                return result

            def get_delta_weight(self, name: str) -> torch.Tensor:
                product = self.lora_B[name].weight @ self.lora_A[name].weight
                return transpose(product, fan_in_fan_out=self.fan_in_fan_out) * self.scaling[name]

            def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
                for name in check_adapters_to_merge(self, adapter_names):
                    self.get_base_layer().weight.data += self.get_delta_weight(name)
                    self.merged_adapters.append(name)

            def unmerge(self) -> None:
                while self.merged_adapters:
                    self.get_base_layer().weight.data -= self.get_delta_weight(self.merged_adapters.pop())

        config = LoraConfig(target_modules=["0", "1"], r=2)
        config._register_custom_module({Odd: OddLora})
        assert config.target_modules == {"0", "1"}
        torch.manual_seed(0)
        base = nn.Sequential(Odd(6, 6), nn.Linear(6, 4))
        x = torch.randn(3, 6)
        plain = base(x)
        model = fill(get_peft_model(base, config), 5, only="lora_")
        assert isinstance(model.base_model.model[0], OddLora)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            f"base_model.model.{i}.lora_{part}.default.weight" for i in (0, 1) for part in "AB"
        }
        want = model(x)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), plain)
        model.merge_adapter()
        torch.testing.assert_close(model(x), want)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), want)
