"""Adapters of LoRA that are made anew where they are: with another start, of other ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft.config import named_apart
from peft.core.files.io import PREFIX
from peft.core.layer.placement import settle
from peft.core.layer.rewritten import for_a_start, give_back
from peft.core.model.targeting import exact_targets
from peft.core.model.walk import holders_of, replace_module
from peft.kernels.grouped import forget
from peft.tuners.lora.config import EvaConfig, LoraConfig, divisor


@torch.no_grad()
def start_from(
    model: nn.Module, config: LoraConfig, name: str, layers: dict[str, Any], vectors: dict[str, torch.Tensor]
) -> None:
    """Give each layer its rank and its A; take the adapter from those that get none."""
    paths = {path if path in vectors else path.removeprefix(PREFIX): path for path in layers}
    if strange := [path for path in vectors if path not in paths]:
        raise ValueError(f"eva_state_dict has vectors for {strange[0]!r}, which is no layer with adapter {name!r}.")
    options = config.eva_config or EvaConfig()
    ranks = {layers[path].key: len(vectors[short]) if short in vectors else 0 for short, path in paths.items()}
    held = {layers[path].key: layers[path] for path in layers}
    old = {key: (layer.r[name], layer.lora_alpha[name]) for key, layer in held.items()}
    config.rank_pattern = named_apart({k: r for k, r in ranks.items() if r}, config.r)
    if options.adjust_scaling_factors:
        scaled = {k: old[k][1] * divisor(ranks[k] / old[k][0], config.use_rslora) for k in ranks if ranks[k]}
        config.alpha_pattern = named_apart(scaled, config.lora_alpha)
    holders = holders_of(model)
    for short, path in paths.items():
        layer: Any = layers[path]
        if short not in vectors:
            layer.delete_adapter(name)
            if not layer.adapter_names:
                replace_module(model, path, layer.base_layer, holders)
            continue
        adapter = layer.adapters[name]
        remake(layer, adapter, config)
        a, b = adapter.held_pair()
        a.copy_(vectors[short].view_as(a))
        b.zero_()
        layer.context.common.unprepared.pop(name, None)
    if not all(ranks.values()):
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        targets: Any = exact_targets(whole, {key for key, rank in ranks.items() if rank})
        config.target_modules = targets


def remake(layer: Any, adapter: Any, config: LoraConfig) -> None:
    """Make an adapter anew, of the rank that the config has for it, where it is and as it trains."""
    before = next(adapter.parameters())
    give_back(layer, adapter.name)  # what an earlier start took out of the weight
    if (cls := layer._class_of(adapter.name, config)) is not type(adapter):  # MiCA's start is a class of its own
        forget(layer)
        adapter = layer.adapters[adapter.name] = cls(layer, adapter.name)
        layer.__dict__["_seen"] = None
    with for_a_start(layer):
        adapter.create(config, layer.key)
    settle(layer, adapter)
    for p in (*adapter.parameters(), *layer.adapter_constants(adapter.name)):
        p.data = p.data.to(before.dtype)
    layer.set_requires_grad(adapter.name, before.requires_grad)
