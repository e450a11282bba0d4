"""Several adapters trained in one run are those that are trained one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft import LoraConfig, MultiAdapterTrainer, PeftModel, get_peft_model, get_peft_model_state_dict


SIZES = {"one": 6, "two": 10, "three": 4}


def rows(name: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(len(name))
    ids = torch.randint(1, 32, (SIZES[name], 5), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def model(*names: str) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    made: Any = None
    for name in names:
        torch.manual_seed(len(name))
        config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        if made is None:
            made = get_peft_model(base, config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    return made


def arguments(folder: Any, **given: Any) -> TrainingArguments:
    same: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.5,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,
    }
    return TrainingArguments(str(folder), **(same | given))


def test_together_is_one_after_another(tmp_path):
    """Tensors and losses, with gradients clipped, rates that fall, and data sets of different lengths."""
    rates = {"two": 3e-2}
    together = model(*SIZES)
    trainer = MultiAdapterTrainer(together, arguments(tmp_path), {name: rows(name) for name in SIZES}, None, rates)
    losses: dict[str, list[float]] = {name: [] for name in SIZES}
    compute = trainer.compute_loss

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        for name, loss in trainer.last_losses.items():
            losses[name].append(loss)
        return result

    trainer.compute_loss = noted
    trainer.train()
    for name in SIZES:
        alone = model(name)
        args = arguments(tmp_path, learning_rate=rates.get(name, 1e-2))
        own = Trainer(alone, args, train_dataset=rows(name))
        own.train()
        logged = [entry["loss"] for entry in own.state.log_history if "loss" in entry]
        torch.testing.assert_close(losses[name], logged, rtol=1e-4, atol=1e-4)
        found, want = (get_peft_model_state_dict(m, adapter_name=name) for m in (together, alone))
        for key, tensor in want.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)


def test_each_stops_early_and_keeps_its_best(tmp_path):
    """One adapter learns, the other's loss grows: it stops, the first goes on."""
    made = model("one", "two")
    wrong = [dict(row, labels=(row["labels"] + 7) % 31) for row in rows("two")]
    args = arguments(tmp_path, num_train_epochs=4, eval_strategy="epoch", warmup_steps=0, lr_scheduler_type="constant")
    trainer = MultiAdapterTrainer(
        made,
        args,
        {"one": rows("one"), "two": rows("two")},
        {"one": rows("one"), "two": wrong},
        {"two": 0.3},
        early_stopping_patience=1,
    )
    trainer.train()
    assert trainer.stopped == {"two"} and trainer.state.global_step == 12, "the first adapter has 12 steps"
    assert not any(p.requires_grad for n, p in made.named_parameters() if ".two." in n)
    seen = [entry["eval_two_loss"] for entry in trainer.state.log_history if "eval_two_loss" in entry]
    assert trainer.best["two"] == min(seen) < seen[1]
    best = PeftModel.from_pretrained(model("x").unload(), str(tmp_path / "best" / "two"), adapter_name="two")
    batch = {name: torch.stack([row[name] for row in wrong]) for name in wrong[0]}
    torch.testing.assert_close(best(**batch).loss.item(), trainer.best["two"], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    made = model("one")
    with pytest.raises(ValueError, match="unknown: \\['two'\\]"):
        MultiAdapterTrainer(made, arguments(tmp_path), {"two": rows("two")})
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        MultiAdapterTrainer(made, arguments(tmp_path, gradient_accumulation_steps=2), {"one": rows("one")})
