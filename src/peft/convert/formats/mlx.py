"""MLX-LM: ``adapters.safetensors`` with ``lora_a [in, r]`` and ``lora_b [r, out]``, and one scale for all layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peft.convert.formats.kohya import saver
from peft.convert.held import Pair, Pairs, held_of, pairs_of
from peft.convert.source import Bundle, Files, Format, Job, Source, one
from peft.core.combine.combined import resized
from peft.utils.error import ConfigError


def _matches(source: Source) -> bool:
    tails = {name.rpartition(".")[2] for name in source.tensors}
    return {"lora_a", "lora_b"} <= tails


def _read(source: Source, job: Job) -> Bundle:
    given = source.config.get("lora_parameters") or {}
    if "scale" not in given and "alpha" not in given:
        raise ConfigError(f"{source.path} needs its adapter_config.json beside it: lora_parameters says the scale.")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in source.tensors.items():
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b", "m") or tensor.dim() > 2:
            job.lost[name] = "it is no part of a LoRA of a matrix"
            continue
        parts.setdefault(module, {})[part] = tensor
    pairs = {}
    for module, found in parts.items():
        if not {"lora_a", "lora_b"} <= found.keys():
            raise ConfigError(f"the file has only {', '.join(found)} of a LoRA at {module}.")
        down, up = found["lora_a"].T.contiguous(), found["lora_b"].T.contiguous()
        rank = len(down)
        alpha = given["scale"] * rank if "scale" in given else given["alpha"]
        table = module.rpartition(".")[2] in ("embed_tokens", "wte", "tok_embeddings")
        pairs[module] = Pair(down, up, alpha, found.get("m"), table=table)
    return {"": held_of(Pairs(pairs))}


def _write(bundle: Bundle, job: Job) -> Files:
    found = pairs_of(one(bundle, "MLX-LM"))
    rank = max(pair.rank for pair in found.pairs.values())
    scales = {module: found.scale(module) for module in found.pairs}
    common = max(dict.fromkeys(scales.values()), key=list(scales.values()).count)
    tensors = {}
    for module, pair in found.pairs.items():
        down, up = pair.down, pair.up
        if down.dim() > 2:
            job.lost[module] = "MLX-LM has no LoRAs of convolutions"
            continue
        if pair.bias is not None:
            job.lost[f"{module}.lora_B.bias"] = "MLX-LM's LoRAs have no biases"
        if scales[module] != common:
            up = up * (scales[module] / common)
            job.notes.append(f"{module}: its scale is another than the file's, so B is multiplied by the rest")
        if pair.rank < rank:
            job.notes.append(f"{module}: filled up with zeros from rank {pair.rank} to {rank}, the one of the file")
        tensors[f"{module}.lora_a"] = resized(down, rank, 0).T
        tensors[f"{module}.lora_b"] = resized(up, rank, 1).T
        if pair.magnitude is not None:
            tensors[f"{module}.m"] = pair.magnitude
    job.lost.update(dict.fromkeys(found.others, "MLX-LM's files hold LoRAs alone"))
    dora = any(pair.magnitude is not None for pair in found.pairs.values())
    keys = sorted({_in_layer(module) for module in found.pairs})
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": common, "dropout": 0.0, "keys": keys},
    }
    return {"adapters.safetensors": saver(tensors, {"format": "mlx"}), "adapter_config.json": as_json(config)}


def _in_layer(module: str) -> str:
    """A module's name within its layer: what follows the layer's number."""
    words = module.split(".")
    return ".".join(words[next((i + 1 for i, word in enumerate(words) if word.isdigit()), 0) :])


def as_json(value: dict[str, Any]) -> Callable[[str], None]:
    """What writes a value as JSON to a path."""

    def write(path: str) -> None:
        Path(path).write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")

    return write


MLX = Format("mlx", _matches, _read, _write)
