"""Newer methods and optimizers beside plain LoRA, at equal numbers of parameters, each at its own best learning rate.

    python benchmarks/newer.py [--rows lora,abba] [--json FILE] [--steps 80] [--seeds 2]

A LLaMA of 2 layers and width 96 learns to write movie reviews letter by letter (``examples/data``), and is then
adapted to the same text in capitals: all linear layers, as many steps for each. What counts is the loss on reviews
that no training has seen, in nats a letter. Each row is trained at each of its rates with one seed, and at the best
one with all seeds. One thread; four minutes of CPU time. Figures of so small a model say what can be expected to break
or to work, not what a method does for a large one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from _common import llama  # noqa: E402
from methods import LINEARS  # noqa: E402

from peft import (  # noqa: E402
    AbbaConfig,
    ComolConfig,
    DyLoraConfig,
    HRAConfig,
    IA3Config,
    LoraConfig,
    LoraXsConfig,
    MixLoraConfig,
    PeftMixedModel,
    get_peft_model,
)
from peft.helpers import spectral_surgery  # noqa: E402
from peft.optimizers import create_loramuon_optimizer, create_lorarite_optimizer  # noqa: E402
from peft.tuners.lora.surgery import MODES  # noqa: E402


REVIEWS = HERE.parent / "examples" / "data" / "movie_reviews.jsonl"
ROWS, LENGTH = 16, 64
ADAM = (1e-3, 3e-3, 1e-2, 3e-2)
FASTER = (3e-3, 1e-2, 3e-2, 1e-1)
SPECTRAL = (1e-2, 3e-2, 1e-1, 3e-1)


class Text:
    """Windows of a text, as numbers of its letters."""

    def __init__(self, text: str, letters: str) -> None:
        known = {letter: i for i, letter in enumerate(letters)}
        self.ids = torch.tensor([known[letter] for letter in text if letter in known])

    def batches(self, count: int, seed: int) -> Iterator[torch.Tensor]:
        """Random windows ``[ROWS, LENGTH]``."""
        draw = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts = torch.randint(0, len(self.ids) - LENGTH, (ROWS,), generator=draw)
            yield torch.stack([self.ids[i : i + LENGTH] for i in starts.tolist()])


def texts() -> tuple[Text, Text, Text, str]:
    """Reviews to learn letters from, the same in capitals, others in capitals to test on; the letters."""
    lines = [json.loads(line)["text"] for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    train, test = "\n".join(lines[:-500]), "\n".join(lines[-500:])
    letters = "".join(sorted({letter for letter in train + train.upper() if ord(letter) < 127}))
    return Text(train, letters), Text(train.upper(), letters), Text(test.upper(), letters), letters


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def tested(model: Any, text: Text) -> float:
    """The mean loss on the same windows for all."""
    model.eval()
    return statistics.fmean(loss_of(model, ids).item() for ids in text.batches(12, seed=99))


def pretrained(text: Text, letters: str, steps: int) -> Any:
    """The base model: what all rows start from."""
    model = llama(layers=2, width=96, inner=256, heads=4, kv_heads=4, vocab=len(letters)).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for ids in text.batches(steps, seed=0):
        loss_of(model, ids).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


# --- the rows -------------------------------------------------------------------------------------------------


def adamw(model: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def wrapped(config: Any) -> Callable[[Any, Text], Any]:
    """A model with one adapter."""
    config.target_modules = set(LINEARS)
    return lambda base, text: get_peft_model(base, config)


def pre_diagonal(base: Any, text: Text) -> PeftMixedModel:
    """Pre-Diag, W diag(d) x + s B A x: (IA)^3 on inputs beside a LoRA."""
    model = get_peft_model(base, LoraConfig(r=7, lora_alpha=14, target_modules=LINEARS), "pair", mixed=True)
    model.add_adapter("diagonal", IA3Config(target_modules=LINEARS, feedforward_modules=LINEARS))
    model.set_adapter(["pair", "diagonal"])
    return model


def task_aware(base: Any, text: Text) -> Any:
    """TLoRA's start: A from the singular vectors of W C, C the covariance of the inputs, and frozen."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, key=key: _covariance(seen, key, args[0]))
        for key, module in base.named_modules()
        if key.rpartition(".")[2] in LINEARS
    ]
    with torch.no_grad():
        for ids in text.batches(8, seed=7):
            base(input_ids=ids)
    for hook in hooks:
        hook.remove()
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))
    for key, c in seen.items():
        layer = model.get_submodule(f"base_model.model.{key}")
        v = torch.linalg.svd(layer.base_layer.weight @ c, full_matrices=False)[2]
        layer.lora_A["default"].weight.data.copy_(v[:16])
        layer.lora_A["default"].weight.requires_grad_(False)
    return model


def _covariance(seen: dict[str, torch.Tensor], key: str, x: torch.Tensor) -> None:
    flat = x.flatten(0, -2)
    seen[key] = seen.get(key, 0) + flat.T @ flat / len(flat)


@dataclass(frozen=True)
class Row:
    """A way of adapting: makes the model, makes its optimizer, and the rates to try."""

    make: Callable[[Any, Text], Any]
    optimizer: Callable[[Any, float], torch.optim.Optimizer] = adamw
    rates: tuple[float, ...] = ADAM


def rows() -> dict[str, Row]:
    """All rows by name, at about as many trained numbers as LoRA of rank 8."""
    lora = lambda: wrapped(LoraConfig(r=8, lora_alpha=16))  # noqa: E731
    return {
        "lora": Row(lora()),
        "lora_xs": Row(wrapped(LoraXsConfig(r=45, alpha=45)), rates=FASTER),
        "abba": Row(wrapped(AbbaConfig(r1=4, r2=4, alpha=16)), rates=FASTER),
        "dylora": Row(wrapped(DyLoraConfig(r=8, alpha=16))),
        "comol": Row(wrapped(ComolConfig(r=7, alpha=14, num_experts=4))),
        "mix_lora": Row(wrapped(MixLoraConfig(r=2, alpha=4, num_experts=3, top_k=2))),
        "LoRA-RITE": Row(lora(), create_lorarite_optimizer, SPECTRAL),
        "LoRA-Muon": Row(lora(), create_loramuon_optimizer, SPECTRAL),
        "TLoRA": Row(task_aware),
        "Pre-Diag": Row(pre_diagonal),
        "hra": Row(wrapped(HRAConfig(r=16)), rates=FASTER),
    }


# --- measuring ------------------------------------------------------------------------------------------------


def trained(row: Row, base: Any, texts: tuple[Text, Text], rate: float, steps: int, seed: int) -> Any:
    """The adapted model after its training; the base is as it was once the adapter is unloaded."""
    torch.manual_seed(seed)
    model = row.make(base, texts[0]).train()
    optimizer = row.optimizer(model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.cos(math.pi / 2 * step / steps))
    for ids in texts[0].batches(steps, seed=seed + 1):
        loss_of(model, ids).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def measure(name: str, row: Row, base: Any, texts: tuple[Text, Text], steps: int, seeds: int) -> dict[str, Any]:
    """The losses at each rate, and at the best one with each seed."""
    start, losses, count = time.process_time(), {}, 0
    for rate in row.rates:
        model = trained(row, base, texts, rate, steps, seed=0)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        losses[rate] = tested(model, texts[1])
        model.unload()
    best = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
    each = [losses[best]]
    for seed in range(1, seeds):
        model = trained(row, base, texts, best, steps, seed)
        each.append(tested(model, texts[1]))
        model.unload()
    return {"trained": count, "rates": losses, "best": best, "losses": each,
            "seconds": round(time.process_time() - start, 1)}  # fmt: skip


def measure_surgery(row: Row, base: Any, texts: tuple[Text, Text], rate: float, steps: int) -> dict[str, float]:
    """The loss of a trained LoRA, and after each mode of Spectral Surgery on four batches of its training text."""
    model = trained(row, base, texts, rate, steps, seed=0)
    found = {"before": tested(model, texts[1])}
    for mode in MODES:
        losses = (loss_of(model, ids) for ids in texts[0].batches(4, seed=55))
        spectral_surgery(model, losses, "default", mode, mode=mode)
        found[mode] = tested(model, texts[1])
        model.set_adapter("default")
    model.unload()
    return found


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="some of them, with commas between")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--base-steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    letters_of, capitals, held_out, letters = texts()
    base, known = pretrained(letters_of, letters, options.base_steps), rows()
    names = options.rows.split(",") if options.rows else list(known)
    found: dict[str, Any] = {"base": tested(base, held_out), "steps": options.steps, "rows": {}}
    print(f"base {found['base']:.4f}, after {time.process_time():.0f} s", flush=True)
    for name in names:
        entry = measure(name, known[name], base, (capitals, held_out), options.steps, options.seeds)
        found["rows"][name] = entry
        swept = " ".join(f"{rate:g}: {loss:.4f}" for rate, loss in entry["rates"].items())
        mean = statistics.fmean(entry["losses"])
        print(f"{name:10} {entry['trained']:6} {mean:.4f} at {entry['best']:g}   {swept}", flush=True)
        if name == "lora":
            found["surgery"] = measure_surgery(known[name], base, (capitals, held_out), entry["best"], options.steps)
            print("           surgery", {mode: round(loss, 4) for mode, loss in found["surgery"].items()}, flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
