"""TRL's trainers with adapters: supervised, preferences, rewards, and policies that generate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import IDS, TRAINING, WORDS, fill, llama, logits, lora, losses, scorer, tokenizer
from torch import nn

from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LETTERS = WORDS[7:33]


def words(seed: int, count: int) -> str:
    """So many letters, chosen by the seed."""
    drawn = torch.randint(0, len(LETTERS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(LETTERS[i] for i in drawn.tolist())


TEXTS = [{"text": words(i, 6 + i % 3)} for i in range(16)]
CHATS = [
    {"messages": [{"role": "user", "content": words(i, 3)}, {"role": "assistant", "content": words(i + 40, 4)}]}
    for i in range(16)
]
PAIRS = [
    {"prompt": words(i, 3), "chosen": " " + words(i + 50, 4), "rejected": " " + words(i + 90, 4)} for i in range(16)
]
PROMPTS = [{"prompt": words(i, 4)} for i in range(16)]


def data(rows: list[dict[str, Any]]) -> Any:
    """A data set in memory."""
    return datasets.Dataset.from_list(rows)


def causal(**kwargs: Any) -> PeftModel:
    """A llama with an adapter that is not at its start."""
    return fill(get_peft_model(llama(), lora(task_type="CAUSAL_LM", **kwargs)), 5, only="lora_")


def options(folder: Any, **kwargs: Any) -> dict[str, Any]:
    """Four short steps."""
    steps = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_strategy": "no"}
    return {"output_dir": str(folder), "bf16": False, **steps, **TRAINING, **kwargs}


def unchanged(base: nn.Module, trained: nn.Module) -> None:
    """Training left the base model's numbers alone."""
    found = dict(trained.named_parameters())
    for name, want in base.named_parameters():
        for prefix in ("base_model.model.", ""):
            stem, _, leaf = name.rpartition(".")
            for other in (
                f"{prefix}{name}",
                f"{prefix}{stem}.base_layer.{leaf}",
                f"{prefix}{stem}.original_module.{leaf}",
            ):
                if other in found:
                    torch.testing.assert_close(found[other], want, rtol=0, atol=0, msg=other)


class TestSupervised:
    @pytest.mark.parametrize("rows", ["texts", "chats"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_training(self, tmp_path, as_reference, rows, checkpointing):
        arguments = trl.SFTConfig(**options(tmp_path, gradient_checkpointing=checkpointing))
        trainer = trl.SFTTrainer(
            causal(),
            arguments,
            train_dataset=data(TEXTS if rows == "texts" else CHATS),
            processing_class=tokenizer(),
        )
        trainer.train()
        unchanged(llama(), trainer.model)
        as_reference(losses=losses(trainer), logits=logits(trainer.model), tolerance=2e-4)

    def test_a_config_makes_the_adapter_and_the_saved_one_loads(self, tmp_path):
        llama().save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        trainer = trl.SFTTrainer(
            str(tmp_path / "base"),
            trl.SFTConfig(**options(tmp_path / "out", model_init_kwargs={"dtype": "float32"})),
            train_dataset=data(TEXTS),
            peft_config=lora(task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(logits(again), logits(trainer.model), rtol=0, atol=0)
        assert not torch.equal(logits(again), logits(llama()))

    def test_a_base_in_bfloat16(self, tmp_path, as_reference):
        model = get_peft_model(llama().to(torch.bfloat16), lora(task_type="CAUSAL_LM"))
        trainer = trl.SFTTrainer(
            fill(model, 5, only="lora_"),
            trl.SFTConfig(**options(tmp_path)),
            train_dataset=data(TEXTS),
            processing_class=tokenizer(),
        )
        trainer.train()
        dtypes = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
        as_reference(dtypes=sorted(dtypes), losses=losses(trainer), tolerance=2e-2)


class TestPreferences:
    @pytest.mark.parametrize("reference", ["the base", "a copy of the adapter"])
    def test_the_reference_model(self, tmp_path, as_reference, reference):
        """Its log-probabilities are the base model's, or those of the adapter before training."""
        model: nn.Module = llama() if reference == "the base" else causal()
        extra: dict[str, Any] = {"peft_config": lora(task_type="CAUSAL_LM")} if reference == "the base" else {}
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(**options(tmp_path)),
            train_dataset=data(PAIRS),
            processing_class=tokenizer(),
            **extra,
        )
        assert list(trainer.model.peft_config) == ["default", "ref"][: 1 + (reference != "the base")]
        if reference == "the base":
            fill(trainer.model, 5, only="lora_")
        frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            if name in frozen:
                torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=0, msg=name)
        as_reference(losses=losses(trainer), logits=logits(trainer.model), tolerance=2e-4)

    def test_log_probabilities_are_computed_beforehand(self, tmp_path, as_reference):
        trainer = trl.DPOTrainer(
            causal(),
            args=trl.DPOConfig(**options(tmp_path, precompute_ref_log_probs=True)),
            train_dataset=data(PAIRS),
            processing_class=tokenizer(),
        )
        trainer.train()
        as_reference(losses=losses(trainer), tolerance=2e-4)

    def test_rewards(self, tmp_path, as_reference):
        model = get_peft_model(scorer(), lora(task_type="SEQ_CLS"))
        trainer = trl.RewardTrainer(
            fill(model, 5, only="lora_"),
            trl.RewardConfig(**options(tmp_path)),
            train_dataset=data(PAIRS),
            processing_class=tokenizer(),
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        again = PeftModel.from_pretrained(scorer(), tmp_path / "adapter")
        torch.testing.assert_close(logits(again), logits(trainer.model), rtol=0, atol=0)
        as_reference(losses=losses(trainer), logits=logits(again), tolerance=2e-4)


def count_of_a(completions: list[str], **_: Any) -> list[float]:
    """A reward: how many letters up to f."""
    return [float(sum(word in "abcdef" for word in text.split())) for text in completions]


class TestPolicies:
    @pytest.mark.parametrize("beta", [0.0, 0.1])
    @pytest.mark.parametrize("kind", ["config", "wrapper"])
    def test_grpo(self, tmp_path, as_reference, beta, kind):
        arguments = trl.GRPOConfig(
            **options(tmp_path, learning_rate=0.01), num_generations=4, max_completion_length=5, beta=beta, seed=3
        )
        made = {"model": llama(), "peft_config": lora()} if kind == "config" else {"model": causal()}
        trainer = trl.GRPOTrainer(
            **made, reward_funcs=count_of_a, args=arguments, train_dataset=data(PROMPTS), processing_class=tokenizer()
        )
        if kind == "config":
            fill(trainer.model, 5, only="lora_")
        adapters = list(trainer.model.peft_config)
        assert adapters == (["default", "ref"] if kind == "wrapper" and beta else ["default"])
        trainer.train()
        unchanged(llama(), trainer.model)
        keys = ("reward", "kl", "entropy")
        rows = [{k: row[k] for k in keys if k in row} for row in trainer.state.log_history if "reward" in row]
        as_reference(losses=losses(trainer), rows=rows, logits=logits(trainer.model), tolerance=5e-4)

    @pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
    def test_weights_for_another_engine(self, extra):
        """Merged into the running model, read under the names of the base, and taken back."""
        model = causal(**extra)
        before = {name: p.clone() for name, p in model.named_parameters()}
        want = logits(model)
        sent = {}
        model.merge_adapter()
        for name, parameter in model.named_parameters():
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if model.prefix in name or "original_module" in name:
                continue
            sent[name.replace("modules_to_save.default.", "")] = parameter.data.clone()
        model.unmerge_adapter()
        engine = llama()
        engine.load_state_dict(sent)
        torch.testing.assert_close(logits(engine), want, rtol=1e-4, atol=1e-4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, before[name], msg=name)

    def test_generation_while_merged(self, as_reference):
        model = causal()
        tokens = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
        model.merge_adapter()
        torch.testing.assert_close(model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False), tokens)
        model.unmerge_adapter()
        as_reference(tokens=tokens.tolist())

    def test_a_copy_under_another_adapter(self):
        """TRL's context switches to an adapter, or to none, and back."""
        from trl.trainer.utils import use_adapter

        model = causal()
        model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
        fill(model, 6, only=".ref.")
        default = logits(model)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        with use_adapter(model, None):
            torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=0)
        with use_adapter(model, "ref"):
            assert model.active_adapter == "ref"
            assert not torch.equal(logits(model), default)
        assert model.active_adapter == "default"
        torch.testing.assert_close(logits(model), default, rtol=0, atol=0)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
