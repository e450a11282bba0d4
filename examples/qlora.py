"""QLoRA: train LoRA on a base whose weights take four bits, and compare with LoRA on the same base in 32 bits.

    python examples/qlora.py [--steps N] [--rows N] [--seed N] [--output-dir DIR] [--tiny]

The task is that of `sentiment.py`. The base is loaded by bitsandbytes as NF4 with double quantisation, trained on, and
the adapter saved, reloaded on a 4-bit and on a 16-bit base, and merged both ways: into dense layers, exactly, and into
the four bits, which rounds. Read `train_on_four_bits` and `reload_and_merge` first.
"""

from __future__ import annotations

import argparse
import json
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import _support as support
import sentiment
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, set_seed

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training


def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies in it; elsewhere it is emulated, and many times slower than float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every version of torch
    native = torch.cuda.is_available() or any(getattr(torch.cpu, name, bool)() for name in names)
    return torch.bfloat16 if native else torch.float32


def load_in_four_bits(path: Path) -> PreTrainedModel:
    """The base as QLoRA has it, ready to carry adapters that are trained."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
    )
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.bfloat16)
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def adapter_config() -> LoraConfig:
    """LoRA on all linear layers, as in the paper."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")


def weight_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes that the linear layers of the blocks take, the scales of quantised ones included, and in 16 bits."""
    held = sixteen = 0
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            held += module.weight.nbytes
            state = getattr(module.weight, "quant_state", None)
            if state is not None:
                parts = state.as_dict(packed=True).values()
                held += sum(part.nbytes for part in parts)
            sixteen += 2 * module.in_features * module.out_features
    return {"held": held, "sixteen": sixteen}


# ------------------------------------------------------------------------------------------------------------- the job


def train(base: PreTrainedModel, path: Path, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train an adapter on a base, save it as `name`, and ask the model what it has learnt."""
    watch, tokenizer = support.Stopwatch(), AutoTokenizer.from_pretrained(path)
    train_rows, test_rows = support.read_reviews(args.tiny, args.rows)
    size = weight_bytes(base)
    set_seed(args.seed)
    model = get_peft_model(base, adapter_config())
    with watch("train"):
        sentiment.train(
            model, tokenizer, sentiment.encode(tokenizer, train_rows, sentiment.SENTIMENT), args.steps, args
        )
    peak = support.peak_memory()
    answers = sentiment.ask(model, tokenizer, test_rows, sentiment.SENTIMENT)
    model.save_pretrained(args.output_dir / name)
    return {"answers": answers, "bytes": size, "seconds": watch.seconds["train"], "peak": peak}


def train_on_thirty_two_bits(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """LoRA on the dense base in float32."""
    support.quiet()
    return train(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), path, args, "lora")


def train_on_four_bits(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """LoRA on the quantised base."""
    support.quiet()
    return train(load_in_four_bits(path), path, args, "qlora")


def reload_and_merge(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The saved adapter on a fresh 4-bit base and on a 16-bit one; then merged exactly, and into the four bits."""
    support.quiet()
    tokenizer, saved = AutoTokenizer.from_pretrained(path), args.output_dir / "qlora"
    _, rows = support.read_reviews(args.tiny, args.rows)

    def ask(model: Any) -> Tensor:
        return sentiment.ask(model, tokenizer, rows, sentiment.SENTIMENT)

    found: dict[str, Any] = {}
    model = PeftModel.from_pretrained(load_in_four_bits(path), saved)
    found["reloaded on 4 bits"] = ask(model)
    found["merged, dense"] = ask(model.merge_and_unload(dequantize=True))

    model = PeftModel.from_pretrained(load_in_four_bits(path), saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = model.merge_and_unload()
    for told in caught:
        if "relative error" in str(told.message):
            print(f"  {told.message}")
    found["merged into 4 bits"] = ask(merged)

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    if compute_dtype() == torch.float32:
        base = base.float()  # the same 16-bit weights, in a dtype that this processor multiplies in
    found["reloaded on 16 bits"] = ask(PeftModel.from_pretrained(base, saved))
    return found


def apart(job: Any, *arguments: Any) -> Any:
    """The result of a job in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(job, *arguments).result()


def main(args: argparse.Namespace) -> None:
    """Train twice, reload and merge; then print what came of it."""
    support.quiet()
    watch, path = support.Stopwatch(), support.fetch_model(tiny=args.tiny)
    _, rows = support.read_reviews(args.tiny, args.rows)
    support.heading("LoRA on the base in 32 bits")
    dense = apart(train_on_thirty_two_bits, path, args)
    support.heading("QLoRA: the same on the base in 4 bits")
    four = apart(train_on_four_bits, path, args)
    support.heading("reload on 4 and on 16 bits; merge into dense layers and into 4 bits")
    later = apart(reload_and_merge, path, args)

    def score(answers: Any) -> float:
        return sentiment.score(answers, rows)["accuracy"]

    results = {
        "held_out": len(rows),
        "accuracy": {"lora": score(dense["answers"]), "qlora": score(four["answers"])}
        | {name: score(answers) for name, answers in later.items()},
        "bytes": {"lora": dense["bytes"], "qlora": four["bytes"]},
        "seconds": {"lora": dense["seconds"], "qlora": four["seconds"]},
        "peak_memory_gib": {"lora": dense["peak"], "qlora": four["peak"]},
        "compute_dtype": str(compute_dtype()),
        "total_seconds": watch.total,
    }
    (args.output_dir / "qlora.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _report(results)


def _report(results: dict) -> None:
    names = ("lora", "qlora")
    sizes = results["bytes"]
    support.print_table(
        f"{results['held_out']} held-out reviews, {results['compute_dtype']}",
        [
            ("", "LoRA, 32 bits", "QLoRA, 4 bits"),
            ("accuracy", *(f"{results['accuracy'][name]:.1%}" for name in names)),
            ("linear layers, MB", *(f"{sizes[name]['held'] / 1e6:.1f}" for name in names)),
            ("of their bytes in 16 bits", *(f"{sizes[name]['held'] / sizes[name]['sixteen']:.3f}" for name in names)),
            ("peak memory in training, GiB", *(f"{results['peak_memory_gib'][name] or 0:.2f}" for name in names)),
            ("training time, s", *(f"{results['seconds'][name]:.0f}" for name in names)),
        ],
    )
    for name, value in results["accuracy"].items():
        if name not in names:
            print(f"accuracy {name}: {value:.1%}")
    print(f"total time {results['total_seconds']:.0f} s")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    about = "QLoRA on SmolLM2-135M, beside LoRA on the same base in 32 bits."
    return support.parse_arguments(about, 40, argv, rows=300)


if __name__ == "__main__":
    main(parse_arguments())
