"""Replacing the tensors of an adapter by those of another, in place.

No parameter object is replaced: what ``torch.compile`` has compiled and what an optimizer holds stays valid. What can
differ between LoRA adapters, rank and scale, is made uniform by :func:`prepare_model_for_compiled_hotswap`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from peft.config import ORIGIN, PeftConfig, resolve_pattern
from peft.core.files.entries import Entry, anatomy, configs_of
from peft.core.files.io import load_peft_weights
from peft.core.files.state_dict import match, unmerge_for
from peft.core.layer.classes import is_own
from peft.core.model.walk import bare, join, layers_of, names_in, plain, surveyed, walk
from peft.errors import CheckpointError, ConfigError, some
from peft.peft_types import PeftType
from peft.tuners.lora.config import LoraConfig, divisor, whole
from peft.tuners.lora.initialize import rewrites
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.pairs import held_rank, of_rank, pair_blocks
from peft.usage import recording


# What a swap cannot change in LoRA: it is part of the forward, or decides what the tensors mean.
_LORA_FIELDS = (
    "use_rslora",
    "lora_dropout",
    "alpha_pattern",
    *("alora_invocation_tokens", "arrow_config"),
    *("use_dora", "kasa_config", "use_bdlora", "use_qalora", "qalora_group_size", "monteclora_config"),
    "trainable_token_indices",
    "ensure_weight_tying",
)
# Where an adapter sits. This is compared tensor by tensor.
_TARGETS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "modules_to_save",
    "bias",
)
# What a start that rewrites the base weight makes of it.
_START = ("init_lora_weights", "r", "lora_alpha", "rank_pattern", "loftq_config")
# What else may differ in any method: where an adapter comes from.
_OUT, _IN = ("out_features", "out_channels"), ("in_features", "in_channels")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError if an adapter with one config cannot take the place of one with the other.

    LoRA adapters may differ in rank, alpha and targets. Adapters of other methods have to agree in all that decides
    what their tensors mean.
    """
    if config0.peft_type != config1.peft_type:
        raise ConfigError(
            f"Incompatible PEFT types found: {config0.method_name} and {config1.method_name}. Only an adapter of the "
            "same method can be swapped in; load this one with load_adapter."
        )
    fields: tuple[str, ...]
    if config0.peft_type == PeftType.LORA:
        fields = _LORA_FIELDS
    else:
        names = [field.name for field in dataclasses.fields(config0)]
        fields = tuple(name for name in names if name not in (*_TARGETS, *ORIGIN) and not name.startswith("init_"))
    for name in fields:
        old, new = getattr(config0, name, None), getattr(config1, name, None)
        if old != new:
            raise ConfigError(
                f"Configs are incompatible: for {name}, {old} != {new}. Load the new adapter beside the old one with "
                "load_adapter and activate it with set_adapter."
            )
    starts = [config.init_lora_weights for config in (config0, config1) if isinstance(config, LoraConfig)]
    if any(map(rewrites, starts)) and [vars(config0)[n] for n in _START] != [vars(config1)[n] for n in _START]:
        raise ConfigError(
            f"Configs are incompatible: the adapters come from init_lora_weights={starts[0]!r} and {starts[1]!r}, and "
            "each stands on what its start has made of the base weights, which no swap changes. Save such an adapter "
            "with path_initial_model_for_weight_conversion, or load the new one beside the old one with load_adapter."
        )


@surveyed()
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace an adapter of the model by one from a folder or from the hub, in place.

    Args:
        model: a :class:`PeftModel` or any module with adapters, compiled or not.
        adapter_name: the adapter to replace; it keeps its name.
        torch_device: where to load the file; the CPU by default.
        kwargs: options of the download (``subfolder``, ``revision``, ``token``, ...).

    Raises:
        ValueError: as :func:`hotswap_adapter_from_state_dict`.

    Examples:
        >>> model.save_pretrained("adapter")
        >>> hotswap_adapter(model, "adapter", adapter_name="default")
    """
    config = PeftConfig.from_pretrained(os.fspath(model_name_or_path), **kwargs)
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
    are no tensors are left without update. Merged adapters are unmerged.

    Args:
        state_dict: named as in files.
        config: config of the new adapter.
        parameter_prefix: unused; tensors are found by structure.

    Raises:
        ValueError: if the adapter is unknown, the configs cannot be swapped, or tensors are unknown, missing or of
            another shape. The model is then unchanged.
    """
    model = bare(model)
    root, prefix = anatomy(model)
    old = configs_of(model).get(adapter_name)
    if old is not None:
        check_hotswap_configs_compatible(old, config)
    given = _Given(model, adapter_name, state_dict)
    layers = [found for found in _lora_layers(root) if adapter_name in found.layer]
    pairs = [_pair(given, found, prefix, adapter_name, config) for found in layers]
    # All of this refuses before anything is written.
    copies = given.rest()
    unmerge_for(root, adapter_name)
    with torch.no_grad(), recording(config, lambda: names_in(root), fields=False):
        for found, pair in zip(layers, pairs):
            _swap_pair(found, pair, adapter_name, config)
        for entry, value in copies:
            if entry.put is not None:
                entry.put(value)
            else:
                entry.tensor.copy_(value)
        for _, layer in layers_of(root):
            if adapter_name in layer:
                layer.adapters[adapter_name].loaded()
                layer.adapters[adapter_name].upgrade(config.peft_version or "")
    if old is not None:
        _set_config(model, adapter_name, _with_targets_of(old, config))


class _Given:
    """The tensors of a file, each with its place in the adapter; what is taken out is dealt with."""

    def __init__(self, model: nn.Module, adapter: str, state_dict: dict[str, torch.Tensor]) -> None:
        given = match(model, adapter, state_dict)
        if any(entry.tensor.is_meta for entry in given.own):
            raise CheckpointError(f"adapter {adapter!r} has no values yet (low_cpu_mem_usage); load its file first.")
        if unexpected := given.unexpected:
            raise CheckpointError(
                f"Hot swapping the adapter did not succeed, unexpected keys found: {some(unexpected)}. "
                "The adapter in the model needs all the targets of the new one: load the one with the most targets "
                "first, or load the new one beside it with load_adapter."
            )
        if given.base:
            names = [attribute for (_, attribute), _ in given.base]
            raise CheckpointError(
                f"Hot swapping the adapter did not succeed: the file has {some(names)} of base layers, which no swap "
                "can replace. Load it beside the other one with load_adapter."
            )
        views = {id(entry) for entry in given.own if not entry.memory}  # of the pair of another layer
        self.own = {entry.memory: entry for entry in given.own if entry.memory}
        self.found = {
            entry.memory or entry.saved: (entry, value)
            for entry, value in (*given.fits, *given.wrong)
            if id(entry) not in views or entry.put is not None
        }

    def take(self, places: list[str]) -> list[torch.Tensor | None]:
        """The new values at these places in memory; None where there is none."""
        for place in places:
            self.own.pop(place, None)
        return [self.found.pop(place, (None, None))[1] for place in places]

    def rest(self) -> list[tuple[Entry, torch.Tensor]]:
        """What is left, to be copied as it is.

        Raises:
            ValueError: for a tensor that is missing or has another shape.
        """
        there = {id(entry.tensor) for entry, _ in self.found.values()}  # what layers share has a place in each
        missing = [e.saved for e in self.own.values() if id(e.tensor) not in there and e.put is None]
        if missing:
            raise CheckpointError(f"Hot swapping the adapter did not succeed, missing keys: {some(missing)}.")
        for entry, value in self.found.values():
            if entry.tensor.shape != value.shape:
                raise _mismatch(entry.saved, value.shape, entry.tensor.shape)
        return list(self.found.values())


def _mismatch(place: str, new: Sequence[int], wanted: Sequence[int]) -> CheckpointError:
    return CheckpointError(
        f"size mismatch for {place}: the new adapter has {list(new)}, but the model and the new config mean "
        f"{list(wanted)}. It belongs to another base model or config."
    )


def _set_config(model: nn.Module, name: str, config: Any) -> None:
    for holder in (model, model._modules.get("base_model"), anatomy(model)[0]):
        configs = getattr(holder, "peft_config", None) or {}
        if name in configs:
            configs[name] = config


def _with_targets_of(old: Any, new: Any) -> Any:
    """The new config for the old places: layers that the new adapter lacks are still there, without update."""
    config = copy.copy(new)
    for field in ("inference_mode", "target_parameters", *_TARGETS):
        if hasattr(config, field):
            setattr(config, field, getattr(old, field))
    return config


# --- pairs of LoRA --------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A LoRA layer, with its path in the model and the name by which patterns of configs mean it."""

    path: str
    key: str
    layer: LoraLayer


def _lora_layers(root: nn.Module) -> Iterator[_Found]:
    for site in walk(root):
        for path, wrapper in site.wrappers:
            if is_own(wrapper, LoraLayer):
                yield _Found(path, plain(wrapper.kind.target_name(site.key)), wrapper)


def _pair(
    given: _Given, found: _Found, prefix: str, name: str, config: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Take a layer's new A and B out of what is given; None if there is nothing for this layer.

    Raises:
        ValueError: if half of it is missing, or it does not fit the layer or the config.
    """
    _, key, layer = found
    if name in layer.tied_to:
        return None
    tail = f"lora_embedding_{{}}.{name}" if layer.kind.lookup else f"lora_{{}}.{name}.weight"
    places = [prefix + join(found.path, tail.format(factor)) for factor in "AB"]
    down, up = given.take(places)
    if down is None and up is None:
        if layer.lora_bias[name]:
            given.take([prefix + join(found.path, f"lora_B.{name}.bias")])
        return None
    if down is None or up is None:
        raise CheckpointError(f"Hot swapping the adapter did not succeed: {key!r} has only one of its two factors.")
    lora: Any = layer.adapters[name]
    (a, b), (experts, groups) = lora.held_pair(), pair_blocks(lora)
    rank = config.rank_at(key)
    shapes: tuple = (rank * experts, *a.shape[1:]), (b.shape[0], rank * experts // groups, *b.shape[2:])
    if lora.fixed_rank:
        shapes = a.shape, b.shape
        if rank != lora.r:
            raise ConfigError(
                f"Hot swapping the adapter did not succeed: the factors of {key!r}, of rank {lora.r}, cannot be "
                f"filled up with zeros to, or from, rank {rank}. Load the new adapter beside the old one with "
                "load_adapter."
            )
    for place, new, shape in zip(places, (down, up), shapes):
        if new.shape != shape:
            raise _mismatch(place, new.shape, shape)
    return down, up


def _swap_pair(found: _Found, pair: tuple[torch.Tensor, torch.Tensor] | None, name: str, config: Any) -> None:
    _, key, layer = found
    rank = config.rank_at(key)
    if name not in layer.tied_to:
        lora: Any = layer.adapters[name]
        if not lora.fixed_rank:
            _make_room(lora, rank)
        a, b = lora.held_pair()
        if pair is not None:
            down, up = pair if lora.fixed_rank else of_rank(lora, held_rank(lora), *pair)
            a.copy_(down)
            b.copy_(up)
        else:
            b.zero_()
            if layer.lora_bias[name]:
                layer.lora_B[name].bias.zero_()
    alpha = config.alpha_at(key)
    layer.put(name, r=rank, lora_alpha=alpha, use_rslora=config.use_rslora)
    if isinstance(layer.scaling[name], torch.Tensor):  # prepared: a compiled graph reads this tensor
        layer.scaling[name].fill_(layer._initial(name))
    else:
        layer.scaling[name] = layer._initial(name)


def _make_room(lora: Any, rank: int) -> None:
    """The parameters stay the same objects; their tensors grow by zeros."""
    if rank <= held_rank(lora):
        return
    pair = lora.held_pair()
    for parameter, tensor in zip(pair, of_rank(lora, rank, *(p.detach() for p in pair))):
        parameter.data, parameter.grad = tensor.contiguous(), None  # optimizers know the parameter
    if lora.kind.lookup:
        return
    width = pair[0].shape[0]
    for module, names in ((lora.lora_A, _OUT), (lora.lora_B, _IN)):
        for attribute in names:
            if hasattr(module, attribute):
                setattr(module, attribute, width)


# --- preparation ----------------------------------------------------------------------------------------------


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make LoRA adapters of any rank and scale look alike to ``torch.compile``, so that swapping recompiles nothing.

    Scales become tensors, and pairs are filled up with zeros to one rank. Call it after the first adapter is loaded
    and before the model is compiled. Adapters of other methods need no preparation.

    Args:
        target_rank: the largest rank of all adapters to come; None keeps the ranks.
        config: config, or dict of configs, to be brought up to ``target_rank`` as well, with alphas that keep the
            scales. The configs of the model itself stay those of its adapters.
        check_compiled: what to do if the model is compiled already.

    Raises:
        ValueError: if the model has no adapters or is compiled, or an adapter has a larger rank than ``target_rank``.
            The model is then unchanged.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r}.")
    if check_compiled != "ignore" and _is_compiled(model):
        message = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise ValueError(f"{message}, or recompile it and pass check_compiled='ignore'.")
        warnings.warn(f"{message}: the next forward recompiles it.")
    model = bare(model)
    root, _ = anatomy(model)
    if not any(True for _ in layers_of(root)):
        raise ValueError(
            "No adapter layers found on the model; call prepare_model_for_compiled_hotswap after loading the first "
            "adapter and before swapping in the second one."
        )
    pairs = [(key, layer, name) for _, key, layer in _lora_layers(root) for name in layer.adapter_names]
    if target_rank is not None:
        for key, layer, name in pairs:
            _check_room(key, layer, name, target_rank)
    configs = list(config.values()) if isinstance(config, dict) else [] if config is None else [config]
    for name, own in configs_of(model).items():
        if any(own is given for given in configs):  # which is widened below; the adapter keeps its rank
            _set_config(model, name, copy.deepcopy(own))
    with torch.no_grad():
        for _, layer, name in pairs:
            _prepare_pair(layer, name, target_rank)
    if target_rank is not None:
        for given in configs:
            _widen_config(given, target_rank)


def _is_compiled(model: nn.Module) -> bool:
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


def _check_room(key: str, layer: LoraLayer, name: str, target_rank: int) -> None:
    if name in layer.tied_to:
        return
    lora: Any = layer.adapters[name]
    rank, groups = held_rank(lora), pair_blocks(lora)[1]
    if rank > target_rank:
        raise ValueError(
            f"the adapter {name!r} has rank {rank} in {key!r}, more than target_rank={target_rank}. Choose the "
            "largest rank of all adapters that will be swapped in."
        )
    if lora.fixed_rank and rank != target_rank:
        raise ValueError(
            f"the adapter {name!r} has factors of rank {rank} in {key!r} that zeros cannot fill up to "
            f"target_rank={target_rank}. Leave target_rank out: adapters of this rank can be swapped in."
        )
    if target_rank % groups:
        raise ValueError(f"target_rank={target_rank} does not divide over the {groups} groups of {key!r}.")


def _prepare_pair(layer: LoraLayer, name: str, target_rank: int | None) -> None:
    lora: Any = layer.adapters[name]
    a = lora.held_pair()[0]
    if target_rank is not None and lora.tied_to is None:
        _make_room(lora, target_rank)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    # A number would be a constant of the graph.
    layer.scaling[name] = torch.as_tensor(layer.scaling[name], dtype=dtype, device=a.device)


def _widen_config(config: Any, target_rank: int) -> None:
    """Make a config one of ``target_rank`` everywhere, with alphas for the same scales."""

    def alpha(value: float, rank: int) -> float:
        return whole(value * divisor(target_rank / rank, config.use_rslora))

    ranks, default = dict(config.rank_pattern), config.lora_alpha
    alphas = {k: alpha(v, resolve_pattern(ranks, k, config.r)) for k, v in config.alpha_pattern.items()}
    for key, rank in ranks.items():
        if rank != config.r and resolve_pattern(alphas, key, None) is None:
            alphas[key] = alpha(default, rank)
    config.lora_alpha, config.alpha_pattern = alpha(default, config.r), alphas
    config.r, config.rank_pattern = target_rank, dict.fromkeys(ranks, target_rank)
