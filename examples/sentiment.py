"""Teach a small language model to name the sentiment of a movie review, with LoRA.

    python examples/sentiment.py [--steps N] [--seed N] [--output-dir DIR] [--tiny]

The steps of a usual fine-tuning, in order: load a model, put an adapter on it, train it with the `Trainer` of
transformers, save it, load it again, merge it. In between, a second adapter, for another vocabulary of answers, is
trained on the same frozen model, and both are served side by side. Read `main` first.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import dataclass
from pathlib import Path

import _support as support
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft import LoraConfig, PeftModel, get_peft_model


PROMPT = "Review: {text}\nSentiment:"
BATCH = 8


@dataclass(frozen=True)
class Words:
    """The two words a model chooses from after the prompt."""

    negative: str
    positive: str

    def answer(self, row: dict) -> str:
        """The right one for a review."""
        return self.positive if row["label"] == "positive" else self.negative


SENTIMENT = Words(" negative", " positive")
THUMBS = Words(" down", " up")


# ---------------------------------------------------------------------------------------------------------- training


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[dict], words: Words) -> list[dict]:
    """Prompt and answer as token ids. The loss counts the answer alone: the label -100 means "do not look here"."""
    examples = []
    for row in rows:
        prompt = tokenizer.encode(PROMPT.format(text=row["text"]))
        answer = [*tokenizer.encode(words.answer(row)), tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return examples


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    steps: int,
    args: argparse.Namespace,
    learning_rate: float = 1e-3,
) -> None:
    """Train whatever is trainable in the model."""
    tokenizer.padding_side = "right"
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100),
    )
    trainer.train()


# --------------------------------------------------------------------------------------------------------- answering


@torch.inference_mode()
def next_word(model: PreTrainedModel | PeftModel, tokenizer, rows: list[dict], **kwargs) -> Tensor:
    """The logits of the word after each prompt, [rows, vocabulary]."""
    tokenizer.padding_side = "left"  # so that every prompt ends in the last column
    prompts = [PROMPT.format(text=row["text"]) for row in rows]
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)
    return model(**batch, use_cache=False, logits_to_keep=1, **kwargs).logits[:, -1].float().cpu()


def ask(model: PreTrainedModel | PeftModel, tokenizer, rows: list[dict], words: Words) -> dict[str, Tensor]:
    """Ask for the sentiment of every review, in the order given.

    "positive" says which of the two words has the larger logit; "unprompted" whether the right word has the largest of
    the whole vocabulary, though nobody told the model which two to choose from.
    """
    model.eval()
    negative, positive = (tokenizer.encode(word)[0] for word in (words.negative, words.positive))
    answers = {name: torch.zeros(len(rows), dtype=torch.bool) for name in ("positive", "unprompted")}
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]))  # so that batches need little padding
    for start in tqdm(range(0, len(rows), 4 * BATCH), desc="asking", leave=False):
        chosen = by_length[start : start + 4 * BATCH]
        logits = next_word(model, tokenizer, [rows[i] for i in chosen])
        right = torch.tensor([tokenizer.encode(words.answer(rows[i]))[0] for i in chosen])
        answers["positive"][chosen] = logits[:, positive] > logits[:, negative]
        answers["unprompted"][chosen] = logits.argmax(dim=-1) == right
    return answers


def score(answers: dict[str, Tensor], rows: list[dict]) -> dict[str, float]:
    """The shares of right answers."""
    truth = torch.tensor([row["label"] == "positive" for row in rows])
    return {
        "accuracy": (answers["positive"] == truth).float().mean().item(),
        "unprompted": answers["unprompted"].float().mean().item(),
    }


def serve(model: PeftModel, tokenizer, rows: list[dict]) -> float:
    """Answer requests that ask for different adapters: one by one, and in one batch.

    Returns the largest difference between a logit of the batch and the same request served alone.
    """
    requests = [(row, name) for row in rows for name in ("sentiment", "thumbs")]

    alone = []
    for row, name in requests:
        model.set_adapter(name)
        alone.append(next_word(model, tokenizer, [row]))

    batched = next_word(model, tokenizer, [row for row, _ in requests], adapter_names=[name for _, name in requests])

    for (row, name), logits in zip(requests, batched):
        word = tokenizer.decode(logits.argmax()).strip()
        print(f"  {name:>9} -> {word:<9} {row['text'][:72]}")
    return (torch.cat(alone) - batched).abs().max().item()


# ------------------------------------------------------------------------------------------------------------- the job


def train_two_adapters(path: Path, tokenizer, train_rows: list[dict], test_rows: list[dict], args, watch) -> dict:
    """Train both adapters on one frozen model and save them below `args.output_dir`, a folder each."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    support.heading("before: the model as it is")
    answers = {"before": ask(base, tokenizer, test_rows, SENTIMENT)}

    support.heading("the first adapter: name the sentiment")
    config = LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config, adapter_name="sentiment")
    model.print_trainable_parameters()
    trainable = {"sentiment": model.get_nb_trainable_parameters()}
    with watch("sentiment"):
        train(model, tokenizer, encode(tokenizer, train_rows, SENTIMENT), args.steps, args)
    answers["sentiment"] = ask(model, tokenizer, test_rows, SENTIMENT)

    support.heading("the second adapter, on the same frozen model: thumbs up or down")
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model.add_adapter("thumbs", config)
    model.set_adapter("thumbs")
    model.print_trainable_parameters()
    trainable["thumbs"] = model.get_nb_trainable_parameters()
    with watch("thumbs"):
        train(model, tokenizer, encode(tokenizer, train_rows, THUMBS), max(1, args.steps * 2 // 5), args)
    answers["thumbs"] = ask(model, tokenizer, test_rows, THUMBS)

    model.save_pretrained(args.output_dir)
    return {"answers": answers, "trainable": trainable}


def load_serve_and_merge(path: Path, tokenizer, test_rows: list[dict], args) -> dict:
    """Put the saved adapters on a fresh model, serve both, and merge one for good."""
    support.heading("load: both adapters on a fresh model")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.output_dir / "sentiment", adapter_name="sentiment")
    model.load_adapter(args.output_dir / "thumbs", adapter_name="thumbs")
    reloaded = ask(model, tokenizer, test_rows, SENTIMENT)

    support.heading("serve: every request names its adapter, and a batch may mix them")
    difference = serve(model, tokenizer, test_rows[:4])

    support.heading("merge: the plain model again, with the adapter in its weights")
    model.set_adapter("sentiment")
    merged = ask(model.merge_and_unload(), tokenizer, test_rows, SENTIMENT)
    return {"reloaded": reloaded, "merged": merged, "difference": difference}


def main(args: argparse.Namespace) -> None:
    """Train, load, serve, merge; then print what came of it."""
    support.quiet()
    watch = support.Stopwatch()
    path = support.fetch_model(tiny=args.tiny)
    set_seed(args.seed)  # here, so that fetching draws nothing from it
    tokenizer = AutoTokenizer.from_pretrained(path)
    train_rows, test_rows = support.read_reviews(args.tiny)

    trained = train_two_adapters(path, tokenizer, train_rows, test_rows, args, watch)
    gc.collect()  # the model that was trained goes before a fresh one comes
    loaded = load_serve_and_merge(path, tokenizer, test_rows, args)

    def same(answers: dict[str, Tensor]) -> int:
        return int((answers["positive"] == trained["answers"]["sentiment"]["positive"]).sum())

    results = {
        "held_out": len(test_rows),
        "scores": {name: score(answers, test_rows) for name, answers in trained["answers"].items()},
        "trainable": trained["trainable"],
        "bytes": {name: support.folder_size(args.output_dir / name) for name in ("sentiment", "thumbs")},
        "seconds": watch.seconds,
        "same_answers": {"reloaded": same(loaded["reloaded"]), "merged": same(loaded["merged"])},
        "mixed_batch_difference": loaded["difference"],
        "total_seconds": watch.total,
        "peak_memory_gib": support.peak_memory(),
    }
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    support.report(results)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line; the steps are those of the first adapter."""
    return support.parse_arguments("Fine-tune SmolLM2-135M with LoRA to name the sentiment of reviews.", 100, argv)


if __name__ == "__main__":
    main(parse_arguments())
