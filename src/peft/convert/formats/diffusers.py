"""diffusers, with current and old names, and ComfyUI's.

``unet.....lora_A.weight``, ``....attn1.processor.to_q_lora.down.weight``. The component stands in front; a file
without any is of a UNet. ``alpha`` tensors, or the configs in the header, say the scale; without them it is 1. Under
such names some trainers write the other algorithms of LyCORIS, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from peft.convert.formats.flux import is_original, to_diffusers, with_all_rows
from peft.convert.formats.kohya import ALGORITHMS, by_method, saver
from peft.convert.formats.unet import is_authors, unet_to_diffusers
from peft.convert.held import Held, Pair, Pairs, check_pair, held_of, magnitude_of, modules_of, pairs_of
from peft.convert.names import component_of
from peft.convert.source import Bundle, Files, Format, Job, Source
from peft.errors import ConfigError
from peft.options import value_of
from peft.tuners.lora.config import LoraConfig, rank_fields


COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "diffusion_model")
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}  # of ComfyUI
HEADER = "lora_adapter_metadata"
# Tails of names -> part of a pair: PEFT's, diffusers' before 0.22, its text encoders', ComfyUI's.
_TAILS = {
    ("lora_A", "weight"): "down",
    ("lora_B", "weight"): "up",
    ("lora_A", "default", "weight"): "down",
    ("lora_B", "default", "weight"): "up",
    ("lora", "down", "weight"): "down",
    ("lora", "up", "weight"): "up",
    ("lora_down", "weight"): "down",
    ("lora_up", "weight"): "up",
    ("lora_linear_layer", "down", "weight"): "down",
    ("lora_linear_layer", "up", "weight"): "up",
    ("lora_magnitude_vector",): "magnitude",
    ("dora_scale",): "magnitude",
    ("lora_B", "bias"): "bias",
    ("alpha",): "alpha",
}
_PROCESSORS = {
    "to_q_lora": "to_q",
    "to_k_lora": "to_k",
    "to_v_lora": "to_v",
    "to_out_lora": "to_out.0",
    "add_k_proj_lora": "add_k_proj",
    "add_v_proj_lora": "add_v_proj",
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1",
    "proj_lora": "linear2",
}  # fmt: skip  (the last six are x-flux's, of Flux)


def split(name: str) -> tuple[str, str, str] | None:
    """(component, module, part of a pair) that a name means, or None."""
    component, words = _component(name)
    if "processor" in words and words[-3] in _PROCESSORS and words[-2] in ("down", "up"):
        at = words.index("processor")
        module = ".".join((*words[:at], _PROCESSORS[words[-3]]))
        return component or component_of([module]) or "unet", module, words[-2]
    size = next((n for n in (3, 2, 1) if tuple(words[-n:]) in _TAILS), None)
    if size is None or len(words) <= size:
        return None
    return component, ".".join(words[:-size]), _TAILS[tuple(words[-size:])]


def _component(name: str) -> tuple[str, list[str]]:
    """The component, and what follows it in a name."""
    words = name.split(".")
    if words[0] == "text_encoders":
        del words[0]
    if words[0] in _ENCODERS and words[1:2] == ["transformer"]:
        return _ENCODERS[words[0]], words[2:]
    return (words[0], words[1:]) if words[0] in COMPONENTS else ("", words)


def _lycoris(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """(component, module, part) of what is of modules that have tensors of another algorithm than LoRA."""
    found, modules = {}, set()
    for name in names:
        component, words = _component(name)
        size = 2 if words[-1] == "weight" else 1
        module, part = ".".join(words[:-size]), ".".join(words[-size:])
        found[name] = component, module, part
        if part in ALGORITHMS:
            modules.add((component, module))
    return {name: place for name, place in found.items() if place[:2] in modules}


def _matches(source: Source) -> bool:
    if "peft_type" in source.config:
        return False
    if _lycoris(name for name in source.tensors if not name.startswith("base_model.")):
        return True
    found = [split(name) for name in source.tensors]
    return any(
        one is not None and (one[0] or name.split(".")[0] != "base_model") for one, name in zip(found, source.tensors)
    )


def _read(source: Source, job: Job) -> Bundle:
    parts: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    others: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    elsewhere = _lycoris(source.tensors)
    for name, tensor in source.tensors.items():
        if name in elsewhere:
            component, module, part = elsewhere[name]
            others.setdefault(component, {}).setdefault(module, {})[part] = tensor
            continue
        one = split(name)
        if one is None:
            job.lost[name] = "it is no part of a LoRA"
            continue
        component, module, part = one
        parts.setdefault(component, {}).setdefault(module, {})[part] = tensor
    said = json.loads(source.metadata.get(HEADER, "{}"))
    bundle: Bundle = {}
    for component, modules in parts.items():
        config = {key.removeprefix(f"{component}."): v for key, v in said.items() if key.startswith(f"{component}.")}
        bundle[component] = held_of(_pairs(modules, config, job))
    for component, modules in others.items():
        for key, held in by_method(component, modules, job).items():
            bundle["-".join(filter(None, (component, held.method.lower()))) if key in bundle else key] = held
    return bundle


def _pairs(modules: dict[str, dict[str, torch.Tensor]], config: dict[str, Any], job: Job) -> Pairs:
    known = LoraConfig(**{k: v for k, v in config.items() if k in _SCALES}) if config else None
    pairs = {}
    for module, parts in modules.items():
        check_pair(module, parts)
        rank = len(parts["down"])
        alpha = float(parts.pop("alpha", torch.tensor(0.0))) or rank
        if known is not None:
            alpha = known.alpha_at(module)
        if (scale := parts.get("magnitude")) is not None:
            parts["magnitude"] = magnitude_of(scale, parts["down"])
        pairs[module] = with_all_rows(module, Pair(alpha=alpha, **parts))
    return Pairs(pairs, rslora=known is not None and known.use_rslora)


_SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def _write(bundle: Bundle, job: Job) -> Files:
    tensors: dict[str, torch.Tensor] = {}
    said: dict[str, Any] = {}
    for component, held in bundle.items():
        if is_original(modules_of(held)):
            component, held = "transformer", to_diffusers(held)
        elif is_authors(modules_of(held)):
            component, held = "unet", unet_to_diffusers(held)
        if component.partition("-")[0] not in COMPONENTS and component:
            raise ConfigError(f"diffusers has no component {component!r}.")
        found, name = pairs_of(held), component or component_of(modules_of(held)) or "transformer"
        for module, pair in found.pairs.items():
            if pair.table:
                job.lost[module] = "diffusers' LoRAs have no embeddings"
                continue
            tensors.update({f"{name}.{module}.{part}": tensor for part, tensor in pair.tensors().items()})
        job.lost.update(dict.fromkeys(found.others, "diffusers' files hold LoRAs alone"))
        said.update({f"{name}.{key}": value for key, value in _header(found, held).items()})
    text = json.dumps(said, indent=2, sort_keys=True)
    return {"pytorch_lora_weights.safetensors": saver(tensors, {"format": "pt", HEADER: text})}


def _header(found: Pairs, held: Held) -> dict[str, Any]:
    ranks, alphas = ({m: getattr(pair, what) for m, pair in found.pairs.items()} for what in ("rank", "alpha"))
    said = {**held.config.to_dict(), **rank_fields(ranks, alphas)}
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}
    return {key: value_of(value) for key, value in said.items()}


DIFFUSERS = Format("diffusers", _matches, _read, _write, ".safetensors")
