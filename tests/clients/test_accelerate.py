"""A loop of one's own under accelerate: state saved, loaded, and the rest of the run the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import IDS, fill, llama, logits, lora
from torch import nn

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy


accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def forget() -> Any:
    """Accelerate keeps one state a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def adapted(**kwargs: Any) -> PeftModel:
    """A llama with dropout in its adapter, so that the state of the generators counts."""
    options = {"lora_dropout": 0.3, "task_type": "CAUSAL_LM", **kwargs}
    return fill(get_peft_model(llama(), lora(**options)), 5, only="lora_")


class Run:
    """Model, optimizer and schedule, prepared."""

    def __init__(self, folder: Any, **kwargs: Any) -> None:
        torch.manual_seed(0)
        model = adapted(**kwargs)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.accelerator = accelerate.Accelerator(cpu=True, project_dir=str(folder))
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    def steps(self, count: int) -> list[float]:
        """So many steps on one batch; their losses."""
        self.model.train()
        found = []
        for _ in range(count):
            loss = self.model(input_ids=IDS, labels=IDS).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            found.append(loss.item())
        return found


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_a_run_continues_from_its_saved_state(tmp_path, extra):
    run = Run(tmp_path, **extra)
    run.steps(2)
    run.accelerator.save_state(str(tmp_path / "state"))
    want = run.steps(3)
    again = Run(tmp_path, **extra)
    again.steps(1)
    again.accelerator.load_state(str(tmp_path / "state"))
    assert again.steps(3) == want
    torch.testing.assert_close(logits(again.model), logits(run.model), rtol=0, atol=0)


def test_losses(tmp_path, as_reference):
    run = Run(tmp_path, lora_dropout=0.0)
    as_reference(losses=run.steps(5), logits=logits(run.model), tolerance=2e-4)


def test_what_is_saved_by_the_accelerator_and_by_the_unwrapped_model(tmp_path):
    run = Run(tmp_path)
    run.steps(1)
    run.accelerator.save_model(run.model, str(tmp_path / "whole"))
    assert set(load_file(tmp_path / "whole" / "model.safetensors")) == set(run.model.state_dict())
    state = run.accelerator.get_state_dict(run.model)
    run.accelerator.unwrap_model(run.model).save_pretrained(
        tmp_path / "adapter", is_main_process=run.accelerator.is_main_process, state_dict=state
    )
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(run.model), rtol=0, atol=0)


def test_hooks_that_save_the_adapter_alone(tmp_path):
    """As the training scripts of diffusers do."""
    run = Run(tmp_path)

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        torch.save(get_peft_model_state_dict(run.accelerator.unwrap_model(models[0])), f"{folder}/adapter.pt")
        weights.pop()

    def load(models: list[nn.Module], folder: str) -> None:
        result = set_peft_model_state_dict(models.pop(), torch.load(f"{folder}/adapter.pt"), "default")
        assert not result.unexpected_keys

    run.accelerator.register_save_state_pre_hook(save)
    run.accelerator.register_load_state_pre_hook(load)
    run.steps(1)
    want = logits(run.model)
    run.accelerator.save_state(str(tmp_path / "state"))
    run.steps(2)
    assert not torch.equal(logits(run.model), want)
    run.accelerator.load_state(str(tmp_path / "state"))
    torch.testing.assert_close(logits(run.model), want, rtol=0, atol=0)


def test_gradients_are_accumulated(tmp_path, as_reference):
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(
        *(lambda m: (m, torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1)))(
            adapted(lora_dropout=0.0)
        )
    )
    model.train()
    for rows in IDS:
        with accelerator.accumulate(model):
            loss = model(input_ids=rows[None], labels=rows[None]).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    as_reference(logits=logits(model), tolerance=2e-4)


@pytest.mark.beyond
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_base(tmp_path, where):
    """Dispatched, then adapted: the adapter acts in the layers whose weights are elsewhere."""
    want = logits(adapted())
    offload = {"model.layers.0": "cpu", "model.layers.1": where, "model.embed_tokens": "cpu"}
    parts = {**offload, "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    base = accelerate.dispatch_model(llama(), parts, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    model = fill(get_peft_model(base, lora(task_type="CAUSAL_LM")), 5, only="lora_")
    torch.testing.assert_close(logits(model), want)


def test_the_policy_of_fully_sharded_training():
    """Accelerate's FSDP plugin asks for it by this name."""
    policy = fsdp_auto_wrap_policy(adapted())
    trained = next(m for m in adapted().modules() if isinstance(m, nn.Linear) and m.weight.requires_grad)
    assert callable(policy)
    assert policy(module=trained, recurse=False, nonwrapped_numel=1)
