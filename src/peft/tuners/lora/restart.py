"""A start after ``get_peft_model``: ``peft.initialize(model, "pissa")``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from peft.core.files.entries import configs_of
from peft.core.layer.classes import is_own
from peft.core.model.operations import adapters_disabled
from peft.core.model.walk import layers_of
from peft.errors import ConfigError, nearest
from peft.tuners.lora.anew import remake
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora.initialize import decomposed_weight, rewrites
from peft.tuners.lora.layer import Lora, LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga


# start -> the field of the config with its options, and their class
OPTIONS: dict[str, tuple[str, type]] = {
    "corda": ("corda_config", CordaConfig),
    "eva": ("eva_config", EvaConfig),
    "loftq": ("loftq_config", LoftQConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}


def initialize(
    model: nn.Module,
    start: bool | str,
    adapter_name: str = "default",
    *,
    run_model: Callable[[], None] | None = None,
    train_step: Callable[[], None] | None = None,
    dataloader: Iterable | None = None,
    **options: Any,
) -> None:
    """Let a LoRA that the model has start anew: as ``init_lora_weights=start`` would have had it.

    A and B are new tensors, so call this before an optimizer is made for them. An earlier start of this adapter is
    undone first; its config says the new one afterwards. Data are run with all adapters switched off.

    Args:
        model: what :func:`get_peft_model` returned.
        start: a value of ``init_lora_weights``: True, "pissa", "olora", "corda", "lora_ga", "eva", "loftq" ...
        adapter_name: which adapter.
        run_model: for "corda": runs the calibration data. train_step: for "lora_ga": runs forward and backward passes.
        dataloader: for "eva".
        options: fields of the start's options, such as ``corda_method="kpm"``; for "eva" also those of
            :func:`initialize_lora_eva_weights`.

    Raises:
        ValueError: if the model has no such LoRA, it is merged, or a layer or what is given does not fit the start;
            the model is then unchanged.

    Example:
        >>> peft_model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        >>> peft.initialize(peft_model, "pissa_niter_4")
        >>> peft.initialize(peft_model, "eva", dataloader=batches, rho=1.5)
    """
    config = configs_of(model).get(adapter_name)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"the model has no LoRA called {adapter_name!r}: call get_peft_model with a LoraConfig first."
        )
    new, rest = _config_for(config, start, options)
    layers = {p: layer for p, layer in layers_of(model) if is_own(layer, LoraLayer) and adapter_name in layer}
    for path, layer in layers.items():
        _check(path, layer, new)
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    vectors = rest.pop("eva_state_dict", None)
    with adapters_disabled(plain):  # a start that there is lets go of the weights for so long
        if start == "corda":
            preprocess_corda(plain, new, run_model)
        elif start == "lora_ga":
            if train_step is None:
                raise ValueError("LoRA-GA needs train_step, which runs forward and backward passes.")
            preprocess_loraga(plain, new, train_step)
        elif start == "eva" and vectors is None:
            vectors = get_eva_state_dict(model, dataloader, new, adapter_name=adapter_name, **rest)
    config.__dict__.update(new.__dict__)
    with torch.no_grad():
        for layer in tqdm(layers.values(), desc=f"Starting adapter {adapter_name}", disable=len(layers) < 8):
            remake(layer, layer.adapters[adapter_name], config)
    if start == "eva":
        initialize_lora_eva_weights(model, eva_state_dict=vectors, adapter_name=adapter_name)


def _config_for(config: LoraConfig, start: bool | str, options: dict[str, Any]) -> tuple[LoraConfig, dict[str, Any]]:
    """The config with another start, and the options that are no fields of it."""
    field, cls = OPTIONS.get(str(start), ("", None))
    known = {f.name for f in fields(cls)} if cls is not None else set()  # type: ignore[arg-type]
    own = {name: value for name, value in options.items() if name in known}
    rest = {name: value for name, value in options.items() if name not in known}
    if rest and start != "eva":
        name = next(iter(rest))
        there = f"{nearest(name, known)} There are {', '.join(sorted(known))}." if known else " It has none."
        raise ConfigError(f"init_lora_weights={start!r} has no option {name!r}.{there}")
    changed: dict[str, Any] = {"init_lora_weights": start}
    changed |= {of_other: None for of_other, _ in OPTIONS.values() if of_other != field and getattr(config, of_other)}
    if cls is not None and (own or not getattr(config, field)):
        changed[field] = cls(**own)
    return type(config)(**{**config.to_dict(), **changed}), rest


def _check(path: str, layer: LoraLayer, config: LoraConfig) -> None:
    """Raise ValueError where the start has no meaning at a layer as it is now."""
    if layer.merged:
        raise ValueError(f"{path} has adapters merged into its weight; call unmerge_adapter() first.")
    if reason := Lora.refusal(layer.kind, layer.get_base_layer(), config):
        raise ValueError(f"{path}: {reason}")
    if rewrites(config.init_lora_weights) and not layer.kind.lookup:
        decomposed_weight(layer, config.init_lora_weights)
