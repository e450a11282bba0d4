"""``peft generate``: answers to prompts, each by the adapter that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.cli import models
from peft.cli.command import Command, argument
from peft.cli.output import Output
from peft.cli.recipe import near_file
from peft.config import Options, option
from peft.core.model.context import BASE
from peft.errors import ConfigError, nearest
from peft.tools.merging import with_adapters


@dataclass
class GenerateOptions(Options):
    """Prompts, adapters, and how answers are drawn."""

    adapters: list[str] | None = argument("Adapters: folders, each with a name before it if need be (one=a/b).", "*")
    base: str | None = option(None, "Base model; that of the first adapter if left out.")
    prompt: str | None = option(None, "A prompt. Its answer is printed as it comes.")
    prompts: str | None = option(
        None, "A file of prompts: a line each, or .jsonl rows with prompt and, if need be, adapter ('base' for none)."
    )
    chat: bool = option(False, "Prompts are what a user says: put them in the chat template of the model.")
    output: str | None = option(None, "File for the answers, .jsonl.")
    max_new_tokens: int = option(64, "Tokens of an answer at most.", minimum=1)
    temperature: float = option(0.0, "0 takes the likeliest word; more draws.", minimum=0)
    batch_size: int = option(8, "Prompts at a time.", minimum=1)
    dtype: str = option("auto", "Dtype of the base.", choices=("auto", "float32", "bfloat16", "float16"))
    quantization: str | None = option(None, "Load the base quantised.", choices=("nf4", "fp4", "int8"))
    device: str | None = option(None, "Device; the first there is if left out.", choices=("cpu", "cuda"))
    seed: int = option(0, "Seed of what is drawn.")


def act(options: GenerateOptions, output: Output) -> dict[str, Any]:
    """Answer the prompts."""
    import transformers

    if (options.prompt is None) == (options.prompts is None):
        raise ConfigError("say what to answer: --prompt TEXT, or --prompts FILE.")
    adapters = models.pairs(options.adapters or [])
    requests = _requests(options, adapters)
    base = models.base_for(options.base, adapters)
    base.dtype, base.quantization = options.dtype, options.quantization
    tokenizer = models.load_tokenizer(base)
    model = with_adapters(models.load_base(base, device=options.device), adapters)
    transformers.set_seed(options.seed)
    for start in range(0, len(requests), options.batch_size):
        _answer(model, tokenizer, requests[start : start + options.batch_size], options, output, bool(adapters))
    if options.output is not None:
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        Path(options.output).write_text(lines, encoding="utf-8")
    return {"ok": True, "answers": requests, "streamed": options.prompt is not None}


def _requests(options: GenerateOptions, adapters: Mapping[str, str]) -> list[dict[str, Any]]:
    """The prompts, each with the adapter that answers it; the first one where a prompt names none."""
    first = next(iter(adapters), "base")
    if options.prompt is not None:
        return [{"prompt": options.prompt, "adapter": first}]
    if not Path(str(options.prompts)).is_file():
        raise ConfigError(f"there is no file {options.prompts!r}.{near_file(options.prompts)}")
    found = []
    for number, row in enumerate(_rows(str(options.prompts)), 1):
        name = row.get("adapter") or first
        if "prompt" not in row:
            raise ConfigError(f"{options.prompts}, line {number}: no prompt, only {', '.join(row)}.")
        if name != "base" and name not in adapters:
            hint = nearest(name, [*adapters, "base"])
            raise ConfigError(f"{options.prompts}, line {number}: no adapter is called {name!r}.{hint}")
        found.append({"prompt": row["prompt"], "adapter": name})
    if not found:
        raise ConfigError(f"{options.prompts} has no prompts.")
    return found


def _rows(file: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if not file.endswith((".jsonl", ".json")):
            yield {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: no JSON ({error}).") from error
        yield row if isinstance(row, dict) else {"prompt": str(row)}


def _answer(model: Any, tokenizer: Any, batch: list[dict[str, Any]], options: GenerateOptions, output: Output,
            adapted: bool) -> None:  # fmt: skip
    """Answer some prompts in one batch, whose rows may use different adapters."""
    import transformers

    texts = [request["prompt"] for request in batch]
    if options.chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
    tokenizer.padding_side = "left"  # what is new comes right after the prompt
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False,
                       add_special_tokens=not options.chat).to(model.device)  # fmt: skip
    how: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "pad_token_id": tokenizer.pad_token_id,
                           "do_sample": options.temperature > 0}  # fmt: skip
    if options.temperature > 0:
        how["temperature"] = options.temperature
    names = {request["adapter"] for request in batch}
    if adapted and len(names) > 1:
        how["adapter_names"] = [BASE if r["adapter"] == "base" else r["adapter"] for r in batch]
    elif adapted and names != {"base"}:
        model.set_adapter(next(iter(names)))
    if options.prompt is not None and not output.as_json and output.first:
        how["streamer"] = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if adapted and names == {"base"}:
        with model.disable_adapter():
            tokens = model.generate(**inputs, **how)
    else:
        tokens = model.generate(**inputs, **how)
    for request, row in zip(batch, tokens[:, inputs["input_ids"].shape[1] :]):
        request["answer"] = tokenizer.decode(row, skip_special_tokens=True)


def show(found: dict[str, Any], output: Output) -> None:
    """The answers; one that was streamed has been seen."""
    if not found["streamed"]:
        rows = [[a["prompt"], a["adapter"], a["answer"]] for a in found["answers"]]
        output.table(None, ["prompt", "adapter", "answer"], rows)


COMMAND = Command(
    "generate",
    "Answer a prompt as it comes, or a file of prompts in batches whose rows use different adapters.",
    "  peft generate runs/sentiment/adapter --prompt 'Review: A waste of time.\\nSentiment:'\n"
    "  peft generate up=runs/up/adapter down=runs/down/adapter --prompts prompts.jsonl --output answers.jsonl",
    GenerateOptions,
    act,
    show,
)
