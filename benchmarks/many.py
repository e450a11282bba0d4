"""The cases of run.py with many adapters: trained together, and served from a pool of thousands.

A library without `MultiAdapterTrainer` and `AdapterPool` has no figures for these, but for the loading of an adapter.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from _common import in_turn, llama, ratio, seconds, tokens

import peft
from peft import LoraConfig, get_peft_model


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COUNT = 8
HAS_POOL = hasattr(peft, "AdapterPool")


# --- training ------------------------------------------------------------------------------------------------
def adapters(names: list[str]) -> Any:
    """LoRAs of rank 16 on all linear layers of the small model; each starts the same whatever others there are."""
    config = {"r": 16, "lora_alpha": 32, "target_modules": LINEARS, "task_type": "CAUSAL_LM"}
    made: Any = None
    for name in names:
        torch.manual_seed(int(name[1:]))
        if made is None:
            base = llama()
            torch.manual_seed(int(name[1:]))
            made = get_peft_model(base, LoraConfig(**config), adapter_name=name)
        else:
            made.add_adapter(name, LoraConfig(**config))
    return made


def samples(seed: int, length: int, steps: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 2000, (steps, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def together(length: int, steps: int = 4) -> dict[str, float]:
    """Eight adapters in one run, a row of each in a step; the floor is one run after another. Losses are the same."""
    if not HAS_POOL:
        return {}
    from transformers import PrinterCallback, Trainer, TrainingArguments

    names = [f"a{i}" for i in range(COUNT)]
    data = {name: samples(i, length, steps) for i, name in enumerate(names)}
    losses: list[list[float]] = []

    def run(trainers: list[Any]) -> None:
        for trainer in trainers:
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        logs = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in trainers)
        losses.append([sum(step) for step in zip(*logs)])

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        pairs = []
        for _ in range(4):
            all_of_them = [peft.MultiAdapterTrainer(adapters(names), options, data)]
            each = [Trainer(adapters([name]), options, train_dataset=data[name]) for name in names]
            pairs.append([seconds(lambda group=group: run(group)) for group in (all_of_them, each)])
    torch.testing.assert_close(losses[-2], losses[-1], rtol=1e-4, atol=1e-3)
    ours, floor = zip(*pairs[1:])  # the first is for warming up
    return {"value": statistics.median(ours), "floor": statistics.median(ours) / ratio(ours, floor)}


# --- serving -------------------------------------------------------------------------------------------------
def pool(folder: str, targets: list[str], rank: int = 16, **shape: Any) -> Any:
    """A pool in which 2,000 names are registered for an adapter in a file."""
    config = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(llama(**shape), config).save_pretrained(folder)
    made = peft.AdapterPool(llama(**shape).eval(), capacity=64)
    for i in range(2000):
        made.register(f"user{i}", folder)
    return made


def served(length: int, targets: list[str]) -> dict[str, float]:
    """64 rows of ``length`` tokens with 64 adapters of the pool's 2,000; the floor is the same rows with one."""
    if not HAS_POOL:
        return {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made, ids = pool(folder, targets), tokens(64, length)
        names = [f"user{i}" for i in range(64)]
        many, one = in_turn(
            lambda: made(input_ids=ids, adapter_names=names),
            lambda: made(input_ids=ids, adapter_names=names[:1] * 64),
            repeats=21,
        )
    return {"value": statistics.median(many), "floor": statistics.median(many) / ratio(many, one)}


def brought(load_thirtieth: Callable[[], dict[str, float]], shape: dict[str, int]) -> dict[str, float]:
    """An adapter from its mapped file into a full pool; in another library, the thirtieth adapter of a model."""
    if not HAS_POOL:
        return load_thirtieth()
    with tempfile.TemporaryDirectory() as folder:
        made = pool(folder, LINEARS, rank=8, **shape)
        made.load([f"user{i}" for i in range(64)])
        times = [seconds(lambda i=i: made.load([f"user{i}"])) for i in range(64, 96)]
    return {"value": statistics.median(times[2:])}
