"""The model with adapters: which ones act and train, what is saved under which name, and models of mixed methods."""

from __future__ import annotations

import copy
import cProfile
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Attention, Mlp, tiny_llama

import peft
from peft import (
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    PeftModel,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    ShadowConfig,
    TaskType,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.core.layer.weight import base_weight


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[3, 14, 15, 9], [5, 3, 5, 8]])
PREFIX = "base_model.model."
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def lora(*targets: str, **kwargs: Any) -> LoraConfig:
    """A LoRA with an effect, by default on both linear layers of an Mlp."""
    return LoraConfig(
        **{"r": 2, "target_modules": list(targets) or ["lin0", "lin1"], "init_lora_weights": False, **kwargs}
    )


def mlp(config: Any = None, name: str = "default", **kwargs: Any) -> PeftModel:
    """The same Mlp each time, with an adapter."""
    torch.manual_seed(0)
    return get_peft_model(Mlp(), config or lora(), name, **kwargs)


def two() -> PeftModel:
    """An Mlp with the adapters "default" and "two"."""
    model = mlp()
    model.add_adapter("two", lora("lin1", r=3))
    return model


def trains(model: nn.Module) -> set[str]:
    """Names of the adapters that train; "base" for anything else."""
    return {
        next((a for a in model.peft_config if f".{a}." in f"{name}."), "base")
        for name, p in model.named_parameters()
        if p.requires_grad
    }


# --- which adapters act and train -----------------------------------------------------------------------------


class TestWhatTrains:
    def test_a_new_model_trains_its_adapter(self):
        model = mlp()
        assert trains(model) == {"default"}
        assert model.peft_config["default"].inference_mode is False
        assert model.active_adapter == "default" and model.active_adapters == ["default"]

    def test_a_further_adapter_is_inactive_and_frozen(self):
        model = mlp()
        before = model(X)
        model.add_adapter("two", lora())
        assert trains(model) == {"default"} and model.active_adapters == ["default"]
        assert torch.equal(model(X), before)

    def test_set_adapter_activates_and_trains_one(self):
        model = two()
        model.set_adapter("two")
        assert trains(model) == {"two"} and model.active_adapter == "two"
        model.set_adapter("two", inference_mode=True)
        assert trains(model) == set()
        model.set_adapter("default")
        assert trains(model) == {"default"}
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)  # as scripts do
        model.set_adapter("two")
        assert trains(model) == {"two"}

    def test_what_is_activated_while_switched_off_trains_alone_afterwards(self):
        model = two()
        with model.disable_adapter():
            model.set_adapter("two")
        assert trains(model) == {"two"}
        model.base_model.disable_adapter_layers()
        model.set_adapter("default", inference_mode=True)
        model.base_model.enable_adapter_layers()
        assert trains(model) == set()

    def test_a_tuner_names_what_is_active_as_it_was_told(self):
        """A list from the start and after a deletion, as programs that index it expect of 0.21.2."""
        model = two()
        tuner = model.base_model
        assert tuner.active_adapter == ["default"]
        model.set_adapter("two")
        assert tuner.active_adapter == "two"
        model.add_adapter("three", lora())
        model.delete_adapter("three")
        assert tuner.active_adapter == "two"
        tuner.set_adapter(["default", "two"])
        assert tuner.active_adapter == ["default", "two"]
        model.delete_adapter("default")
        assert tuner.active_adapter == ["two"]

    def test_the_first_by_name_follows_an_active_adapter_that_is_deleted(self):
        model = two()
        model.add_adapter("another", lora())
        with pytest.warns(UserWarning, match="'another' is active now"):
            model.delete_adapter("default")
        assert model.active_adapter == "another" and trains(model) == {"another"}

    @pytest.mark.parametrize("mixed", [False, True])
    def test_a_model_names_one_active_adapter_and_a_layer_lists_them(self, mixed):
        model = get_peft_model(Mlp(), lora(modules_to_save=["lin1"]), mixed=mixed)
        model.add_adapter("two", lora())
        layer, saved = model.base_model.model.lin0, model.base_model.model.lin1
        one = (lambda name: [name]) if mixed else str
        assert (layer.active_adapter, saved.active_adapter) == (["default"], "default")
        assert model.active_adapter == one("default")
        model.base_model.set_adapter(["default", "two"])
        assert (layer.active_adapter, saved.active_adapter) == (["default", "two"], "default")
        assert model.active_adapter == (["default", "two"] if mixed else "default")
        model.set_adapter("two")
        assert (layer.active_adapter, saved.active_adapter) == (["two"], [])
        assert model.active_adapter == one("two")

    def test_several_at_once(self):
        model = two()
        alone = {}
        for name in ("default", "two"):
            model.set_adapter(name)
            alone[name] = model(X).detach()
        model.base_model.set_adapter(["default", "two"])
        assert trains(model) == {"default", "two"} and model.active_adapters == ["default", "two"]
        both = model(X)
        assert not any(torch.allclose(both, y, atol=1e-3) for y in alone.values())
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(X), both, **CLOSE)
        model.set_adapter("two")
        assert torch.equal(model(X), alone["two"])

    def test_a_loaded_adapter_is_frozen(self, tmp_path):
        two().save_pretrained(tmp_path)
        model = mlp()
        model.load_adapter(tmp_path / "two", "two")
        assert trains(model) == {"default"} and model.active_adapters == ["default"]
        assert model.peft_config["two"].inference_mode is True
        model.set_adapter("two")  # whoever activates it may train it
        assert trains(model) == {"two"}

    def test_a_loaded_adapter_may_train_beside_the_active_one(self, tmp_path):
        two().save_pretrained(tmp_path)
        model = mlp()
        model.load_adapter(tmp_path / "two", "two", is_trainable=True)
        assert trains(model) == {"default", "two"} and model.active_adapters == ["default"]
        assert model.peft_config["two"].inference_mode is False

    def test_from_pretrained_is_frozen_and_evaluates(self, tmp_path):
        mlp().save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(Mlp(), tmp_path)
        assert trains(model) == set() and not model.training
        assert model.peft_config["default"].inference_mode is True
        model.add_adapter("two", lora())
        assert trains(model) == set()
        model.set_adapter("two")
        assert trains(model) == {"two"}

    def test_from_pretrained_for_training(self, tmp_path):
        mlp().save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(Mlp(), tmp_path, is_trainable=True)
        assert trains(model) == {"default"} and model.training
        assert model.peft_config["default"].inference_mode is False

    def test_disabled_nothing_trains_and_afterwards_the_same_does(self):
        model = two()
        model.set_requires_grad("two", True)
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        with model.disable_adapter():
            assert not any(p.requires_grad for n, p in model.named_parameters() if ".default." in n)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before

    def test_set_requires_grad(self):
        model = two()
        model.set_requires_grad("default", False)
        assert trains(model) == set()
        model.set_requires_grad(["default", "two"])
        assert trains(model) == {"default", "two"} and model.active_adapters == ["default"]

    def test_whole_modules_follow_the_active_adapter(self):
        model = mlp(lora("lin0", modules_to_save=["lin1"]))
        model.add_adapter("bare", lora("lin0"))
        wrapper = model.get_base_model().lin1
        assert wrapper.modules_to_save["default"].weight.requires_grad
        assert not wrapper.original_module.weight.requires_grad
        model.set_adapter("bare")
        assert trains(model) == {"bare"} and not wrapper.modules_to_save["default"].weight.requires_grad
        model.set_adapter("default")
        assert wrapper.modules_to_save["default"].weight.requires_grad
        assert model.modules_to_save == {"lin1"}

    def test_the_base_is_frozen_whatever_comes(self, tmp_path):
        model = two()
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path / "two", "three", is_trainable=True)
        model.set_adapter("three")
        model.delete_adapter("default")
        with model.disable_adapter():
            model(X)
        model.merge_adapter()
        model.unmerge_adapter()
        assert "base" not in trains(model)


class TestDisabling:
    def test_contexts_nest(self):
        model = mlp()
        torch.manual_seed(0)
        base = Mlp()(X)
        on = model(X)
        with model.disable_adapter():
            with model.disable_adapter():
                assert torch.equal(model(X), base)
            assert torch.equal(model(X), base)
            assert not model.has_active_enabled_adapter
        assert torch.equal(model(X), on) and model.has_active_enabled_adapter

    def test_it_ends_with_an_exception(self):
        model = mlp()
        on = model(X)
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        assert torch.equal(model(X), on)

    def test_switched_off_for_good(self):
        model = mlp()
        on = model(X)
        model.base_model.disable_adapter_layers()
        off = model(X)
        with model.disable_adapter():
            assert torch.equal(model(X), off)
        assert torch.equal(model(X), off) and not torch.equal(on, off)
        model.add_adapter("two", lora())
        assert torch.equal(model(X), off)
        model.base_model.enable_adapter_layers()
        assert torch.equal(model(X), on)

    @pytest.mark.filterwarnings("ignore")
    def test_while_merged(self):
        model = mlp()
        with model.disable_adapter():
            base = model(X)
        on = model(X)
        model.merge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(X), base)
        torch.testing.assert_close(model(X), on)


class TestDeleting:
    def test_the_active_one(self):
        model = two()
        model.set_adapter("two")
        expected = model(X)
        model.set_adapter("default")
        with pytest.warns(UserWarning, match="'default'.*'two'"):
            model.delete_adapter("default")
        assert model.active_adapters == ["two"] and set(model.peft_config) == {"two"}
        assert torch.equal(model(X), expected)
        assert trains(model) == {"two"}
        assert not any(".default." in name for name, _ in model.named_parameters())

    def test_an_inactive_one(self, recwarn):
        model = two()
        expected = model(X)
        model.delete_adapter("two")
        assert torch.equal(model(X), expected) and model.active_adapters == ["default"]
        assert not [w for w in recwarn if "active" in str(w.message)]

    def test_the_last_one(self):
        model = mlp()
        with model.disable_adapter():
            base = model(X)
        model.delete_adapter("default")
        assert model.active_adapters == [] and not model.peft_config
        assert torch.equal(model(X), base)
        model.add_adapter("new", lora())
        model.set_adapter("new")
        assert trains(model) == {"new"} and not torch.equal(model(X), base)

    def test_a_merged_one(self):
        model = two()
        model.set_adapter("two")
        expected = model(X)
        model.set_adapter("default")
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            model.delete_adapter("default")
        model.unmerge_adapter()
        with pytest.warns(UserWarning):
            model.delete_adapter("default")
        torch.testing.assert_close(model(X), expected, **CLOSE)

    def test_shared_tensors_of_the_others_stay(self):
        model = mlp(VeraConfig(r=4, target_modules=["lin0"], init_weights=False))
        model.add_adapter("two", VeraConfig(r=4, target_modules=["lin0"], init_weights=False))
        expected = model(X)
        model.delete_adapter("two")
        assert torch.equal(model(X), expected)
        assert list(model.base_model.vera_A) == ["default"]


class TestMerging:
    def test_merging_twice(self):
        model = mlp()
        model.merge_adapter()
        merged = model(X)
        with pytest.warns(UserWarning, match="merged already"):
            model.merge_adapter()
        assert torch.equal(model(X), merged)

    def test_unmerging_what_is_not_merged(self):
        with pytest.warns(UserWarning, match="nothing to unmerge"):
            mlp().unmerge_adapter()

    def test_one_after_the_other(self):
        model = two()
        before = copy.deepcopy(model.get_base_model().lin1.base_layer.weight)
        model.merge_adapter(["two"])
        model.merge_adapter(["default"])
        assert model.get_base_model().lin1.merged_adapters == ["two", "default"]
        merged = model(X)
        model.unmerge_adapter()
        torch.testing.assert_close(model.get_base_model().lin1.base_layer.weight, before)
        model.base_model.set_adapter(["default", "two"])
        torch.testing.assert_close(model(X), merged, **CLOSE)

    def test_setting_another_adapter_unmerges(self):
        model = two()
        model.set_adapter("two")
        expected = model(X)
        model.set_adapter("default")
        model.merge_adapter()
        with pytest.warns(UserWarning, match="unmerged"):
            model.set_adapter("two")
        torch.testing.assert_close(model(X), expected, **CLOSE)

    def test_only_some_adapters(self):
        model = two()
        model.set_adapter("two")
        expected = model(X)
        model.set_adapter("default")
        torch.testing.assert_close(model.merge_and_unload(adapter_names=["two"])(X), expected, **CLOSE)

    def test_saving_while_merged_writes_the_adapter(self, tmp_path):
        model = mlp()
        expected = model(X)
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        assert torch.equal(PeftModel.from_pretrained(Mlp(), tmp_path)(X), expected)

    def test_loading_new_values_into_a_merged_adapter(self, tmp_path):
        torch.manual_seed(0)
        other = get_peft_model(Mlp(), lora())
        with torch.no_grad():
            for p in other.parameters():
                if p.requires_grad:
                    p.mul_(3)
        other.save_pretrained(tmp_path)
        model = mlp()
        model.merge_adapter()
        model.load_adapter(tmp_path, "default")
        torch.testing.assert_close(model(X), other(X), **CLOSE)

    def test_bias_of_an_adapter_whose_layers_come_later(self):
        """A further adapter wraps a layer before those of the active one."""
        model = mlp(lora("lin1", bias="all"))
        set_peft_model_state_dict(model, {k: v + 1 for k, v in get_peft_model_state_dict(model).items()})
        model.add_adapter("two", lora("lin0"))
        expected = model(X)
        torch.testing.assert_close(model.merge_and_unload()(X), expected, **CLOSE)


# --- names and counts -----------------------------------------------------------------------------------------


class TestNames:
    def test_in_memory_and_in_the_file(self):
        model = mlp(lora("lin0", modules_to_save=["lin1"]))
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert names == {
            f"{PREFIX}lin0.lora_A.default.weight",
            f"{PREFIX}lin0.lora_B.default.weight",
            f"{PREFIX}lin1.modules_to_save.default.weight",
            f"{PREFIX}lin1.modules_to_save.default.bias",
        }
        assert {f"{PREFIX}lin0.base_layer.weight", f"{PREFIX}lin1.original_module.weight"} <= set(model.state_dict())
        assert set(get_peft_model_state_dict(model)) == {
            f"{PREFIX}lin0.lora_A.weight",
            f"{PREFIX}lin0.lora_B.weight",
            f"{PREFIX}lin1.weight",
            f"{PREFIX}lin1.bias",
        }

    @pytest.mark.parametrize("mode", ["all", "lora_only"])
    def test_biases(self, mode):
        model = mlp(lora("lin0", bias=mode))
        names = {n.removeprefix(PREFIX) for n in get_peft_model_state_dict(model) if n.endswith("bias")}
        assert names == {"lin0.base_layer.bias"} | ({"lin1.bias", "norm.bias"} if mode == "all" else set())

    def test_embeddings(self):
        def names(config: LoraConfig, **kwargs: Any) -> set[str]:
            model = get_peft_model(tiny_llama(), config)
            found = get_peft_model_state_dict(model, **kwargs)
            return {n.removeprefix(PREFIX) for n in found if "lora" not in n}

        plain, embedding = lora("q_proj"), lora("q_proj", "embed_tokens")
        assert names(plain) == set()
        assert names(embedding) == {"model.embed_tokens.base_layer.weight"}
        assert names(lora("lm_head")) == {"lm_head.base_layer.weight"}
        assert names(embedding, save_embedding_layers=False) == set()
        assert {"lm_head.weight", "model.embed_tokens.weight"} == names(plain, save_embedding_layers=True)

    def test_saved_embeddings_are_loaded(self, tmp_path):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), lora("embed_tokens", "q_proj"))
        with torch.no_grad():  # as after resize_token_embeddings
            model.get_base_model().model.embed_tokens.base_layer.weight[7] = 1.0
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        assert torch.equal(again(torch.tensor([[7, 3]])).logits, model.eval()(torch.tensor([[7, 3]])).logits)

    def test_tokens(self):
        model = get_peft_model(tiny_llama(), lora("q_proj", trainable_token_indices=[3]))
        assert f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta" in get_peft_model_state_dict(model)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta.default" in names

    def test_counts(self, capsys):
        model = mlp(lora("lin0"))
        trained, total = model.get_nb_trainable_parameters()
        assert (trained, total) == (28, 28 + sum(p.numel() for p in Mlp().parameters()))
        model.print_trainable_parameters()
        printed = capsys.readouterr().out.strip()
        assert printed == f"trainable params: 28 || all params: {total} || trainable%: {100 * 28 / total:.4f}"

    def test_thousands_are_set_apart(self, capsys):
        model = get_peft_model(nn.Sequential(nn.Linear(300, 300)), LoraConfig(r=2, target_modules=["0"]))
        model.print_trainable_parameters()
        assert "trainable params: 1,200 || all params: 91,500 || trainable%: 1.3115" in capsys.readouterr().out

    def test_what_it_answers_about_itself(self):
        base = tiny_llama()
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
        assert model.get_base_model() is base and model.base_model.model is base
        assert model.config is base.config and model.device == base.device and model.dtype == base.dtype
        assert model.base_model_torch_dtype == torch.float32
        assert model.active_peft_config is model.peft_config["default"]
        assert not model._is_prompt_learning and model.modules_to_save is None
        assert model.peft_config["default"].task_type == TaskType.CAUSAL_LM
        with pytest.raises(AttributeError, match="nonsense"):
            getattr(model, "non" + "sense")


class TestStatus:
    def test_of_layers(self):
        model = two()
        model.merge_adapter(["two"])
        status = {s.name: s for s in model.get_layer_status()}
        assert set(status) == {"model.lin0", "model.lin1"}
        second = status["model.lin1"]
        assert second.module_type == "lora.Linear" and second.enabled and second.active_adapters == ["default"]
        assert second.merged_adapters == ["two"] and second.available_adapters == ["default", "two"]
        assert second.requires_grad == {"default": True, "two": False}
        assert second.devices == {"default": ["cpu"], "two": ["cpu"]}
        assert status["model.lin0"].available_adapters == ["default"]

    def test_of_the_model(self):
        model = two()
        status = model.get_model_status()
        assert status.base_model_type == "Mlp" and status.adapter_model_type == "LoraModel"
        assert status.peft_types == {"default": "LORA", "two": "LORA"}
        assert status.num_adapter_layers == 2 and status.enabled is True
        assert status.active_adapters == ["default"] and status.merged_adapters == []
        assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
        model.get_base_model().lin0.enable_adapters(False)
        assert model.get_model_status().enabled == "irregular"

    def test_of_a_model_without_adapters(self):
        with pytest.raises(ValueError, match="No adapter layers found"):
            peft.get_model_status(Mlp())


# --- files ----------------------------------------------------------------------------------------------------


class TestFiles:
    def test_the_folders(self, tmp_path):
        two().save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "two"]
        assert sorted(os.listdir(tmp_path / "two")) == ["adapter_config.json", "adapter_model.safetensors"]
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_some_of_the_adapters(self, tmp_path):
        two().save_pretrained(tmp_path, selected_adapters=["two"])
        assert sorted(os.listdir(tmp_path)) == ["README.md", "two"]

    def test_all_adapters_come_back(self, tmp_path):
        model = two()
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(Mlp(), tmp_path)
        result = again.load_adapter(tmp_path, "two", subfolder="two")
        assert not result.missing_keys and not result.unexpected_keys
        for name in ("default", "two"):
            model.set_adapter(name)
            again.set_adapter(name)
            assert torch.equal(model(X), again(X))

    def test_a_sub_folder_first(self, tmp_path):
        model = two()
        model.set_adapter("two")
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(Mlp(), tmp_path, adapter_name="mine", subfolder="two")
        assert again.active_adapters == ["mine"] and torch.equal(again(X), model(X))

    def test_the_config(self, tmp_path):
        model = mlp(lora(modules_to_save=["norm"], task_type=None))
        model.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        assert content["peft_type"] == "LORA" and content["inference_mode"] is True
        assert content["target_modules"] == ["lin0", "lin1"] and content["peft_version"] == peft.__version__
        assert content["auto_mapping"] == {"base_model_class": "Mlp", "parent_library": Mlp.__module__}
        assert model.peft_config["default"].inference_mode is False  # only the file says so
        assert model.peft_config["default"].auto_mapping is None

    def test_the_base_is_recorded(self, tmp_path):
        base = tiny_llama()
        base.save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / "out")
        content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert content["base_model_name_or_path"] == str(tmp_path / "base") and content["task_type"] == "CAUSAL_LM"
        assert content["auto_mapping"] is None

    def test_a_pickle_if_asked_for(self, tmp_path):
        model = mlp()
        model.save_pretrained(tmp_path, safe_serialization=False)
        assert "adapter_model.bin" in os.listdir(tmp_path)
        assert "adapter_model.safetensors" not in os.listdir(tmp_path)
        assert set(torch.load(tmp_path / "adapter_model.bin", weights_only=True)) == set(
            get_peft_model_state_dict(model)
        )
        torch.manual_seed(0)
        assert torch.equal(PeftModel.from_pretrained(Mlp(), tmp_path)(X), model(X))

    def test_only_the_main_process_writes(self, tmp_path):
        mlp().save_pretrained(tmp_path / "out", is_main_process=False)
        assert not (tmp_path / "out").exists()

    def test_the_state_dict_of_the_whole_model(self, tmp_path):
        """As gathered from the shards: values come from it, and what is no adapter's is left out."""
        model = mlp(lora("lin0", modules_to_save=["lin1"], bias="lora_only"))
        gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=gathered)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        own = get_peft_model_state_dict(model)
        assert stored.keys() == own.keys() and len(own) == 5
        for name in own:
            assert torch.equal(stored[name], own[name] + 1), name

    def test_the_state_dict_of_shared_tensors(self):
        model = mlp(VeraConfig(r=4, target_modules=["lin0"]))
        gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        found, own = get_peft_model_state_dict(model, gathered), get_peft_model_state_dict(model)
        for name in own:
            assert torch.equal(found[name], own[name] + 1), name

    def test_an_old_pickle_does_not_shadow_nor_a_safetensors_file_hide(self, tmp_path):
        """The format of the last save is the one that is read."""
        model = mlp()
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(1)
        model.save_pretrained(tmp_path, safe_serialization=False)
        torch.manual_seed(0)
        assert torch.equal(PeftModel.from_pretrained(Mlp(), tmp_path)(X), model(X))

    @pytest.mark.parametrize("by", ["from_pretrained", "load_adapter"])
    def test_key_mapping(self, tmp_path, by):
        model = mlp()
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        save_file({k.replace("model.lin", "model.old.linear_"): v for k, v in load_file(path).items()}, path)
        mapping = {r"^base_model\.model\.old\.linear_(\d)": r"base_model.model.lin\1"}
        torch.manual_seed(0)
        if by == "from_pretrained":
            again = PeftModel.from_pretrained(Mlp(), tmp_path, key_mapping=mapping)
        else:
            again = get_peft_model(Mlp(), lora("lin0"))
            again.load_adapter(tmp_path, "again", key_mapping=mapping)
            again.set_adapter("again")
        assert torch.equal(again(X), model(X))

    def test_a_config_given_instead(self, tmp_path):
        model = mlp()
        model.save_pretrained(tmp_path)
        config = lora(lora_alpha=64)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(Mlp(), tmp_path, config=config)
        assert again.get_base_model().lin0.scaling["default"] == 32

    def test_file_names_without_a_prefix_are_understood(self):
        """Tensors of an injected model fit into a PeftModel, and the other way round."""
        model = mlp()
        tensors = {k.removeprefix(PREFIX): v + 1 for k, v in get_peft_model_state_dict(model).items()}
        result = set_peft_model_state_dict(model, tensors)
        assert not result.unexpected_keys
        assert torch.equal(
            get_peft_model_state_dict(model)[f"{PREFIX}lin0.lora_A.weight"], tensors["lin0.lora_A.weight"]
        )

    def test_saving_twice_into_the_same_folder(self, tmp_path):
        model = two()
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        model.save_pretrained(tmp_path)
        own = get_peft_model_state_dict(model)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert all(torch.equal(stored[k], own[k]) for k in own)

    def test_values_loaded_do_not_alias_those_given(self):
        model = mlp()
        tensors = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
        set_peft_model_state_dict(model, tensors)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        assert not any(torch.equal(tensors[k], v) for k, v in get_peft_model_state_dict(model).items())


class TestSecondModel:
    def test_adapting_an_adapted_model_warns(self):
        model = mlp()
        with pytest.warns(UserWarning):
            get_peft_model(model.get_base_model(), lora(), "second")

    def test_a_model_with_a_frozen_dict_is_left_as_it_was(self):
        """As those of diffusers have for their config."""

        class Frozen(dict):
            def _refuse(self, *args, **kwargs):
                raise TypeError("frozen")

            __setitem__ = update = clear = pop = _refuse

        model = Mlp()
        model._internal_dict = Frozen(width=6)
        adapted = get_peft_model(model, lora("lin0"))
        expected = adapted(X)
        with pytest.warns(UserWarning, match="which the new one replaces"), pytest.raises(ValueError, match="nowhere"):
            get_peft_model(model, lora("nowhere"))
        assert torch.equal(adapted(X), expected) and model._internal_dict == {"width": 6}

    def test_a_file_for_an_adapted_model_replaces_what_it_wears(self, tmp_path):
        """Of the PeftModel itself, as for its base: what a notebook cell does that runs twice."""
        model = mlp()
        model.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="which the new one replaces"):
            again = PeftModel.from_pretrained(model, tmp_path)
        assert torch.equal(again(X), mlp()(X)) and not isinstance(again.get_base_model(), PeftModel)

    def test_an_unloaded_model_can_be_adapted_again(self):
        model = mlp()
        with model.disable_adapter():
            base = model(X)
        plain = model.unload()
        again = get_peft_model(plain, lora("lin0"))
        assert list(again.peft_config) == ["default"]
        with again.disable_adapter():
            assert torch.equal(again(X), base)

    def test_a_config_can_be_used_for_two_models(self):
        config = lora("lin0")
        first, second = get_peft_model(Mlp(), config), get_peft_model(Mlp(), config)
        assert set(get_peft_model_state_dict(first)) == set(get_peft_model_state_dict(second))


class TestRows:
    def test_names_end_with_their_call(self):
        """Not only for the next call of the PeftModel: the base model may be called directly, too."""
        model = mlp()
        expected = model(X).detach()
        names = ["__base__", "default", "__base__", "default", "default"]
        for call in (model, model.base_model, model.get_base_model()):
            mixed = model(X, adapter_names=names)
            assert not torch.allclose(mixed, expected)
            assert torch.equal(call(X), expected)
            mixed.sum().backward()

    def test_the_first_tensor_need_not_be_the_batch(self):
        model = get_peft_model(tiny_llama(), lora("q_proj", task_type="CAUSAL_LM")).eval()
        names = ["default", "__base__"]
        expected = model(IDS, adapter_names=names).logits
        found = model(position_ids=torch.arange(4)[None], input_ids=IDS, adapter_names=names).logits
        torch.testing.assert_close(found, expected)


class TestModulesToSave:
    def test_targets_inside_are_left_out(self, tmp_path):
        config = lora("q_proj", "up_proj", modules_to_save=["mlp"])
        model = get_peft_model(tiny_llama(), config)
        names = get_peft_model_state_dict(model)
        assert len(names) == 2 * (2 + 3) and not any("up_proj.lora" in name for name in names)

    def test_a_copy_holds_no_other_adapter(self, tmp_path):
        torch.manual_seed(0)
        base = tiny_llama()
        plain = copy.deepcopy(base)
        model = get_peft_model(base, lora("up_proj"), "one")
        model.add_adapter("two", lora("q_proj", modules_to_save=["mlp"]))
        names = get_peft_model_state_dict(model, adapter_name="two")
        assert not any("lora" in name or "base_layer" in name for name in names if "mlp" in name)
        outputs = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            outputs[name] = model(IDS).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "two")
        torch.testing.assert_close(again(IDS).logits, outputs["two"])
        model.set_adapter("one")
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, outputs["one"], **CLOSE)

    def test_one_adapter_adapts_what_another_trains_whole(self):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), lora("lm_head", "q_proj"), "one")
        model.add_adapter("two", lora("q_proj", modules_to_save=["lm_head"]))
        assert f"{PREFIX}lm_head.lora_A.weight" in get_peft_model_state_dict(model, adapter_name="one")
        assert f"{PREFIX}lm_head.weight" in get_peft_model_state_dict(model, adapter_name="two")
        for name in ("one", "two"):
            model.set_adapter(name)
            expected = model(IDS).logits
            torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(IDS).logits, expected, **CLOSE)


def test_pickling_a_whole_model(tmp_path):
    model = get_peft_model(tiny_llama(), lora("q_proj", trainable_token_indices=[1, 2], modules_to_save=["lm_head"]))
    expected = model.eval()(IDS).logits
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(IDS).logits, expected)
    torch.testing.assert_close(again.merge_and_unload()(IDS).logits, expected, **CLOSE)


def test_trained_biases_follow_the_dtype_of_the_model():
    model = mlp(lora("lin0", bias="all")).to(torch.bfloat16)
    with model.disable_adapter():
        assert model(X.bfloat16()).dtype == torch.bfloat16
    assert model(X.bfloat16()).dtype == torch.bfloat16
    assert model.unload()(X.bfloat16()).dtype == torch.bfloat16


class TestScaling:
    def test_of_a_layer(self):
        model = two()
        layer = model.get_base_model().lin1
        start = dict(layer.scaling)
        layer.scale_layer(2)
        assert layer.scaling == {"default": 2 * start["default"], "two": start["two"]}
        layer.unscale_layer(4)
        assert layer.scaling["default"] == start["default"] / 2
        layer.unscale_layer()
        assert layer.scaling == start
        layer.set_scale("two", 3)
        assert layer.scaling["two"] == 3 * start["two"]
        layer.set_scale("nobody", 3)
        assert set(layer.scaling) == {"default", "two"}


# --- several methods in one model -----------------------------------------------------------------------------


MIXABLE = {
    "lora": lambda: lora("lin0", "lin1"),
    "dora": lambda: lora("lin0", use_dora=True),
    "hira": lambda: HiraConfig(r=2, target_modules=["lin0", "lin1"], init_weights=False),
    "ia3": lambda: IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"], init_ia3_weights=False),
}
SHARING = {
    "hra": lambda: HRAConfig(r=2, target_modules=["lin0", "lin1"]),
    "oft": lambda: OFTConfig(oft_block_size=2, target_modules=["lin0", "lin1"]),
    "pvera": lambda: PveraConfig(r=4, target_modules=["lin0", "lin1"]),
    "randlora": lambda: RandLoraConfig(r=2, randlora_alpha=4, target_modules=["lin0", "lin1"]),
    "tinylora": lambda: TinyLoraConfig(u=4, r=2, target_modules=["lin0", "lin1"]),
    "unilora": lambda: UniLoraConfig(theta_d_length=16, target_modules=["lin0", "lin1"]),
    "vblora": lambda: VBLoRAConfig(num_vectors=8, vector_length=2, r=2, target_modules=["lin0", "lin1"]),
    "vera": lambda: VeraConfig(r=4, target_modules=["lin0", "lin1"]),
}


class TestMixedModel:
    def both(self, first: str, second: str) -> PeftMixedModel:
        model = mlp(MIXABLE[first](), "one", mixed=True)
        model.add_adapter("two", MIXABLE[second]())
        return model

    @pytest.mark.parametrize("second", MIXABLE)
    @pytest.mark.parametrize("first", MIXABLE)
    def test_each_alone_and_both(self, first, second):
        model = self.both(first, second)
        assert isinstance(model, PeftMixedModel)
        with model.disable_adapter():
            base = model(X)
        outputs = []
        for name, method in (("one", first), ("two", second)):
            model.set_adapter(name)
            assert trains(model) == {name}
            outputs.append(model(X).detach())
            single = mlp(MIXABLE[method](), name)
            tensors = get_peft_model_state_dict(model, adapter_name=name)
            assert tensors.keys() == get_peft_model_state_dict(single, adapter_name=name).keys()
            set_peft_model_state_dict(single, tensors, name)
            torch.testing.assert_close(single(X), outputs[-1])
        model.set_adapter(["one", "two"])
        assert trains(model) == {"one", "two"} and model.active_adapters == ["one", "two"]
        outputs.append(model(X))
        for i, left in enumerate([base, *outputs]):
            for right in [base, *outputs][i + 1 :]:
                assert not torch.allclose(left, right, atol=1e-4)
        outputs[-1].sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.merge_adapter()
        torch.testing.assert_close(model(X), outputs[-1], **CLOSE)
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), outputs[-1], **CLOSE)
        torch.testing.assert_close(model.merge_and_unload()(X), outputs[-1], **CLOSE)

    @pytest.mark.parametrize(("first", "second"), [("lora", "hira"), ("hira", "lora"), ("dora", "hira")])
    def test_saved_and_loaded(self, first, second, tmp_path):
        model = self.both(first, second)
        model.set_adapter(["one", "two"])
        expected = model(X)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftMixedModel.from_pretrained(Mlp(), tmp_path / "one", adapter_name="one")
        again.load_adapter(tmp_path / "two", "two")
        again.set_adapter(["one", "two"])
        torch.testing.assert_close(again(X), expected)
        torch.manual_seed(0)  # each file is one of its own method's
        alone = PeftModel.from_pretrained(Mlp(), tmp_path / "two")
        again.set_adapter("two")
        torch.testing.assert_close(alone(X), again(X))

    @pytest.mark.parametrize("lora_first", [True, False])
    @pytest.mark.parametrize("method", SHARING)
    def test_rotations_and_methods_that_share_tensors(self, method, lora_first, tmp_path):
        configs = [MIXABLE["lora"](), SHARING[method]()]
        configs = configs if lora_first else configs[::-1]
        model = mlp(configs[0], "one", mixed=True)
        model.add_adapter("two", configs[1])
        model.eval()
        generator = torch.Generator().manual_seed(3)
        for name in ("one", "two"):
            tensors = get_peft_model_state_dict(model, adapter_name=name)
            kinds = {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}
            set_peft_model_state_dict(model, kinds, name)
        alone = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            alone[name] = model(X)
        model.set_adapter(["one", "two"])
        both = model(X)
        assert all((both - output).abs().max() > 1e-3 for output in alone.values())
        assert (alone["one"] - alone["two"]).abs().max() > 1e-3
        rows = ["two", "one", "one", "two", "two"]
        mixed = model(X, adapter_names=rows)
        for row, name in enumerate(rows):
            torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)
        model.merge_adapter()
        torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftMixedModel.from_pretrained(Mlp(), tmp_path / "two", adapter_name="two")
        again.load_adapter(tmp_path / "one", "one")
        for name in ("one", "two"):
            again.set_adapter(name)
            torch.testing.assert_close(again(X), alone[name])
        again.delete_adapter("two")
        torch.testing.assert_close(again(X), alone["one"])

    def test_loaded_in_another_order(self, tmp_path):
        """Files know nothing of the nesting in memory."""
        model = self.both("lora", "hira")
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftMixedModel.from_pretrained(Mlp(), tmp_path / "two", adapter_name="two")
        again.load_adapter(tmp_path / "one", "one")
        for name in ("one", "two"):
            model.set_adapter(name)
            again.set_adapter(name)
            torch.testing.assert_close(again(X), model(X))

    def test_rows_with_adapters_of_different_methods(self):
        model = self.both("lora", "hira").eval()
        names = ["two", "one", "__base__", "one", "two"]
        mixed = model(X, adapter_names=names)
        for name in ("one", "two"):
            model.set_adapter(name)
            alone = model(X)
            for row, asked in enumerate(names):
                if asked == name:
                    torch.testing.assert_close(mixed[row], alone[row])
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2], model(X)[2])

    def test_deleting(self):
        model = self.both("lora", "hira")
        model.set_adapter("two")
        expected = model(X)
        model.delete_adapter(["one"])
        assert set(model.peft_config) == {"two"}
        torch.testing.assert_close(model(X), expected)
        assert not any("lora_" in name for name, _ in model.named_parameters())

    def test_whole_modules_beside_the_methods(self, tmp_path):
        model = mlp(lora("lin0", modules_to_save=["lin1"]), "one", mixed=True)
        model.add_adapter("two", HiraConfig(r=2, target_modules=["lin0"], init_weights=False))
        with torch.no_grad():
            model.get_base_model().lin1.modules_to_save["one"].weight.add_(1)
        model.set_adapter(["one", "two"])
        expected = model(X)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftMixedModel.from_pretrained(Mlp(), tmp_path / "one", adapter_name="one")
        again.load_adapter(tmp_path / "two", "two")
        again.set_adapter(["one", "two"])
        torch.testing.assert_close(again(X), expected)
        torch.testing.assert_close(model.merge_and_unload()(X), expected, **CLOSE)

    def test_methods_that_cannot_be_mixed(self):
        base = Mlp()
        with pytest.raises(ValueError, match="PROMPT_TUNING.*cannot be mixed.*LORA"):
            get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2), mixed=True)
        model = mlp(mixed=True)
        with pytest.raises(ValueError, match="SHADOW.*LORA"):
            model.add_adapter("two", ShadowConfig())
        assert set(model.peft_config) == {"default"}

    def test_three_adapters_over_one_layer(self):
        model = self.both("lora", "hira")
        model.add_adapter("three", lora("lin0", r=1))
        model.set_adapter(["one", "two", "three"])
        expected = model(X)
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(X), expected, **CLOSE)
        model.delete_adapter("two")
        model.set_adapter(["one", "three"])
        plain = mlp(lora(), "one")
        plain.add_adapter("three", lora("lin0", r=1))
        for name in ("one", "three"):
            set_peft_model_state_dict(plain, get_peft_model_state_dict(model, adapter_name=name), name)
        plain.base_model.set_adapter(["one", "three"])
        torch.testing.assert_close(model(X), plain(X))


# --- each method through the same life --------------------------------------------------------------------------


LIVES = {
    "lora": lambda: lora("lin0"),
    "ia3": lambda: IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"], init_ia3_weights=False),
    "oft": lambda: OFTConfig(target_modules=["lin0"], oft_block_size=2, init_weights=False),
    "vera": lambda: VeraConfig(target_modules=["lin0"], r=3, init_weights=False),
    "hira": lambda: HiraConfig(target_modules=["lin0"], r=2, init_weights=False),
    "ln": lambda: LNTuningConfig(target_modules=["norm"]),
    "tokens": lambda: TrainableTokensConfig(target_modules=["lin1"], token_indices=[0, 2]),
}


@pytest.mark.parametrize("method", LIVES)
def test_thirty_adapters(method, tmp_path: Path):
    """Loading, switching, saving and deleting keep the adapters apart, however many there are."""
    torch.manual_seed(0)
    base = Mlp()
    plain = copy.deepcopy(base)
    model = get_peft_model(base, LIVES[method](), "a0")
    generator = torch.Generator().manual_seed(4)
    expected = {}
    for i in range(30):
        name = f"a{i}"
        if i:
            model.add_adapter(name, LIVES[method]())
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        moved = {
            k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in tensors.items() if "vera_A" not in k
        }
        set_peft_model_state_dict(model, {**tensors, **moved}, name)
    for name in model.peft_config:
        model.set_adapter(name)
        assert trains(model) == {name}
        expected[name] = model(X).detach()
    assert len({tuple(y.flatten().tolist()) for y in expected.values()}) == 30
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path / "a29", adapter_name="a29")
    for i in range(0, 29, 7):
        again.load_adapter(tmp_path / f"a{i}", f"a{i}")
    for i in range(0, 29, 7):
        again.set_adapter(f"a{i}")
        assert torch.equal(again(X), expected[f"a{i}"])
        model.delete_adapter(f"a{i}")
    model.set_adapter("a3")
    assert torch.equal(model(X), expected["a3"])
    rows = model(X, adapter_names=["a1", "a2", "__base__", "a1", "a4"])
    torch.testing.assert_close(rows[3], expected["a1"][3])
    torch.testing.assert_close(rows[4], expected["a4"][4])


def test_a_model_that_is_itself_the_target_holder():
    """Layers directly in the root, and inside containers."""
    model = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["head"]))
    assert set(get_peft_model_state_dict(model)) == {f"{PREFIX}head.lora_A.weight", f"{PREFIX}head.lora_B.weight"}
    nested = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.ModuleList([nn.Linear(6, 6)])[0])
    adapted = get_peft_model(nested, LoraConfig(r=2, target_modules=["0.0", "1"]))
    assert adapted(X).shape == (5, 6)
    assert len(get_peft_model_state_dict(adapted)) == 4


def test_a_merged_adapter_can_be_rescaled() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6))
    x, before = torch.randn(3, 6), base[0].weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    layer = model.base_model.model[0]
    layer.scale_layer(3)
    expected = model(x)
    layer.unscale_layer()
    model.merge_adapter()
    layer.scale_layer(3)
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(layer.base_layer.weight, before)


def test_loading_does_the_same_work_whatever_the_number_of_adapters(tmp_path: Path) -> None:
    """Counted in function calls, which do not depend on the machine."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="a0")

    def calls(i: int) -> int:
        profile = cProfile.Profile()
        profile.runcall(model.load_adapter, tmp_path, f"a{i}")
        return sum(entry.callcount for entry in profile.getstats())

    counts = [calls(i) for i in range(1, 13)]
    assert counts[-1] < 1.1 * counts[1]
    switches = []
    for name in ("a1", "a12"):
        profile = cProfile.Profile()
        profile.runcall(model.set_adapter, name)
        switches.append(sum(entry.callcount for entry in profile.getstats()))
    assert switches[1] <= 1.1 * switches[0]


def test_all_linear_leaves_out_a_head_that_another_adapter_trains_whole() -> None:
    first = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), first)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert not any("lm_head" in key for key in get_peft_model_state_dict(model, adapter_name="second"))


def test_what_a_file_does_not_hold_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading draws no values for what the file fills; nothing may stay without any for all that."""
    mlp(lora("lin0", "lin1", use_dora=True, init_lora_weights=True)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: t.clone() for key, t in load_file(file).items()}  # the file is written anew
    lacks = [key for key in tensors if "lin1" in key]
    save_file({key: value for key, value in tensors.items() if key not in lacks}, file, metadata={"format": "pt"})
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))  # memory as it comes
    with pytest.warns(UserWarning, match=r"missing.*lin1"):
        model = PeftModel.from_pretrained(Mlp(), tmp_path)
    with pytest.warns(UserWarning, match=r"missing.*lin1"):
        model.load_adapter(tmp_path, "other")
    for name in ("default", "other"):
        layer = model.base_model.model.lin1
        assert not layer.lora_B[name].weight.any() and layer.lora_A[name].weight.isfinite().all()
        torch.testing.assert_close(layer.lora_magnitude_vector[name].weight, base_weight(layer).norm(dim=1))
        held = model.base_model.model.lin0.lora_A[name].weight
        assert torch.equal(held, tensors["base_model.model.lin0.lora_A.weight"])


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    mlp().save_pretrained(tmp_path)
    base = Mlp()
    before = torch.random.get_rng_state()
    PeftModel.from_pretrained(base, tmp_path).load_adapter(tmp_path, "other")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_adapter_added_to_a_model_in_evaluation_does_not_drop_out(tmp_path: Path) -> None:
    mlp(lora("lin0", lora_dropout=0.9)).save_pretrained(tmp_path)
    model = mlp(lora("lin0", lora_dropout=0.9)).eval()
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))
    assert torch.equal(model(X), model(X))


def test_no_garbage_is_looked_for_while_layers_are_made():
    class Watching(LoraConfig):
        """Notes whether the collector runs."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.seen: list[bool] = []

        def __getattribute__(self, name: str) -> Any:
            if name == "lora_dropout":
                object.__getattribute__(self, "__dict__").get("seen", []).append(gc.isenabled())
            return super().__getattribute__(name)

    config = Watching(target_modules=["lin0"])
    get_peft_model(Mlp(), config)
    assert config.seen and not any(config.seen) and gc.isenabled()
    with pytest.raises(ValueError):
        get_peft_model(Mlp(), LoraConfig(target_modules=["nothing"]))
    assert gc.isenabled()
    gc.disable()
    try:
        get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"]))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_new_modules_train_until_the_model_evaluates(tmp_path: Path) -> None:
    """As new modules of torch do. What is loaded without `is_trainable` puts the model into evaluation mode."""
    model = get_peft_model(Mlp().eval(), lora("lin0", lora_dropout=0.9))
    layer = model.get_base_model().lin0
    assert layer.training and layer.lora_dropout["default"].training and not layer.base_layer.training
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    assert not any(module.training for module in model.modules())
    model.load_adapter(tmp_path, "third", is_trainable=True)
    assert layer.lora_dropout["third"].training and not layer.lora_dropout["default"].training
    plain = peft.inject_adapter_in_model(lora("lin0", lora_dropout=0.9, init_lora_weights=False), Mlp().eval())
    assert not torch.equal(plain(X), plain(X)) and torch.equal(plain.eval()(X), plain(X))


def test_a_load_sets_the_mode_of_all_that_acts_by_it(tmp_path: Path) -> None:
    """Linear parts, which have no use for a mode, follow their layer; a dropout is set also where that stays."""
    model = mlp(lora("lin0", lora_dropout=0.9))
    model.save_pretrained(tmp_path / "dropping")
    mlp(lora("lin0")).save_pretrained(tmp_path / "plain")
    layer = model.get_base_model().lin0
    for folder in ("dropping", "plain"):
        model.load_adapter(tmp_path / folder, folder)  # from a model that trains
        assert not any(module.training for module in model.modules())
        model.load_adapter(tmp_path / folder, f"{folder} again")  # from one that does not
        assert not any(module.training for module in model.modules())
        layer.lora_dropout["default"].train()
        layer.lora_dropout.training = layer.base_layer.training = True
        model.load_adapter(tmp_path / folder, f"{folder} still")
        assert not any(module.training for module in model.modules())
        model.train()
        assert all(module.training for module in model.modules())
