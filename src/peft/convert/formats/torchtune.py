"""torchtune: ``layers.0.attn.q_proj.lora_a.weight``, q and k with their rows in pairs (LLaMA's order), but Qwen2's."""

from __future__ import annotations

from typing import Any

import torch

from peft.convert.formats.mlx import as_json
from peft.convert.held import Pair, Pairs, check_pair, held_of, pairs_of
from peft.convert.rotary import as_halves, as_pairs
from peft.convert.source import Base, Bundle, Files, Format, Job, Source, one
from peft.errors import ConfigError


# Parts of names in torchtune -> in transformers; what is not here is called alike.
_NAMES = {"attn": "self_attn", "output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_ENDS = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}
_BACK = {theirs: ours for ours, theirs in (*_NAMES.items(), *_ENDS.items())}
_IN_PAIRS = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}  # rows of q and k
_PARTS = {("lora_a", "weight"): "down", ("lora_b", "weight"): "up", ("magnitude",): "magnitude"}


def _matches(source: Source) -> bool:
    return any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in source.tensors)


def _read(source: Source, job: Job) -> Bundle:
    if "lora_alpha" not in source.config:
        raise ConfigError(f"{source.path} needs its adapter_config.json beside it, which says r and lora_alpha.")
    base = job.need_base("torchtune orders the rows of q and k by heads")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in source.tensors.items():
        words = name.split(".")
        size = next((n for n in (1, 2) if tuple(words[-n:]) in _PARTS), None)
        if size is None:
            job.lost[name] = "it is no part of a LoRA"
            continue
        parts.setdefault(_theirs(words[:-size]), {})[_PARTS[tuple(words[-size:])]] = tensor
    pairs = {}
    for module, found in parts.items():
        check_pair(module, found)
        if (heads := _heads(module, base)) is not None:
            found.update({part: as_halves(found[part], heads) for part in ("up", "magnitude") if part in found})
        pairs[module] = Pair(alpha=source.config["lora_alpha"], **found)
    extra = {"base_model_name_or_path": source.config.get("base_model_name_or_path")}
    return {"": held_of(Pairs(pairs, extra=extra))}


def _theirs(words: list[str]) -> str:
    """A module's name in transformers."""
    if len(words) == 1:
        return _ENDS.get(words[0], words[0])
    return ".".join(("model", *(_NAMES.get(word, word) for word in words)))


def _ours(module: str) -> str:
    """A module's name in torchtune."""
    if module in _BACK:
        return _BACK[module]
    return ".".join(_BACK.get(word, word) for word in module.removeprefix("model.").split("."))


def _heads(module: str, base: Base) -> int | None:
    """The heads by which the rows of a module are ordered otherwise, or None."""
    kind, leaf = base.config.get("model_type"), module.rpartition(".")[2]
    if kind not in _IN_PAIRS:
        raise ConfigError(
            f"how torchtune keeps the matrices of {kind!r} is not known here; there are {', '.join(_IN_PAIRS)}."
        )
    if not _IN_PAIRS[kind]:
        return None
    if leaf == "q_proj":
        return base.number("num_attention_heads")
    return base.number("num_key_value_heads", "num_attention_heads") if leaf == "k_proj" else None


def _write(bundle: Bundle, job: Job) -> Files:
    held = one(bundle, "torchtune")
    found, base = pairs_of(held), job.need_base("torchtune orders the rows of q and k by heads")
    alphas = {found.scale(module) * pair.rank for module, pair in found.pairs.items()}
    if len(alphas) > 1 or len({pair.rank for pair in found.pairs.values()}) > 1:
        raise ConfigError(
            "torchtune has one rank and one alpha for all layers; resize_adapter(rank=...) can make them."
        )
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in found.pairs.items():
        if pair.table or pair.bias is not None or pair.down.dim() > 2:
            job.lost[module] = "torchtune has no LoRAs of embeddings or convolutions, nor biases in them"
            continue
        heads, name = _heads(module, base), _ours(module)
        rows = {"lora_b.weight": pair.up, "magnitude": pair.magnitude}
        tensors[f"{name}.lora_a.weight"] = pair.down
        for part, tensor in rows.items():
            if tensor is not None:
                tensors[f"{name}.{part}"] = tensor if heads is None else as_pairs(tensor, heads)
    job.lost.update(dict.fromkeys(found.others, "torchtune's adapter files hold LoRAs alone"))
    leaves = sorted({_ours(module).rpartition(".")[2] for module in found.pairs})
    config: dict[str, Any] = {"r": next(iter(found.pairs.values())).rank, "lora_alpha": next(iter(alphas)),
                              "target_modules": leaves, "peft_type": "LORA"}  # fmt: skip
    return {"adapter_model.pt": lambda path: torch.save(tensors, path), "adapter_config.json": as_json(config)}


TORCHTUNE = Format("torchtune", _matches, _read, _write)
