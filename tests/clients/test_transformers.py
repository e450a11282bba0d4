"""Adapters through the methods that transformers gives its own models, and through its Trainer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import IDS, TRAINING, fill, llama, logits, lora, losses
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from peft import IA3Config, OFTConfig, PeftModel, UniPELTConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper


def adapted(name: str = "default", seed: int = 5, **kwargs: Any) -> LlamaForCausalLM:
    """A llama with an adapter added by transformers, whose tensors are not at their start."""
    model = llama()
    model.add_adapter(lora(**kwargs), adapter_name=name)
    return fill(model, seed, only=f".{name}.").eval()


def saved(folder: Any, seed: int = 5, **kwargs: Any) -> torch.Tensor:
    """Save an adapter into the folder; returns the outputs of the model that wears it."""
    model = adapted(seed=seed, **kwargs)
    model.save_pretrained(folder)
    return logits(model)


def layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The adapted layers."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class TestAdapters:
    def test_an_added_adapter_acts_and_trains_alone(self, as_reference):
        model = adapted()
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        assert all(("lora_" in name) == (p.grad is not None) for name, p in model.named_parameters())
        norms = {name: p.grad.norm().item() for name, p in sorted(model.named_parameters()) if p.grad is not None}
        as_reference(loss=out.loss.item(), logits=out.logits, norms=norms)

    @pytest.mark.parametrize("method", ["ia3", "oft"])
    def test_other_methods_are_added_alike(self, as_reference, method):
        config = {
            "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "oft": OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=4),
        }[method]
        model = llama()
        model.add_adapter(config, adapter_name="one")
        as_reference(logits=logits(fill(model, 5, only=f"{method}_")))

    def test_a_second_adapter_of_the_same_name_is_refused(self):
        with pytest.raises(ValueError, match="already exists"):
            adapted().add_adapter(lora(), adapter_name="default")

    def test_adapters_take_turns_act_together_and_rest(self, as_reference):
        model = adapted("one")
        model.add_adapter(lora(r=2, target_modules=["k_proj", "v_proj"]), adapter_name="two")
        fill(model, 6, only=".two.")
        assert model.active_adapters() == ["two"]
        found = {"two": logits(model)}
        model.set_adapter("one")
        found["one"] = logits(model)
        model.set_adapter(["one", "two"])
        assert model.active_adapters() == ["one", "two"]
        found["both"] = logits(model)
        model.disable_adapters()
        torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=0)
        model.enable_adapters()
        torch.testing.assert_close(logits(model), found["both"], rtol=0, atol=0)
        with pytest.raises(ValueError, match="not found"):
            model.set_adapter("three")
        as_reference(**found)

    @pytest.mark.beyond
    def test_adapters_of_two_methods_keep_their_names_in_files(self):
        """Those of the first are loaded by a model that has no other."""
        ia3 = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
        model, alone = llama(), llama()
        model.add_adapter(ia3, adapter_name="one")
        model.add_adapter(lora(target_modules=["q_proj", "v_proj"]), adapter_name="two")
        alone.add_adapter(ia3, adapter_name="one")
        assert model.get_adapter_state_dict("one").keys() == alone.get_adapter_state_dict("one").keys()

    def test_deleting_one_leaves_the_other_and_deleting_the_last_leaves_the_base(self):
        model = adapted("one")
        model.add_adapter(lora(), adapter_name="two")
        fill(model, 6, only=".two.")
        model.set_adapter("one")
        one = logits(model)
        model.delete_adapter("two")
        assert list(model.peft_config) == ["one"]
        torch.testing.assert_close(logits(model), one, rtol=0, atol=0)
        with pytest.raises(ValueError, match="not present"):
            model.delete_adapter("two")
        model.delete_adapter(["one"])
        assert not model._hf_peft_config_loaded
        torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=0)
        model.add_adapter(lora(), adapter_name="one")
        torch.testing.assert_close(logits(fill(model, 5, only=".one.")), one, rtol=0, atol=0)

    def test_copies_of_modules_are_added_switched_and_deleted(self, as_reference):
        model = adapted("one", modules_to_save=["lm_head"])
        model.add_adapter(lora(modules_to_save=["lm_head"]), adapter_name="two")
        fill(model, 6, only=".two.")
        two = logits(model)
        model.set_adapter("one")
        one = logits(model)
        assert isinstance(model.lm_head, ModulesToSaveWrapper)
        assert model.lm_head.modules_to_save["one"].weight.requires_grad
        assert not model.lm_head.modules_to_save["two"].weight.requires_grad
        model.delete_adapter("two")
        assert list(model.lm_head.modules_to_save) == ["one"]
        model.disable_adapters()
        torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=0)
        as_reference(one=one, two=two)

    @pytest.mark.xfail(reason="the wrapper goes with the last adapter: the model is the plain one again", strict=True)
    def test_copies_are_gone_with_the_last_adapter(self):
        model = adapted("one", modules_to_save=["lm_head"])
        model.delete_adapter("one")
        assert "one" not in model.lm_head.modules_to_save
        torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_new_tensors_have_the_dtype_of_the_base(self, dtype, as_reference):
        model = llama().to(dtype)
        model.add_adapter(lora(modules_to_save=["lm_head"]))
        as_reference(dtypes={name: str(p.dtype) for name, p in sorted(model.named_parameters()) if "default" in name})


class TestFiles:
    def test_a_saved_adapter_has_the_format_of_a_wrapper(self, tmp_path, as_reference):
        saved(tmp_path, modules_to_save=["lm_head"])
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        shapes = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
        as_reference(shapes=shapes, modules_to_save=config["modules_to_save"], peft_type=config["peft_type"])

    @pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
    def test_a_saved_adapter_loads_into_a_model_into_a_wrapper_and_by_the_auto_class(self, tmp_path, extra):
        base, folder = tmp_path / "base", tmp_path / "adapter"
        llama().save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.add_adapter(lora(**extra))
        want = logits(fill(model, 5, only="default"))
        model.save_pretrained(folder)
        again = llama()
        again.load_adapter(folder)
        torch.testing.assert_close(logits(again), want, rtol=0, atol=0)
        assert not any(p.requires_grad for layer in layers(again) for p in layer.parameters())
        torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), folder)), want, rtol=0, atol=0)
        auto = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(auto), want, rtol=0, atol=0)

    @pytest.mark.beyond
    def test_an_adapter_of_a_wrapper_loads_into_a_model(self, tmp_path):
        wrapper = fill(get_peft_model(llama(), lora(use_dora=True, task_type="CAUSAL_LM")), 5, only="lora_")
        wrapper.save_pretrained(tmp_path)
        again = llama()
        again.load_adapter(tmp_path, adapter_name="other")
        torch.testing.assert_close(logits(again), logits(wrapper), rtol=0, atol=0)

    def test_tensors_come_from_a_state_dict(self, tmp_path):
        want = saved(tmp_path)
        tensors, config = load_file(tmp_path / "adapter_model.safetensors"), lora()
        again = llama()
        again.load_adapter(adapter_state_dict=tensors, peft_config=config)
        torch.testing.assert_close(logits(again), want, rtol=0, atol=0)

    def test_an_adapter_loaded_for_training_trains_on(self, tmp_path, as_reference):
        saved(tmp_path, lora_dropout=0.5)
        model = llama().train()
        model.load_adapter(tmp_path, is_trainable=True)
        assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
        assert all(module.training for module in model.modules())
        as_reference(logits=logits(model))

    def test_the_active_adapter_is_saved_and_the_other_kept_out(self, tmp_path):
        model = adapted("one")
        model.add_adapter(lora(r=2), adapter_name="two")
        fill(model, 6, only=".two.")
        for name in ("one", "two"):
            model.set_adapter(name)
            model.save_pretrained(tmp_path / name)
            again = llama()
            again.load_adapter(tmp_path / name)
            torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)

    def test_the_state_of_an_adapter_can_be_asked_for(self, as_reference):
        state = adapted("one").get_adapter_state_dict("one")
        as_reference(shapes={name: list(tensor.shape) for name, tensor in sorted(state.items())})

    def test_hot_swapping(self, tmp_path):
        """transformers 5 swaps the tensors themselves: rank and alpha have to be those of the adapter in place."""
        wants = [saved(tmp_path / name, seed) for seed, name in enumerate("ab")]
        saved(tmp_path / "c", r=2)
        model = llama()
        model.enable_peft_hotswap(target_rank=8)
        model.load_adapter(tmp_path / "a", adapter_name="x")
        torch.testing.assert_close(logits(model), wants[0])
        modules = [id(module) for module in model.modules()]
        for i, name in ((1, "b"), (0, "a")):
            model.load_adapter(tmp_path / name, adapter_name="x", hotswap=True)
            torch.testing.assert_close(logits(model), wants[i])
        assert [id(module) for module in model.modules()] == modules
        with pytest.raises(RuntimeError, match="mismatched"):
            model.load_adapter(tmp_path / "c", adapter_name="x", hotswap=True)

    def test_a_hot_swap_without_preparation_and_by_an_unknown_name(self, tmp_path):
        saved(tmp_path / "a", seed=5)
        want = saved(tmp_path / "b", seed=6)
        model = llama()
        model.load_adapter(tmp_path / "a", adapter_name="x")
        model.load_adapter(tmp_path / "b", adapter_name="x", hotswap=True)
        torch.testing.assert_close(logits(model), want)
        with pytest.raises(ValueError, match="hotswap"):
            model.load_adapter(tmp_path / "b", adapter_name="y", hotswap=True)


class Tokens(torch.utils.data.Dataset):
    """Sixteen fixed sequences."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 30, (16, 6), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model: nn.Module, folder: Any, **kwargs: Any) -> Trainer:
    """Six steps, saved and measured every second."""
    every = {"save_steps": 2, "save_strategy": "steps", "eval_steps": 2, "eval_strategy": "steps"}
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05, **TRAINING, **every, **kwargs}
    return Trainer(model, TrainingArguments(str(folder), **options), train_dataset=Tokens(), eval_dataset=Tokens())


@pytest.mark.parametrize("kind", ["wrapper", "own"])
class TestTrainer:
    def model(self, kind: str) -> nn.Module:
        if kind == "own":
            return adapted()
        return fill(get_peft_model(llama(), lora(task_type="CAUSAL_LM")), 5, only="lora_")

    def test_losses_and_the_resumed_run(self, tmp_path, as_reference, kind):
        whole = trainer(self.model(kind), tmp_path)
        whole.train()
        if kind == "wrapper":
            resumed = trainer(self.model(kind), tmp_path)
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
            assert losses(resumed) == losses(whole)
            torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=0, atol=0)
        as_reference(losses=losses(whole), logits=logits(whole.model), tolerance=2e-4)

    def test_the_best_model_is_loaded_at_the_end(self, tmp_path, as_reference, kind):
        if kind == "own":
            pytest.skip("Trainer looks for a whole model there, whatever peft's version")
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        run = trainer(self.model(kind), tmp_path, **best)
        run.train()
        assert run.state.best_model_checkpoint.endswith("checkpoint-2")
        again = llama()
        again.load_adapter(tmp_path / "checkpoint-2")
        torch.testing.assert_close(logits(run.model), logits(again))
        as_reference(best=run.state.best_metric, logits=logits(run.model), tolerance=2e-4)

    def test_gradient_checkpointing(self, tmp_path, as_reference, kind):
        model = self.model(kind)
        if kind == "own":
            model.enable_input_require_grads()
        run = trainer(model, tmp_path, gradient_checkpointing=True, save_strategy="no", eval_strategy="no")
        run.train()
        as_reference(losses=losses(run), tolerance=2e-4)


def test_a_union_is_trained_and_resumed(tmp_path):
    """A LoRA, bottlenecks and a prefix with its network, as one adapter of one checkpoint."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return fill(get_peft_model(llama(), UniPELTConfig(task_type="CAUSAL_LM")), 5, only=".default")

    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_steps": 2}
    whole = trainer(model(), tmp_path, learning_rate=1e-3, **best)
    whole.train()
    resumed = trainer(model(), tmp_path, learning_rate=1e-3, **best)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    again = PeftModel.from_pretrained(llama(), whole.state.best_model_checkpoint)
    torch.testing.assert_close(logits(again), logits(whole.model.eval()))
