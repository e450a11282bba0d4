"""The cases of run.py with many adapters: trained together, and served from a pool of thousands; and Arrow's.

    BENCHMARK_CLOCK=cpu OMP_NUM_THREADS=1 python benchmarks/many.py [--widths 1024] [--ranks 16,64] [--tokens 1,512]

is the table of an Arrow router over eight adapters, two for each token: routing and products of one layer as a ratio
to what all eight take, one by one as the formula says, or by two stacked products. It goes to
``benchmarks/RESULTS.md`` unless a size is picked.

A library without `MultiAdapterTrainer` and `AdapterPool` has no figures for these, but for the loading of an adapter.
"""

from __future__ import annotations

import argparse
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


# --- routed --------------------------------------------------------------------------------------------------
EXPERTS, CHOSEN = 8, 2
SIZES = {"widths": [576, 1024, 4096], "ranks": [8, 16, 32, 64, 128], "tokens": [1, 8, 64, 512, 2048]}
LEGEND = (
    f"Each cell: {CHOSEN} of {EXPERTS} experts / all of them one by one, / all of them stacked; the same forward and "
    "backward to x. Bold is what takes more than half of all of them one by one."
)


def routed(width: int, rank: int, count: int, backward: bool) -> tuple[float, float]:
    """What Arrow's update of ``count`` tokens takes beside all experts one by one, and beside all of them stacked.

    With ``backward`` the gradient of the layer's input is computed too.
    """
    from peft.tuners.lora.arrow import direction
    from peft.tuners.lora.arrow_products import mixed, mixed_by_stack, route, stacked

    torch.manual_seed(0)
    pairs = [(torch.randn(rank, width) / width**0.5, torch.randn(width, rank) / rank**0.5) for _ in range(EXPERTS)]
    directions, stack = (
        torch.stack([direction(a, b) for a, b in pairs]),
        stacked(pairs, [1.0] * EXPERTS, CHOSEN, once=False),
    )
    x, dy = torch.randn(count, width).requires_grad_(backward), torch.randn(count, width)

    def in_turn_of_experts() -> torch.Tensor:
        chosen, weights = route(x, directions, CHOSEN, 1.0)
        each, y = x.new_zeros(count, EXPERTS).scatter(1, chosen, weights), 0
        for e, (a, b) in enumerate(pairs):
            y = y + each[:, e, None] * (x @ a.T @ b.T)
        return y

    def step(way: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(way(), x, dy) if backward else way()

    ways = (
        lambda: mixed(x, directions, CHOSEN, 1.0, stack),
        in_turn_of_experts,
        lambda: mixed_by_stack(x, *route(x, directions, CHOSEN, 1.0), stack),
    )
    with torch.set_grad_enabled(backward):
        for way in ways[1:]:
            torch.testing.assert_close(way(), ways[0](), rtol=1e-3, atol=1e-3)
        repeats = max(5, min(200, 2**30 // (count * width * rank)))
        ours, each, stacks = in_turn(*map(step, ways), repeats=repeats)
    return ratio(ours, each), ratio(ours, stacks)


def main() -> None:
    """Measure Arrow over all sizes, print the table, and write it."""
    from _common import measured_with, write_section

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SIZES:
        parser.add_argument(f"--{name}", help="some of them, with commas between")
    options = vars(parser.parse_args())
    sizes = {name: [int(n) for n in options[name].split(",")] if options[name] else SIZES[name] for name in SIZES}
    head = [f"{count} token{'s' * (count > 1)}" for count in sizes["tokens"]]
    lines = [f"| width | rank | {' | '.join(head)} |", "|---:|---:|" + "---|" * len(head)]
    print("\n".join(lines), flush=True)
    found: list[float] = []
    for width in sizes["widths"]:
        for rank in sizes["ranks"]:
            cells = []
            for count in sizes["tokens"]:
                ways = [routed(width, rank, count, backward) for backward in (False, True)]
                found += [round(each, 2) for each, _ in ways]
                texts = (f"{each:.2f}, {stacks:.2f}" for each, stacks in ways)
                cells.append("; ".join(f"**{text}**" if n > 0.5 else text for n, text in zip(found[-2:], texts)))
            lines.append(f"| {width:,} | {rank} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    over = [n for n in found if n > 0.5]
    lines += [
        "",
        f"At most half: {len(found) - len(over)} of {len(found)}; the others up to {max(over, default=0):.2f}.",
    ]
    print(lines[-1])
    if not any(options.values()):
        head = measured_with(None, torch.get_num_threads())
        write_section("many.py", "\n".join([*head, LEGEND, "", *lines]))


if __name__ == "__main__":
    main()
