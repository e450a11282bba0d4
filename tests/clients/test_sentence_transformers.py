"""Adapters on sentence-transformers' models: added, trained, saved, loaded, switched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TRAINING, WORDS, fill, losses, tokenizer
from transformers import BertConfig, BertModel

from peft import LoraConfig, PeftModel, TaskType


sentence_transformers = pytest.importorskip("sentence_transformers")
losses_of = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
datasets = pytest.importorskip("datasets")

SENTENCES = ["a b c d", "e f g", "u v w x y z", "a b c e"]


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    """A small BERT with its tokenizer, on disk."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **shape)
    fill(BertModel(config, add_pooling_layer=False)).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def encoder(folder: Any) -> Any:
    """The mean of the outputs."""
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def lora(**kwargs: Any) -> LoraConfig:
    """As its documentation has it."""
    task = TaskType.FEATURE_EXTRACTION
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": task, **kwargs})


def adapted(folder: Any, name: str = "one", seed: int = 5, **kwargs: Any) -> Any:
    """Add an adapter that has an effect."""
    model = encoder(folder)
    model.add_adapter(lora(**kwargs), name)
    return fill(model, seed, only=f".{name}.")


def encode(model: Any) -> torch.Tensor:
    """One vector a sentence."""
    return model.encode(SENTENCES, convert_to_tensor=True)


def test_an_adapter_is_added_switched_off_and_on_and_deleted(folder, as_reference):
    model = adapted(folder)
    one = encode(model)
    model.add_adapter(lora(r=2), "two")
    fill(model, 6, only=".two.")
    two = encode(model)
    assert model.active_adapters() == ["two"]
    model.set_adapter("one")
    torch.testing.assert_close(encode(model), one, rtol=0, atol=0)
    model.disable_adapters()
    torch.testing.assert_close(encode(model), encode(encoder(folder)), rtol=0, atol=0)
    model.enable_adapters()
    state = {name: list(t.shape) for name, t in sorted(model.get_adapter_state_dict("one").items())}
    model.delete_adapter("two")
    torch.testing.assert_close(encode(model), one, rtol=0, atol=0)
    as_reference(one=one, two=two, state=state)


def test_a_saved_model_with_its_adapter_loads(folder, tmp_path):
    model = adapted(folder)
    want = encode(model)
    model.save_pretrained(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    torch.testing.assert_close(encode(encoder(tmp_path / "saved")), want, rtol=0, atol=0)
    again = encoder(folder)
    again.load_adapter(str(tmp_path / "saved"), "other")
    torch.testing.assert_close(encode(again), want, rtol=0, atol=0)
    wrapped = PeftModel.from_pretrained(BertModel.from_pretrained(folder, add_pooling_layer=False), tmp_path / "saved")
    plain = encoder(folder)
    plain[0].model = wrapped
    torch.testing.assert_close(encode(plain), want)


def test_training(folder, tmp_path, as_reference):
    model = adapted(folder)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = [{"anchor": a, "positive": b} for a in SENTENCES for b in SENTENCES]
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_strategy": "no"}
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(str(tmp_path / "run"), **options, **TRAINING),
        train_dataset=datasets.Dataset.from_list(rows),
        loss=losses_of.MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=0, msg=name)
    trainer.save_model(str(tmp_path / "out"))
    torch.testing.assert_close(encode(encoder(tmp_path / "out")), encode(model), rtol=0, atol=0)
    as_reference(losses=losses(trainer), vectors=encode(model), tolerance=5e-4)


def test_a_wrapper_inside(folder, as_reference):
    """Some put a PeftModel in place of the transformer."""
    model = encoder(folder)
    model[0].model = fill(PeftModel(model[0].model, lora(), "one"), 5, only=".one.")
    assert not torch.allclose(encode(model), encode(encoder(folder)))
    as_reference(vectors=encode(model))
