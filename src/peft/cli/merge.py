"""``peft merge``: adapters into the files of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from peft.cli.command import Command, argument, output_of
from peft.cli.models import pairs
from peft.cli.output import Output
from peft.combining import WAYS, CombinationType, Vote
from peft.config import Options, option


@dataclass
class MergeOptions(Options):
    """What is merged, how, and where to."""

    base: str = argument("Base model: a folder, or a name on the hub.")
    adapters: list[str] = argument("Adapters: folders, each with a name before it if need be (one=runs/one).", "+")
    output: str | None = option(None, "Folder of the merged model.")
    weights: list[float] | None = option(None, "Weights of the adapters, as in 0.7,0.3; 1 each if left out.")
    combination: CombinationType | None = option(None, "How several are combined; the exact sum, if left out.",
                                     choices=tuple(WAYS))  # fmt: skip
    density: float | None = option(None, "Share of entries to keep, for the ways that prune.", above=0, maximum=1)
    majority_sign_method: Vote = option("total", "How ties, dare_ties, della and knots elect a sign.",
                                       choices=get_args(Vote))  # fmt: skip
    rank: int | None = option(None, "Rank of the result, for LoRAs and the ways that end in svd.", minimum=1)
    clamp: float | None = option(None, "Quantile that limits A and B, for the same.", above=0, maximum=1)
    dtype: str | None = option(None, "Dtype of the result; that of the base's files if left out.",
                               choices=("float32", "bfloat16", "float16"))  # fmt: skip
    safe: bool = option(True, "Refuse merged weights that are not finite.")
    quantized: bool = option(False, "Write a quantised base quantised again, instead of dense.")


def act(options: MergeOptions, output: Output) -> dict[str, Any]:
    """Merge and say what was written."""
    import torch

    from peft.tools.merging import merge_files

    target, adapters = output_of(options), pairs(options.adapters)
    with output.progress() as progress:
        bar = progress.add_task("merging")
        report = merge_files(
            options.base,
            adapters,
            target,
            weights=options.weights,
            combination=options.combination,
            density=options.density,
            majority_sign_method=options.majority_sign_method,
            svd_rank=options.rank,
            svd_clamp=options.clamp,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            safe_merge=options.safe,
            quantized=options.quantized,
            tell=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if report.in_memory:
        output.say(f"the whole model was loaded, as {report.in_memory}")
    return {"ok": True, **dataclasses.asdict(report)}


def show(found: dict[str, Any], output: Output) -> None:
    """A line."""
    output.print(
        f"{found['output']}: {found['tensors']} tensors in {found['shards']} file(s), {found['changed']} with adapters"
    )


COMMAND = Command(
    "merge",
    "Merge adapters into the files of a model, shard by shard: a layer is in memory at a time, not the model.",
    "  peft merge HuggingFaceTB/SmolLM2-135M-Instruct runs/sentiment/adapter -o merged\n"
    "  peft merge base runs/a/adapter runs/b/adapter --weights 0.7,0.3 --combination ties --density 0.5 -o mixed",
    MergeOptions,
    act,
    show,
)
