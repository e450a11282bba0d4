"""Draws the pictures of `pictures.md`: three methods on a small model and a small task, some seconds of training.

python docs/pictures.py FOLDER
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft import IA3Config, LoraConfig, PeftModel, estimate_memory, get_peft_model
from peft.tools import plots


DOCS = Path(__file__).resolve().parent
STEPS, EVERY = 80, 20


def model() -> LlamaForCausalLM:
    """A llama of six layers that has learned nothing yet."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
    )


def sentences(count: int, seed: int) -> torch.Tensor:
    """Rows of numbers that go up by a step of their own: ``[count, 24]``."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (
        torch.randint(0, 64, (count, 1), generator=generator),
        torch.randint(1, 4, (count, 1), generator=generator),
    )
    return (start + step * torch.arange(24)) % 64


def train(config: Any, rate: float) -> tuple[PeftModel, list[dict[str, float]]]:
    """A trained adapter, and its log."""
    adapted = get_peft_model(model(), config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=rate)
    held, log = sentences(32, 10_000), []
    for step in range(1, STEPS + 1):
        rows = sentences(16, step)
        loss = adapted(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": loss.item()})
        if step % EVERY == 0:
            with torch.no_grad():
                log.append({"step": step, "eval_loss": adapted(input_ids=held, labels=held).loss.item()})
    return adapted, log


def updates(adapted: PeftModel) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Module -> norm of its update beside that of its weight, and -> singular values of the update."""
    norms, values = {}, {}
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            change, weight = module.get_delta_weight("default").detach(), module.get_base_layer().weight.detach()
            norms[name] = (change.norm() / weight.norm()).item()
            values[name] = torch.linalg.svdvals(change)[:8].tolist()
    return norms, values


def memory() -> dict[str, dict[str, float]]:
    """What a step takes in four settings of a model of 1.1 billion parameters, by estimate: nothing is loaded."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        dtype="bfloat16",
    )  # fmt: skip
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    given: dict[str, tuple[Any, dict[str, Any]]] = {
        "full fine-tuning": (None, {}),
        "LoRA": (lora, {}),
        "LoRA, checkpointed": (lora, {"gradient_checkpointing": True}),
        "QLoRA, checkpointed": (lora, {"gradient_checkpointing": True, "bits": 4}),
    }
    parts = ("weights", "gradients", "optimizer", "activations")
    found = {}
    for name, (adapter, options) in given.items():
        estimate = estimate_memory(config, adapter, 4, 512, dtype=torch.bfloat16, **options)
        found[name] = {part: getattr(estimate, part) for part in parts}
    return found


def table() -> list[dict[str, Any]]:
    """The rows of the table of six methods in `examples.md`."""
    text = (DOCS / "examples.md").read_text(encoding="utf-8").partition("## Six methods")[2]
    row = r"^\| ([^|,]+)[^|]*\| ([\d.]+)% \| [\d.]+% \| ([\d,]+) \| [\d,]+ \| (\d+) s \|$"
    return [
        {
            "name": name.strip(),
            "quality": float(accuracy),
            "parameters": int(count.replace(",", "")),
            "seconds": int(s),
        }
        for name, accuracy, count, s in re.findall(row, text, re.MULTILINE)
    ]


def draw() -> dict[str, bytes]:
    """File name -> content, each picture for light and for dark pages."""
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora, log = train(LoraConfig(r=8, lora_alpha=16, **common), 5e-3)
    runs = {
        "LoRA": log,
        "DoRA": train(LoraConfig(r=8, lora_alpha=16, use_dora=True, **common), 5e-3)[1],
        "IA3": train(
            IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), 5e-2
        )[1],
    }
    norms, values = updates(lora)
    drawn = {
        "loss_curves": (runs, {}),
        "update_map": (norms, {}),
        "spectra": (values, {}),
        "memory_bars": (memory(), {"limit": 8e9}),
        "comparison": (table(), {"quality": "accuracy (%)"}),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (data, options) in drawn.items():
            for theme in ("light", "dark"):
                file = Path(folder) / f"{name}-{theme}.svg"
                getattr(plots, name)(data, file, dark=theme == "dark", **options)
                found[file.name] = file.read_bytes()
    return found


if __name__ == "__main__":
    for name, content in draw().items():
        (Path(sys.argv[1]) / name).write_bytes(content)
