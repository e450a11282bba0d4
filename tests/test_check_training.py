"""`check_training`: each reason why a loss does not fall is found, and a sound training has none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from toys import Mlp, tiny_llama

from peft import (
    AdaptionPromptConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    check_training,
    get_peft_model,
)


IDS = torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def llama(**options: Any) -> PeftModel:
    """A tiny model with an adapter at its start."""
    return get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM", **options))


def codes(model: nn.Module, batch: dict | None = BATCH, **options: Any) -> list[str]:
    """The kinds of findings; each says something and what to do."""
    findings = check_training(model, batch, **options)
    for finding in findings:
        assert finding.message.endswith(".") and finding.advice and finding.code in str(finding)
    return [finding.code for finding in findings]


OTHERS = [
    PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    BottleneckConfig(task_type="CAUSAL_LM"),
]
"""Methods that change no weight."""


def of_another_method(config: Any) -> PeftModel:
    """A tiny model with such an adapter."""
    return get_peft_model(tiny_llama(), copy.deepcopy(config))


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: type(config).__name__)
def test_methods_that_change_no_weight(config: Any) -> None:
    """What is found in an adapted layer is found in a prompt, too."""
    model = of_another_method(config)
    assert codes(model) == []
    assert codes(model, None, learning_rate=2e-5) == ["low_learning_rate"]
    model.disable_adapter_layers()
    assert "adapter_disabled" in codes(model)
    model.enable_adapter_layers()
    model.requires_grad_(False)
    assert codes(model) == ["nothing_trains"]
    model = of_another_method(config)
    model.add_adapter("other", copy.deepcopy(config))
    model.set_requires_grad("other")
    assert codes(model, None) == ["adapter_inactive"]
    model = of_another_method(config)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert codes(model.train()) == []


@pytest.mark.parametrize("config", [LoraConfig(r=2, task_type="CAUSAL_LM"), IA3Config(task_type="CAUSAL_LM")])
def test_a_sound_training_has_no_findings(config: Any) -> None:
    """Neither at the start, where one factor is zero and the other has no gradient, nor after a step."""
    model = get_peft_model(tiny_llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    assert codes(model, optimizer=optimizer) == []
    model(**BATCH).loss.backward()
    optimizer.step()
    assert codes(model, optimizer=optimizer) == []


def test_the_model_is_left_as_it_is() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_dropout=0.5, task_type="CAUSAL_LM")).eval()
    model.get_base_model().register_buffer("calls", torch.zeros(()))
    model.get_base_model().register_forward_hook(lambda module, args, output: module.calls.add_(1) and None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_training(model, BATCH)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_nothing_trains() -> None:
    model = llama(inference_mode=True)
    assert codes(model, None) == ["nothing_trains"] and codes(model) == ["nothing_trains"]
    assert "is_trainable=True" in check_training(model)[0].advice
    model.set_adapter("default")
    assert codes(model) == []


def test_a_disabled_adapter() -> None:
    model = llama()
    model.disable_adapter_layers()
    assert "adapter_disabled" in codes(model)
    model.enable_adapter_layers()
    assert codes(model) == []


def test_a_merged_adapter() -> None:
    model = llama()
    model.merge_adapter()
    assert codes(model, None) == ["adapter_merged"]
    assert codes(model) == ["adapter_merged", "no_gradients"]
    model.unmerge_adapter()
    assert codes(model) == []


def test_an_adapter_that_is_not_active() -> None:
    model = llama()
    model.add_adapter("other", LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.set_requires_grad("other")
    findings = {f.code: f for f in check_training(model, BATCH)}
    assert "'other'" in findings["adapter_inactive"].message


@pytest.mark.parametrize("rate, found", [(2e-5, True), (5e-5, True), (2e-4, False)])
def test_the_learning_rate_of_a_full_fine_tune(rate: float, found: bool) -> None:
    model = llama()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert ("low_learning_rate" in codes(model, None, learning_rate=rate)) == found
    assert ("low_learning_rate" in codes(model, None, optimizer=torch.optim.SGD(parameters, lr=rate))) == found
    assert codes(tiny_llama(), None, learning_rate=rate) == []  # which is a full fine-tune


def test_an_optimizer_made_before_the_adapters() -> None:
    base = tiny_llama()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    model = get_peft_model(base, LoraConfig(r=2))
    assert codes(model, None, optimizer=optimizer) == ["not_in_optimizer"]


def test_masked_labels() -> None:
    model = llama()
    some = IDS.clone()
    some[0] = -100
    assert "1 of 2 samples" in check_training(model, {"input_ids": IDS, "labels": some})[0].message
    found = codes(model, {"input_ids": IDS, "labels": torch.full_like(IDS, -100)})
    assert found[0] == "labels_masked" and "loss_not_finite" in found  # the mean of nothing


def test_gradients_that_do_not_come() -> None:
    """A layer that the loss does not read, and one behind a detach."""
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    model.get_base_model().norm.register_forward_hook(lambda module, args, output: output.detach())
    findings = check_training(model, {"x": torch.randn(4, 6)}, loss=lambda y: y.square().mean())
    assert [f.code for f in findings] == ["no_gradients"]
    assert "lin0" in findings[0].message and "lin1" not in findings[0].message


def test_gradients_that_are_zero() -> None:
    model = llama()
    for name, p in model.named_parameters():
        if "layers.1" in name and "lora" in name:
            nn.init.zeros_(p)  # both factors: a saddle point
    findings = check_training(model, BATCH)
    assert [f.code for f in findings] == ["zero_gradients"]
    assert "layers.1.self_attn.q_proj" in findings[0].message and "layers.0" not in findings[0].message


def test_checkpointing_without_inputs_that_require_grad() -> None:
    """A frozen embedding gives none; an adapted model sees to it, unless something comes between."""
    model = llama()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert codes(model.train()) == []
    embedding = model.get_base_model().get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: output.detach())
    found = {f.code: f for f in check_training(model, BATCH)}
    assert {"checkpointing_without_grad", "no_gradients"} == set(found)
    assert "layers.0" in found["checkpointing_without_grad"].message
    hook.remove()
    assert codes(model) == []


def test_an_output_without_a_loss() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    with pytest.raises(ValueError, match="has no loss.*labels"):
        check_training(model, {"x": torch.randn(4, 6)})
    assert codes(model, {"x": torch.randn(4, 6)}, loss=lambda y: y.sum() * float("nan"))[0] == "loss_not_finite"
