"""Odd input to conversion, extraction, resizing and merging: an error that names it, and nothing written."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert_formats import lora
from toys import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from peft.convert import convert_adapter, extract_adapter, resize_adapter
from peft.tools.merging import merge_files


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters, some of them damaged."""
    here = tmp_path_factory.mktemp("files")
    base, _ = lora(here / "lora")
    tensors = load_file(here / "lora" / WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name)
    odd = {
        "half": {key: t for key, t in tensors.items() if key != name},
        "ranks": tensors | {name: tensors[name][:2].contiguous()},
        "nan": tensors | {name: tensors[name] * torch.nan},
        "other": {key.replace("layers.0", "layers.7"): t for key, t in tensors.items()},
    }
    for what, given in odd.items():
        shutil.copytree(here / "lora", here / what)
        save_file(given, here / what / WEIGHTS)
    for what, text in (("torn", '{"r": '), ("list", "[1]"), ("alone", None)):
        shutil.copytree(here / "lora", here / what)
        (here / what / CONFIG).unlink() if text is None else (here / what / CONFIG).write_text(text)
    (here / "empty").mkdir()
    (here / "empty.safetensors").touch()
    (here / "text.txt").write_text("hello")
    (here / "fake.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    base.save_pretrained(here / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.q_proj.weight += 1
    tuned.save_pretrained(here / "tuned")
    tuned.save_pretrained(here / "shards", max_shard_size="7KB")
    next((here / "shards").glob("*-00002-of-*.safetensors")).unlink()
    for what, change in (("eights", lambda t: t.to(torch.float8_e4m3fn)), ("nans", lambda t: t * torch.nan)):
        shutil.copytree(here / "tuned", here / what)
        weights = load_file(here / "tuned" / "model.safetensors")
        save_file({k: change(t) for k, t in weights.items()}, here / what / "model.safetensors", {"format": "pt"})
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "num_hidden_layers": 3})
    LlamaForCausalLM(config).save_pretrained(here / "deeper")
    return here


def convert(source: str, target: str = "mlx", output: str = "out", base: str | None = None) -> Callable[[Path], None]:
    return lambda here: convert_adapter(here / source, target, here / output, base=base and here / base)  # type: ignore[func-returns-value]


def extract(base: str, tuned: str, output: str = "out") -> Callable[[Path], None]:
    return lambda here: extract_adapter(here / base, here / tuned, here / output, rank=2)  # type: ignore[func-returns-value]


def resize(source: str) -> Callable[[Path], None]:
    return lambda here: resize_adapter(here / source, here / "out", rank=2)  # type: ignore[func-returns-value]


def merge(adapter: str, output: str = "out") -> Callable[[Path], None]:
    return lambda here: merge_files(here / "base", {"one": here / adapter}, here / output)  # type: ignore[func-returns-value]


CASES = {
    "an empty folder": (convert("empty"), "should hold one file of adapter weights, and there are: none"),
    "an empty file": (convert("empty.safetensors"), r"empty.safetensors is empty"),
    "a text": (convert("text.txt"), "no file of weights: neither safetensors, a pickle of tensors nor GGUF"),
    "no GGUF": (convert("fake.gguf", base="base"), "fake.gguf is damaged, or no GGUF file"),
    "a model": (convert("base"), "of a model, not of an adapter: extract_adapter"),
    "no config": (convert("alone"), "needs its adapter_config.json beside it"),
    "a torn config": (convert("torn"), r"adapter_config.json' is damaged or truncated"),
    "no object": (convert("list"), "must hold an object of fields, not a list"),
    "two ranks": (convert("ranks"), r"A is \[2, \d+\] and B \[\d+, 3\], whose ranks differ"),
    "another base": (convert("other", base="base"), r"layers.7.\w+.\w+: the base model has no such module"),
    "an adapter as base": (convert("lora", base="half"), "half is the folder of an adapter, not of a base model"),
    "no base": (convert("lora", base="nowhere"), "nowhere is no folder with a config.json"),
    "in the same folder": (convert("lora", output="lora"), r"holds another adapter \(adapter_model.safetensors\)"),
    "a folder called as a file": (convert("lora", output="out.safetensors"), "mlx is written as a folder"),
    "another kind of file": (convert("lora", "kohya", "out.bin"), "a file that ends in .safetensors"),
    "a missing shard": (extract("base", "shards"), r"lacks model-00002-of-\d+.safetensors"),
    "a base with a layer more": (extract("deeper", "base"), "tensors that the fine-tuned model lacks: model.layers.2"),
    "a layer more": (extract("base", "deeper"), "tensors that the base lacks: model.layers.2"),
    "8 bits": (extract("base", "eights"), r"kept as float8_e4m3fn in the fine-tuned model.*dense weights first"),
    "no numbers": (extract("base", "nans"), "embed_tokens has NaN or infinite entries"),
    "into the base": (extract("base", "tuned", "base"), "is the folder of the base model: name another one"),
    "an adapter as a model": (extract("base", "lora"), "have no tensor model.embed_tokens.weight"),
    "half a pair": (resize("half"), r"has \S+lora_B.weight and no \S+lora_A.weight: its file is incomplete"),
    "ranks that differ": (resize("ranks"), r"A is \[2, \d+\] and B \[\d+, 3\]: the file is damaged"),
    "NaN": (resize("nan"), "the adapter has NaN or infinite entries"),
    "into the adapter": (merge("lora", "lora"), "is the folder of an adapter: name another one"),
    "a merge of NaN": (merge("nan"), "NaN or infinite entries: the adapter is broken"),
}


def state(folder: Path) -> dict[str, bytes]:
    """What all files hold."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_odd_input_is_named_and_nothing_is_written(case: str, files: Path) -> None:
    act, message = CASES[case]
    if "GGUF" in case:
        pytest.importorskip("gguf")
    before, folders = state(files), {*files.iterdir()}
    with pytest.raises(ValueError, match=message):
        act(files)
    assert state(files) == before and {*files.iterdir()} == folders


def test_input_that_is_odd_and_means_something(files: Path, tmp_path: Path) -> None:
    """Two dtypes in one adapter, and in one model; shards of an adapter; another run into the same folder."""
    tensors = load_file(files / "lora" / WEIGHTS)
    mixed = {name: t.half() if i % 2 else t for i, (name, t) in enumerate(tensors.items())}
    shutil.copytree(files / "lora", tmp_path / "mixed")
    save_file(mixed, tmp_path / "mixed" / WEIGHTS)
    for target in ("mlx", "peft", "mlx", "peft"):
        convert_adapter(tmp_path / "mixed", target, tmp_path / target)
    assert {t.dtype for t in load_file(tmp_path / "mlx" / "adapters.safetensors").values()} == {
        torch.float16,
        torch.float32,
    }
    resize_adapter(tmp_path / "mixed", tmp_path / "small", rank=1)
    (tmp_path / "shards").mkdir()
    shutil.copy(files / "lora" / CONFIG, tmp_path / "shards")
    names = [*tensors]
    places = {name: f"adapter_model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in {*places.values()}:
        save_file({n: t for n, t in tensors.items() if places[n] == file}, tmp_path / "shards" / file)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (tmp_path / "shards" / "adapter_model.safetensors.index.json").write_text(index)
    assert convert_adapter(tmp_path / "shards", "mlx", tmp_path / "of-shards").tensors == len(tensors)
    shutil.copytree(files / "tuned", tmp_path / "two")
    weights = load_file(files / "tuned" / "model.safetensors")
    halves = {name: t.half() if i % 2 else t.bfloat16() for i, (name, t) in enumerate(weights.items())}
    save_file(halves, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    found = extract_adapter(files / "base", tmp_path / "two", tmp_path / "extracted", rank=1)
    assert "model.layers.1.self_attn.q_proj" in found.ranks
