"""MLX-LM: ``adapters.safetensors`` with ``lora_a [in, r]`` and ``lora_b [r, out]``, and one scale for all layers.

A head that shares the embedding's weight takes the embedding's LoRA as well there (``as_linear``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peft.convert.formats.kohya import saver
from peft.convert.held import Pair, Pairs, alpha_of_scale, check_pair, held_of, pairs_of
from peft.convert.source import Bundle, Files, Format, Job, Source, one
from peft.core.files.io import PREFIX
from peft.errors import ConfigError
from peft.kernels.decompositions import resized


# Beginnings of names in transformers -> in MLX-LM, by model type, the first that fits; others are called alike.
_BEGINNINGS = {
    "gpt2": {"transformer.": "model."},
    "gpt_neox": {
        "gpt_neox.layers.": "model.h.",
        "gpt_neox.": "model.",
        "embed_out": "model.embed_out",
        "lm_head": "model.embed_out",
    },
}
_ROWS = "DoRA's norms of an embedding are of its rows in MLX-LM, and of its columns here"


def _renamed(module: str, job: Job, back: bool = False) -> str:
    if job.base is None:
        return module
    kind = job.base.config.get("model_type", "")
    for ours, theirs in _BEGINNINGS.get(kind, {}).items():
        old, new = (theirs, ours) if back else (ours, theirs)
        name = new + module.removeprefix(old)
        if module.startswith(old) and (not back or name in job.base.names):  # heads have had two names
            return name
    return module


def _head_tied_to(module: str, job: Job) -> str | None:
    """The head that has the weight of an embedding, as far as the base model is known."""
    if job.base is None:
        job.notes.append(f"{module}: if the head shares its weight, MLX-LM adapts both: give the base model, base=...")
        return None
    first, last = job.base.tied or ("", "")
    return last if module == first else None


def _matches(source: Source) -> bool:
    tails = {name.rpartition(".")[2] for name in source.tensors}
    return {"lora_a", "lora_b"} <= tails or "fine_tune_type" in source.config


def _read(source: Source, job: Job) -> Bundle:
    if source.config.get("fine_tune_type") == "full":
        raise ConfigError(
            f"{source.path} holds whole weights of layers (fine_tune_type full), not LoRAs: fuse them into the model "
            "(mlx_lm.fuse), and extract_adapter makes a LoRA of the two models."
        )
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
    pairs: dict[str, Pair] = {}
    heads: dict[str, torch.Tensor] = {}
    for name, found in parts.items():
        module = _renamed(name, job, back=True)
        check_pair(module, found, ("lora_a", "lora_b"))
        down, up = found["lora_a"].T.contiguous(), found["lora_b"].T.contiguous()
        rank = len(down)
        alpha = alpha_of_scale(given["scale"], rank) if "scale" in given else given["alpha"]
        table = module.rpartition(".")[2] in ("embed_tokens", "wte", "tok_embeddings", "embed_in")
        if table and "m" in found:
            job.lost[f"{name}.m"] = _ROWS
        if table and (head := _head_tied_to(module, job)) is not None:  # the transposed pair, which our files repeat
            heads |= {f"{PREFIX}{head}.lora_A.weight": up.T, f"{PREFIX}{head}.lora_B.weight": down.T}
        pairs[module] = Pair(down, up, alpha, None if table else found.get("m"), table=table)
    return {"": held_of(Pairs(pairs, heads, extra={"ensure_weight_tying": bool(heads)}))}


def _write(bundle: Bundle, job: Job) -> Files:
    held = one(bundle, "MLX-LM")
    found = pairs_of(held)
    rank = max(pair.rank for pair in found.pairs.values())
    scales = {module: found.scale(module) for module in found.pairs}
    common = max(dict.fromkeys(scales.values()), key=list(scales.values()).count)
    dora = any(pair.magnitude is not None for pair in found.pairs.values())
    tensors = {}
    first, last = (job.base and job.base.tied) or ("", "")
    for module, pair in found.pairs.items():
        if module == last:
            if not held.config.ensure_weight_tying:
                job.lost[module] = "the head has the embedding's weight, and MLX-LM has no module for it"
            continue
        down, up, name = pair.down, pair.up, _renamed(module, job)
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
        if dora and pair.magnitude is None:
            job.lost[f"{module}.m"] = "MLX-LM makes every layer of a file DoRA or none, and this one is a plain LoRA"
        if pair.table and pair.magnitude is not None:
            job.lost[f"{module}.lora_magnitude_vector"] = _ROWS
        if pair.table and _head_tied_to(module, job) is not None and not held.config.ensure_weight_tying:
            job.lost[module] = (
                "MLX-LM adapts the head with it, which shares its weight (ensure_weight_tying does so here)"
            )
        tensors[f"{name}.lora_a"] = resized(down, rank, 0).T
        tensors[f"{name}.lora_b"] = resized(up, rank, 1).T
        if pair.magnitude is not None and not pair.table:
            tensors[f"{name}.m"] = pair.magnitude
    job.lost.update(dict.fromkeys(found.others, "MLX-LM's files hold LoRAs alone"))
    keys = sorted({_in_layer(_renamed(module, job)) for module in found.pairs})
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
