"""The command line, on tiny random models: every command, its exit status, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peft


pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets")
pytest.importorskip("trl")

from peft.cli import main  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable character, with a template for chats."""
    words = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    made = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    found.chat_template = CHAT
    return found


def make_model(folder: Path, **more: Any) -> Path:
    """A random llama with its tokenizer, saved."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    words = tokenizer()
    config = LlamaConfig(**{**sizes, "vocab_size": len(words), "pad_token_id": 2, "max_position_embeddings": 256, **more})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=more.get("shards", "5GB"))
    words.save_pretrained(folder)
    return folder


ROWS = [{"text": f"film {i} of {i % 7}", "label": ["bad", "good"][i % 2]} for i in range(32)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model and data of all kinds."""
    folder = tmp_path_factory.mktemp("cli")
    make_model(folder / "base")
    kinds = {
        "rows": ROWS,
        "texts": [{"text": row["text"]} for row in ROWS],
        "pairs": [{"prompt": row["text"], "completion": " " + row["label"]} for row in ROWS],
        "chats": [
            {"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}]}
            for r in ROWS
        ],
        "preferences": [{"prompt": r["text"], "chosen": " " + r["label"], "rejected": " no"} for r in ROWS],
    }
    for name, rows in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder


@pytest.fixture
def peft_(home, monkeypatch, capsys):
    """Run a command in the folder, as JSON; returns its status and what it printed."""
    monkeypatch.chdir(home)

    def call(*words: Any) -> tuple[int, Any]:
        status = main([*map(str, words), "--json"])
        printed = capsys.readouterr().out
        return status, json.loads(printed) if printed else None

    return call


QUICK = ["--model=base", "--trainer.device=cpu", "--trainer.steps=2", "--trainer.batch_size=4",
         "--trainer.max_length=64", "--trainer.log_every=1"]  # fmt: skip


def trained(peft_, output: Path, *words: Any) -> dict[str, Any]:
    """A training that has to succeed."""
    status, found = peft_("train", *QUICK, f"--output={output}", *words)
    assert status == 0, found
    return found


class TestTrain:
    @pytest.mark.parametrize(
        "words",
        [
            ["--data=texts.jsonl"],
            ["--data=texts.jsonl", "--trainer.packing=true"],
            ["--data=pairs.jsonl", "--data.held_out=4"],
            ["--data=chats.jsonl"],
            ["--data=rows.csv", "--data.prompt={text}", "--data.completion= {label}"],
            ["--data=rows.parquet", "--data.text={text} is {label}"],
            ["--data=preferences.jsonl", "--task=dpo"],
            ["--data=rows.jsonl", "--task=classify", "--data.held_out=8"],
        ],
        ids=lambda words: "-".join(word.strip("-") for word in words),
    )
    def test_every_task_and_form_of_data(self, peft_, tmp_path, words):
        found = trained(peft_, tmp_path, *words)
        assert found["metrics"]["steps"] == 2 and found["metrics"]["train_loss"] > 0
        if "--task=classify" in words:
            assert 0 <= found["metrics"]["eval_accuracy"] <= 1
        adapter = tmp_path / "adapter"
        assert (adapter / "adapter_model.safetensors").is_file()
        assert "| train_loss |" in (adapter / "README.md").read_text()
        assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["trainer"]["learning_rate"] != "auto"
