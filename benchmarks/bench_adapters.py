"""What many adapters in one model cost: loading the 30th against the first, switching and training steps with 30
present against 1. All figures are ratios of medians, measured side by side in one run.

    python benchmarks/bench_adapters.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model


ADAPTERS = 30
LAYERS = 8


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config)


def lora() -> LoraConfig:
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def load_times(folder: Path, count: int) -> list[float]:
    """Seconds that each of ``count`` adapters takes to load into one model."""
    model = PeftModel.from_pretrained(base_model(), folder, adapter_name="a0")
    return [seconds(lambda i=i: model.load_adapter(folder, f"a{i}")) for i in range(1, count + 1)]


def stepper(model: PeftModel, ids: torch.Tensor) -> Callable[[], None]:
    """A training step that touches what an optimizer would: the parameters that train."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def paired(one: Callable[[], object], many: Callable[[], object], repeats: int) -> float:
    """Median ratio many / one, taken in turn so that a drifting machine slows both."""
    one(), many()
    return statistics.median(seconds(many) / seconds(one) for _ in range(repeats))


def main() -> None:
    torch.set_num_threads(2)
    ids = torch.randint(0, 1000, (2, 64))
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(base_model(), lora()).save_pretrained(folder)
        runs = [load_times(Path(folder), ADAPTERS) for _ in range(5)]
        first = statistics.median(run[0] for run in runs)
        last = statistics.median(run[-1] for run in runs)
        print(f"loading adapter {ADAPTERS} / adapter 1: {last / first:.2f} ({first * 1e3:.0f} ms the first)")

        few = PeftModel.from_pretrained(base_model(), folder, adapter_name="a0", is_trainable=True)
        few.load_adapter(folder, "a1")
        many = PeftModel.from_pretrained(base_model(), folder, adapter_name="a0", is_trainable=True)
        for i in range(1, ADAPTERS):
            many.load_adapter(folder, f"a{i}")

        def switch(model: PeftModel) -> None:
            model.set_adapter("a1")
            model.set_adapter("a0")

        switching = paired(lambda: switch(few), lambda: switch(many), 50)
        print(f"switching, {ADAPTERS} present / 2 present: {switching:.2f}")
        step = paired(stepper(few, ids), stepper(many, ids), 40)
        print(f"training step, {ADAPTERS} present / 2 present: {step:.2f}")
        names = ["a0", "a1"]
        mixed = paired(lambda: few(input_ids=ids), lambda: few(input_ids=ids, adapter_names=names), 40)
        print(f"forward of a batch with 2 adapters / with 1: {mixed:.2f}")


if __name__ == "__main__":
    main()
