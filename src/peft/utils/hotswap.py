"""Replacing the tensors of an adapter by those of another, in place.

No parameter object is replaced: what ``torch.compile`` has compiled and what an optimizer holds stays valid. What can
differ between LoRA adapters, rank and scale, is made uniform by :func:`prepare_model_for_compiled_hotswap`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from peft.config import PeftConfig, resolve_pattern
from peft.core.checkpoint import Entry, _base_weights, anatomy, entries, load_peft_weights
from peft.core.combine import resized
from peft.core.kinds import Stack
from peft.core.operations import require_adapters
from peft.core.walk import join, layers_of, walk
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import join_pair, pair_blocks, split_pair
from peft.utils.error import CheckpointError, ConfigError
from peft.utils.peft_types import PeftType


# What a swap cannot change in LoRA: it is part of the forward, or decides what the tensors mean.
_LORA_FIELDS = (
    "use_rslora",
    "lora_dropout",
    "alpha_pattern",
    "use_dora",
    "trainable_token_indices",
    "ensure_weight_tying",
)
# What may differ in any method: where an adapter comes from, and targets, which are compared tensor by tensor.
_FREE_FIELDS = (
    "task_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError if an adapter with one config cannot take the place of one with the other.

    LoRA adapters may differ in rank, alpha and targets. Adapters of other methods have to agree in all that decides
    what their tensors mean.
    """
    if config0.peft_type != config1.peft_type:
        kinds = [getattr(config.peft_type, "value", config.peft_type) for config in (config0, config1)]
        raise ConfigError(
            f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}. Only an adapter of the same method can be "
            "swapped in; load this one with load_adapter."
        )
    if config0.peft_type == PeftType.LORA:
        fields = _LORA_FIELDS
    else:
        names = [field.name for field in dataclasses.fields(config0)]
        fields = tuple(name for name in names if name not in _FREE_FIELDS and not name.startswith("init_"))
    for name in fields:
        old, new = getattr(config0, name, None), getattr(config1, name, None)
        if old != new:
            raise ConfigError(
                f"Configs are incompatible: for {name}, {old} != {new}. Load the new adapter beside the old one with "
                "load_adapter and activate it with set_adapter."
            )


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | os.PathLike, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace an adapter of the model by one from a folder or from the hub, in place.

    Args:
        model: a :class:`PeftModel` or any module with adapters, compiled or not.
        adapter_name: the adapter to replace; it keeps its name.
        torch_device: where to load the file; the CPU by default.
        kwargs: options of the download (``subfolder``, ``revision``, ``token``, ...).

    Raises:
        ValueError: as :func:`hotswap_adapter_from_state_dict`.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    tensors = load_peft_weights(model_name_or_path, device=torch_device, **kwargs)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace an adapter of the model by the tensors of another, in place.

    A LoRA adapter of smaller rank is filled up with zeros. One of larger rank makes the parameters grow, which
    compiled graphs and optimizers notice: see :func:`prepare_model_for_compiled_hotswap`. LoRA layers for which there
    are no tensors get no update. Merged adapters are unmerged.

    Args:
        state_dict: named as in files.
        config: config of the new adapter.
        parameter_prefix: unused; tensors are found by structure.

    Raises:
        ValueError: if the adapter is unknown, the configs cannot be swapped, or tensors are unknown, missing or of
            another shape. The model is then unchanged.
    """
    model = _uncompiled(model)
    root, _, owner = anatomy(model)
    configs = getattr(model, "peft_config", None) or {}
    own = list(entries(model, adapter_name))
    if not own:
        require_adapters(root, [adapter_name])
    if (old := configs.get(adapter_name)) is not None:
        check_hotswap_configs_compatible(old, config)
    given = _Given(model, own, state_dict)
    pairs = [
        plan
        for key, layer in _lora_layers(root, adapter_name)
        if (plan := _plan_pair(given, key, layer, adapter_name, config)) is not None
    ]
    copies = given.rest()
    for _, layer in layers_of(root):
        if adapter_name in layer.merged_adapters:
            layer.unmerge()
    with torch.no_grad():
        for plan in pairs:
            plan.carry_out(adapter_name, config)
        for entry, value in copies:
            if entry.put is not None:
                entry.put(value)
            else:
                entry.tensor.copy_(value)
    if old is not None:
        _replace_config([model, owner, root], adapter_name, _with_targets_of(old, config))


class _Given:
    """The tensors of a file beside those of the adapter, by place; what has been used is gone."""

    def __init__(self, model: nn.Module, own: list[Entry], state_dict: dict[str, torch.Tensor]) -> None:
        root, prefix, _ = anatomy(model)
        known = {_plain(name): entry for entry in own for name in (*entry.aliases, entry.saved)}
        base = {_plain(name): entry for name, entry in _base_weights(root, prefix).items()}
        self.own = own
        self.found: dict[int, tuple[Entry, torch.Tensor]] = {}
        unexpected = []
        for name, value in state_dict.items():
            short = _plain(name)
            names = (short, prefix + short, short.removeprefix("base_model.model."))
            entry = next((known[n] for n in names if n in known), None) or base.get(short)
            if entry is None:
                unexpected.append(name)
            else:
                self.found[id(entry.tensor)] = entry, value
        if unexpected:
            raise CheckpointError(
                f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected[:8])}"
                + (f" and {len(unexpected) - 8} more" if len(unexpected) > 8 else "")
                + ". The first adapter has to have all targets that a later one has; load the one with the most "
                "target modules first, or use load_adapter."
            )

    def take(self, tensor: torch.Tensor) -> torch.Tensor | None:
        _, value = self.found.pop(id(tensor), (None, None))
        return value

    def rest(self) -> list[tuple[Entry, torch.Tensor]]:
        """What is to be copied as it is.

        Raises:
            ValueError: for a tensor that is missing or has another shape.
        """
        for entry, value in self.found.values():
            if entry.tensor.shape != value.shape:
                raise CheckpointError(
                    f"size mismatch for {entry.saved}: the new adapter has {list(value.shape)}, the model "
                    f"{list(entry.tensor.shape)}; such an adapter cannot be swapped in. Use load_adapter."
                )
        return [(entry, value) for entry, value in self.found.values() if entry.memory or entry.put is not None]


class _Pair(NamedTuple):
    """A and B that a LoRA layer is to get; None for no update."""

    layer: LoraLayer
    key: str
    down: torch.Tensor | None
    up: torch.Tensor | None

    def carry_out(self, name: str, config: Any) -> None:
        layer, (a, b) = self.layer, self.layer.pair(name)
        if self.down is None:
            b.zero_()
        else:
            rank = self.rank(a, b)
            down, up = _padded(layer, self.down, self.up, rank)
            _set(layer, name, down.to(a), up.to(b))
        layer.r[name] = resolve_pattern(config.rank_pattern, self.key, config.r)
        layer.lora_alpha[name] = resolve_pattern(config.alpha_pattern, self.key, config.lora_alpha)
        layer.use_rslora[name] = config.use_rslora
        _set_scaling(layer, name, layer.initial_scaling(name))

    def rank(self, a: torch.Tensor, b: torch.Tensor) -> int:
        """The larger one of the rank in the model and the new one, by block."""
        return max(split_pair(self.layer, a, b)[0].shape[1], split_pair(self.layer, self.down, self.up)[0].shape[1])
