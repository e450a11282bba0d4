"""LoRA, its starts, variants and optimizers on one real task: accuracy, cost of a step, bytes kept, time to start.

    python benchmarks/starts.py [--rows plain,DoRA] [--output FILE] [--steps 100] [--held-out 160] [--tiny]
    python benchmarks/starts.py --page          only writes the page from what the file has

The model and the task are those of `examples/sentiment.py`, the adapter has the demo's rank and modules. Each row is
trained with each of three learning rates, the same three for all; the one with the smallest loss on reviews set aside
from the training data counts, and answers the held-out reviews. The file is written after each run, and what it has is
not run again. Times are CPU times, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]
import _common as common  # noqa: E402
import _support as support  # noqa: E402
import sentiment  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer  # noqa: E402
from peft.tuners.lora import (  # noqa: E402
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)


OUTPUT = HERE.parent / "docs" / "measured" / "starts.json"
PAGE = HERE.parent / "docs" / "starts.md"
BATCH, LONGEST, ASIDE = 3, 20, 48
RATES = (1e-3, 2e-4, 5e-3)
SHARED: dict[str, Any] = {
    "r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"
}  # fmt: skip

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The optimizer of the rows that say nothing else."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def plus(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """LoRA+ with the ratio of its paper."""
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=16)


def frozen_a(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """LoRA-FA."""
    return create_lorafa_optimizer(model, r=SHARED["r"], lora_alpha=SHARED["lora_alpha"], lr=rate)


def corda(base: nn.Module, config: LoraConfig, data: list[Batch]) -> None:
    """CorDA's covariances."""
    preprocess_corda(base, config, lambda: [base(**inputs, logits_to_keep=1) for inputs, _ in data] and None)


def lora_ga(base: nn.Module, config: LoraConfig, data: list[Batch]) -> None:
    """LoRA-GA's gradients."""
    preprocess_loraga(base, config, lambda: [loss_of(base, batch).backward() for batch in data] and None)


def eva(model: nn.Module, data: list[Batch]) -> None:
    """EVA's components."""
    initialize_lora_eva_weights(model, [inputs for inputs, _ in data], show_progress_bar=False)


@dataclass(frozen=True)
class Row:
    """A row of the table: fields of the config, what runs before and after `get_peft_model`, the optimizer."""

    fields: dict[str, Any] = field(default_factory=dict)
    before: Callable[..., None] | None = None
    after: Callable[..., None] | None = None
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = adamw


ROWS = {
    "plain": Row(),
    "rsLoRA": Row({"use_rslora": True}),
    "DoRA": Row({"use_dora": True}),
    "PiSSA": Row({"init_lora_weights": "pissa"}),
    "OLoRA": Row({"init_lora_weights": "olora"}),
    "EVA": Row({"init_lora_weights": "eva", "eva_config": EvaConfig()}, after=eva),
    "CorDA": Row({"init_lora_weights": "corda", "corda_config": CordaConfig()}, before=corda),
    "LoRA-GA": Row({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, before=lora_ga),
    "LoRA+": Row(optimizer=plus),
    "LoRA-FA": Row(optimizer=frozen_a),
    "KaSA": Row({"kasa_config": KasaConfig()}),
    "MiCA": Row({"init_lora_weights": "mica"}),
}


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Batches to train on and to start from, reviews that choose the learning rate, and those that are asked."""

    train: list[Batch]
    calibration: list[Batch]
    aside: list[dict]
    held_out: list[dict]


def read(tokenizer: Any, args: argparse.Namespace) -> Data:
    """Short reviews only, so that a run takes less than a minute on one thread."""
    train, test = support.read_reviews(args.tiny)
    short = [row for row in train if len(prompt(tokenizer, row)) <= LONGEST or args.tiny]
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(args.seed)).tolist()
    aside = min(ASIDE, len(short) // 4)
    chosen = [short[i] for i in order[aside:]]
    starts = [i * BATCH % (len(chosen) - BATCH + 1) for i in range(args.steps)]
    batches = [batch_of(tokenizer, chosen[i : i + BATCH]) for i in starts]
    held_out = [row for row in test if len(prompt(tokenizer, row)) <= LONGEST + 10 or args.tiny][: args.held_out]
    return Data(batches, batches[:16], [short[i] for i in order[:aside]], held_out)


def prompt(tokenizer: Any, row: dict) -> list[int]:
    """Token ids of a question."""
    return tokenizer.encode(sentiment.PROMPT.format(text=row["text"]))


def batch_of(tokenizer: Any, rows: list[dict]) -> Batch:
    """Questions, padded on the left so that each ends in the last column, and the ids of the right words."""
    tokenizer.padding_side = "left"
    texts = [sentiment.PROMPT.format(text=row["text"]) for row in rows]
    words = [tokenizer.encode(sentiment.SENTIMENT.answer(row))[0] for row in rows]
    return dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)), torch.tensor(words)


def loss_of(model: nn.Module, batch: Batch, **inputs: Any) -> torch.Tensor:
    """Cross entropy of the right word among all words."""
    return F.cross_entropy(model(**(batch[0] | inputs), logits_to_keep=1).logits[:, -1].float(), batch[1])


# ------------------------------------------------------------------------------------------------------------- running


def step_of(model: nn.Module, batch: Batch) -> None:
    """Forward and backward of an adapted model."""
    loss = loss_of(model, batch)
    if model.peft_config["default"].kasa_config is not None:
        loss = loss + model.base_model._get_kasa_loss()
    loss.backward()


def floor_of(base: nn.Module, batch: Batch) -> None:
    """Forward and backward of a frozen model to its input embeddings: what no training can go below."""
    embedded = base.get_input_embeddings()(batch[0]["input_ids"]).detach().requires_grad_()
    loss_of(base, batch, input_ids=None, inputs_embeds=embedded).backward()


def clocked(action: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    begun = time.process_time()
    action()
    return time.process_time() - begun


def start(base: nn.Module, row: Row, data: Data, seed: int) -> tuple[nn.Module, float]:
    """The adapted model, and the CPU seconds that it took to make it from the base."""
    torch.manual_seed(seed)
    begun = time.process_time()
    config = LoraConfig(**SHARED, **row.fields)
    if row.before is not None:
        row.before(base, config, data.calibration)
    model = get_peft_model(base, config)
    if row.after is not None:
        row.after(model, data.calibration)
    return model, time.process_time() - begun


def train(model: nn.Module, twin: nn.Module, row: Row, rate: float, data: Data) -> list[float]:
    """Train with warm-up, a cosine and clipped gradients; every twentieth step's CPU time over that of the floor."""
    optimizer = row.optimizer(model, rate)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    steps = len(data.train)
    warm = max(1, steps // 10)

    def factor(i: int) -> float:
        return min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warm) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def step(batch: Batch) -> None:
        step_of(model, batch)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ratios = []
    model.train()
    for i, batch in enumerate(data.train):
        seconds = clocked(functools.partial(step, batch))
        schedule.step()
        if i % 20 == 19 or steps < 20:
            ratios.append(seconds / clocked(functools.partial(floor_of, twin, batch)))
    return ratios


@torch.inference_mode()
def mean_loss(model: nn.Module, tokenizer: Any, rows: list[dict]) -> float:
    """Mean loss over reviews."""
    model.eval()
    parts = [rows[i : i + 16] for i in range(0, len(rows), 16)]
    return sum(loss_of(model, batch_of(tokenizer, part)).item() * len(part) for part in parts) / len(rows)


def bits(right: torch.Tensor) -> str:
    """A character a review: 1 where the answer was right."""
    return "".join(str(int(each)) for each in right)


def asked(model: nn.Module, tokenizer: Any, rows: list[dict]) -> dict[str, str]:
    """Which of the held-out reviews were answered rightly, choosing from the two words and from all."""
    answers = sentiment.ask(model, tokenizer, rows, sentiment.SENTIMENT)
    truth = torch.tensor([row["label"] == "positive" for row in rows])
    return {"two_words": bits(answers["positive"] == truth), "all_words": bits(answers["unprompted"])}


def run_row(name: str, base: nn.Module, tokenizer: Any, data: Data, results: dict, args: argparse.Namespace) -> None:
    """All runs of a row that the results lack."""
    row, found = ROWS[name], results["rows"].setdefault(name, {"runs": {}})
    missing = [rate for rate in RATES if f"{rate:g}" not in found["runs"]]
    if not missing:
        return
    twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    before = {key: value.clone() for key, value in base.state_dict().items() if "proj" in key}
    model, found["start_seconds"] = start(base, row, data, args.seed)
    fresh = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    found["trainable"] = sum(p.numel() for p in fresh.values())
    for rate in missing:
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key in fresh:
                    p.copy_(fresh[key])
        run: dict[str, Any] = {"step": train(model, twin, row, rate, data)}
        found["bytes"] = [
            common.saved_bytes(functools.partial(step, each, data.train[0]), each)
            for step, each in ((step_of, model), (floor_of, twin))
        ]
        model.zero_grad()
        run["loss"] = mean_loss(model, tokenizer, data.aside)
        if run["loss"] <= min((each["loss"] for each in found["runs"].values()), default=math.inf):
            run.update(asked(model, tokenizer, data.held_out))
        found["runs"][f"{rate:g}"] = run
        write(results, args)
        print(f"{name} {rate:g}: loss {run['loss']:.3f}", flush=True)
    model.unload()
    found["base_is_as_it_was"] = all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
    write(results, args)


def write(results: dict, args: argparse.Namespace) -> None:
    """Write the file, whole or not at all."""
    unfinished = args.output.with_suffix(".new")
    unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(args.output)


# ---------------------------------------------------------------------------------------------------------- the page


def best_of(found: dict) -> tuple[str, dict]:
    """The learning rate with the smallest loss aside, and its run."""
    return min(found["runs"].items(), key=lambda each: each[1]["loss"])


def share(right: str) -> float:
    """Share of right answers."""
    return right.count("1") / len(right)


def beside(right: str, other: str) -> tuple[float, float]:
    """By how much a share of right answers is above another's on the same reviews, and the error of that."""
    gained, lost = (sum(a > b for a, b in zip(x, y)) for x, y in ((right, other), (other, right)))
    return (gained - lost) / len(right), math.sqrt(max(gained + lost - (gained - lost) ** 2 / len(right), 0)) / len(
        right
    )


def table(results: dict) -> list[str]:
    """The lines of the table."""
    lines = [
        "| | learning rate | loss aside | accuracy, of two words | beside plain | of all words | step / floor "
        "| bytes / floor | start-up, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    before = results["before"]
    cells = [share(before[key]) for key in ("two_words", "all_words")]
    lines.append(f"| no adapter | | {before['loss']:.3f} | {cells[0]:.1%} | | {cells[1]:.1%} | | | |")
    plain = best_of(results["rows"]["plain"])[1]
    for name, found in results["rows"].items():
        rate, run = best_of(found)
        gain, error = beside(run["two_words"], plain["two_words"])
        step = statistics.median(ratio for each in found["runs"].values() for ratio in each["step"])
        against = "" if name == "plain" else f"{100 * gain:+.1f} ± {100 * error:.1f}"
        lines.append(
            f"| {name} | {rate} | {run['loss']:.3f} | {share(run['two_words']):.1%} | {against} "
            f"| {share(run['all_words']):.1%} | {step:.2f} | {found['bytes'][0] / found['bytes'][1]:.2f} "
            f"| {found['start_seconds']:.1f} |"
        )
    return lines


SURE = 2.84
"""How many errors a difference must be, so that one of eleven is that large by chance in one table of twenty."""


def verdict(results: dict) -> str:
    """Which rows beat plain LoRA, which do not, and which only had the smaller loss."""
    plain = best_of(results["rows"]["plain"])[1]
    sides: dict[str, list[str]] = {"better": [], "same": [], "worse": [], "loss": []}
    for name, found in results["rows"].items():
        if name != "plain":
            run = best_of(found)[1]
            gain, error = beside(run["two_words"], plain["two_words"])
            sides["better" if gain > SURE * error else "worse" if gain < -SURE * error else "same"].append(name)
            sides["loss"] += [name] * (run["loss"] < plain["loss"])
    said = {side: ", ".join(names) or "none" for side, names in sides.items()}
    return (
        f"**Beat plain LoRA here**, by more than {SURE} errors of the difference (one of eleven rows does so by "
        f"chance in one table of twenty): {said['better']}. **Do not beat it here**: {said['same']}. **Are worse**: "
        f"{said['worse']}.\n\n"
        "The loss on the reviews set aside, by which the learning rates were chosen, is below that of plain LoRA for: "
        f"{said['loss']}. A hundred steps with one seed cannot tell gains of a few points from chance: they are no "
        "reason to pay for a start or a variant, and none to rule one out for a longer training."
    )


def page(results: dict) -> str:
    """The page of the documents, in Markdown."""
    said = results["settings"]
    return "\n".join([
        "# LoRA's starts and variants, measured",
        "",
        f"SmolLM2-135M names the sentiment of movie reviews, the task of `make demo`: {said['steps']} steps of "
        f"{BATCH} reviews of at most {LONGEST} tokens, rank {SHARED['r']}, alpha {SHARED['lora_alpha']}, on "
        f"{' and '.join(f'`{name}`' for name in SHARED['target_modules'])}, float32. Each row is trained with the "
        f"learning rates {', '.join(f'{rate:g}' for rate in sorted(RATES))}; the one with the smallest loss on "
        f"{said['aside']} reviews set aside counts, and is asked about {said['held_out']} others. One seed. Made by "
        f"`benchmarks/starts.py` ({said['versions']}; {said['machine']}, one thread).",
        "",
        *table(results),
        "",
        "'Beside plain' is the difference in points on the same reviews, with its standard error. A step is forward, "
        "backward and optimizer, in CPU time over the frozen model's forward and backward; bytes are those that "
        "autograd keeps. Start-up is CPU time from the plain model to the first step, with the passes over 48 reviews "
        "that EVA, CorDA and LoRA-GA make before.",
        "",
        verdict(results),
        "",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the file lacks, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows, by name")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a random tiny model: does it all run?")
    parser.add_argument("--page", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if not args.page:
        measure(results, args)
    if args.output == OUTPUT:
        PAGE.write_text(page(results), encoding="utf-8")
    if "plain" in results["rows"]:  # the others stand beside it
        print("\n".join(table(results)))


def measure(results: dict, args: argparse.Namespace) -> None:
    """Add to the results what they lack."""
    torch.set_num_threads(1)
    support.quiet()
    path = support.fetch_model(tiny=args.tiny)
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)
    data = read(tokenizer, args)
    common.keep_freed_memory()
    results.setdefault("rows", {})
    results["settings"] = {
        "steps": args.steps, "seed": args.seed, "aside": len(data.aside), "held_out": len(data.held_out),
        "machine": common.machine(), "versions": common.versions("torch", "transformers"),
    }  # fmt: skip
    if "before" not in results:
        before = asked(base, tokenizer, data.held_out)
        results["before"] = {**before, "loss": mean_loss(base, tokenizer, data.aside)}
    for name in args.rows.split(","):
        run_row(name, base, tokenizer, data, results, args)


if __name__ == "__main__":
    main()
