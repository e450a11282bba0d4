"""Six ways to teach a small language model the sentiment of movie reviews, on one base model that stays loaded.

    python examples/tutorial.py [--steps N] [--rows N] [--seed N] [--output-dir DIR] [--tiny]

The task, the prompt and the training are those of `sentiment.py`; the method is the only thing that changes: LoRA,
IA3, prefix tuning, prompt tuning, LLaMA-Adapter, and a bottleneck adapter. Each is put on the base, trained for the
same number of steps at the learning rate that suits it, asked about held-out reviews, saved, and taken off again.
Read `lessons` and `teach` first.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _support as support
import sentiment
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from peft import (
    AdaptionPromptConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)


@dataclass(frozen=True)
class Lesson:
    """A method, and the learning rate to train it with: the fewer numbers are trained, the larger the steps."""

    config: PeftConfig
    learning_rate: float


def lessons(path: Path, layers: int) -> dict[str, Lesson]:
    """The methods by name, for the tokenizer in `path` and a model of so many layers.

    Nothing is said about target modules: by default they are those which the architecture is known by.
    """
    hint = "Is the review positive or negative?"
    return {
        "LoRA": Lesson(
            LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, task_type="CAUSAL_LM"),
            1e-3,
        ),
        "IA3": Lesson(
            IA3Config(task_type="CAUSAL_LM"),
            1e-2,
        ),
        "prefix tuning": Lesson(
            PrefixTuningConfig(num_virtual_tokens=10, init_weights="zero", task_type="CAUSAL_LM"),
            3e-2,
        ),
        "prompt tuning": Lesson(
            PromptTuningConfig(
                num_virtual_tokens=8,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text=hint,
                tokenizer_name_or_path=str(path),
                task_type="CAUSAL_LM",
            ),
            3e-2,
        ),
        "LLaMA-Adapter": Lesson(
            AdaptionPromptConfig(adapter_len=10, adapter_layers=layers, task_type="CAUSAL_LM"),
            1e-2,
        ),
        "bottleneck": Lesson(
            BottleneckConfig(preset="pfeiffer", task_type="CAUSAL_LM"),
            1e-3,
        ),
    }


def teach(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, lesson: Lesson, args: argparse.Namespace
) -> dict[str, Any]:
    """Put an adapter on the base, train it, ask it, save it, and take it off: the base is as it was before."""
    train_rows, test_rows = support.read_reviews(args.tiny, args.rows)
    watch, folder = support.Stopwatch(), args.output_dir / name.lower().replace(" ", "-")
    set_seed(args.seed)

    model = get_peft_model(base, lesson.config)
    model.print_trainable_parameters()
    with watch("train"):
        examples = sentiment.encode(tokenizer, train_rows, sentiment.SENTIMENT)
        sentiment.train(model, tokenizer, examples, args.steps, args, lesson.learning_rate)
    answers = sentiment.ask(model, tokenizer, test_rows, sentiment.SENTIMENT)
    model.save_pretrained(folder)
    trainable, _ = model.get_nb_trainable_parameters()
    model.unload()

    return {
        **sentiment.score(answers, test_rows),
        "learning_rate": lesson.learning_rate,
        "trainable": trainable,
        "bytes": support.folder_size(folder),
        "seconds": watch.seconds["train"],
    }


def main(args: argparse.Namespace) -> None:
    """Ask the base, teach it by one method after the other, and print what came of it."""
    support.quiet()
    watch, path = support.Stopwatch(), support.fetch_model(tiny=args.tiny)
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    _, test_rows = support.read_reviews(args.tiny, args.rows)

    support.heading("before: the model as it is")
    before = sentiment.ask(base, tokenizer, test_rows, sentiment.SENTIMENT)
    methods = {}
    for name, lesson in lessons(path, base.config.num_hidden_layers).items():
        support.heading(f"{name}, learning rate {lesson.learning_rate:g}")
        methods[name] = teach(base, tokenizer, name, lesson, args)
    after = sentiment.ask(base, tokenizer, test_rows, sentiment.SENTIMENT)

    results = {
        "held_out": len(test_rows),
        "steps": args.steps,
        "before": sentiment.score(before, test_rows),
        "methods": methods,
        "base_is_as_it_was": all(torch.equal(after[name], before[name]) for name in before),
        "total_seconds": watch.total,
        "peak_memory_gib": support.peak_memory(),
    }
    (args.output_dir / "tutorial.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report(results)


def report(results: dict[str, Any]) -> None:
    """Print the table."""
    before, memory = results["before"], results["peak_memory_gib"]
    rows = [("", "two words", "all words", "trainable", "bytes", "seconds")]
    rows += [("before", f"{before['accuracy']:.1%}", f"{before['unprompted']:.1%}", "", "", "")]
    for name, found in results["methods"].items():
        accuracy = (f"{found['accuracy']:.1%}", f"{found['unprompted']:.1%}")
        rows.append((name, *accuracy, f"{found['trainable']:,}", f"{found['bytes']:,}", f"{found['seconds']:.0f}"))
    support.print_table(
        f"accuracy on {results['held_out']} held-out reviews after {results['steps']} steps, of the two words and of "
        "all words; trainable parameters; bytes of the adapter file; training time",
        rows,
    )
    print(f"without its adapters the base answers as before: {'yes' if results['base_is_as_it_was'] else 'no'}")
    print(f"total time {results['total_seconds']:.0f} s", f"peak memory {memory:.2f} GiB" if memory else "", sep=", ")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    return support.parse_arguments("Six methods on SmolLM2-135M, for the same task and steps.", 30, argv, rows=120)


if __name__ == "__main__":
    main(parse_arguments())
