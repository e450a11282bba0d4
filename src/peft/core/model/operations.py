"""The life of adapters in a model, written once: activate, scale, switch off, merge, unload, delete, cast.

Everything here works on any module that holds tuner layers, with or without a :class:`PeftModel` around it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from peft.core.layer import weight as weights
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, biases_of, tied_sites
from peft.core.model.declared import declare_biases, new_biases, set_declared
from peft.core.model.dequantize import dequantize
from peft.core.model.record import behind, drop_compositions, record_of
from peft.core.model.replicate import restore_layers, separate_layers
from peft.core.model.walk import (
    embeddings_of,
    holders_of,
    layers_of,
    replace_module,
    shares_embeddings,
    walk,
    wrappers_of,
)
from peft.errors import UnknownAdapterError, WrongTypeError


def names_of(adapter_names: str | Sequence[str]) -> list[str]:
    """One name, or several, as a list."""
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


def adapters_of(model: nn.Module) -> list[str]:
    """All adapters that any layer of the model holds, in the order in which they are met."""
    found: dict[str, None] = {}
    for _, wrapper in wrappers_of(model):
        found.update(dict.fromkeys(wrapper.adapter_names))
    return list(found)


def require_adapters(model: nn.Module, names: Iterable[str], known: Iterable[str] | None = None) -> None:
    """Raise UnknownAdapterError for a name that is no adapter of the model; it lists those there are."""
    if isinstance(names, str):
        raise WrongTypeError(f"adapter_names should be a list of adapter names, got the string {names!r}.")
    known = list(adapters_of(model) if known is None else known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownAdapterError(
            f"adapter {', '.join(map(repr, unknown))} not found. Adapters of this model: "
            f"{', '.join(map(repr, known)) or 'none'}. Add one with add_adapter or load_adapter."
        )


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[nn.Module] = BaseTunerLayer,
    known: Iterable[str] = (),
) -> None:
    """Make one or several adapters the active ones, and the only ones whose parameters train.

    Args:
        model: any module with tuner layers.
        adapter_name: one name, or a list; all of them act in each forward call.
        inference_mode: train none of them.
        layer_cls: change only tuner layers of this class (and the auxiliary wrappers).
        known: further adapters of the model, which no layer holds.

    Raises:
        ValueError: if an adapter is unknown, or some cannot be active together; the model is then unchanged.
    """
    names = names_of(adapter_name)
    wrappers = [w for _, w in wrappers_of(model) if isinstance(w, layer_cls | AuxiliaryTrainingWrapper)]
    held = dict.fromkeys(name for wrapper in wrappers for name in wrapper.adapter_names)
    record = biases_of(model)
    if wrappers:
        require_adapters(model, names, [*held, *known])
    for wrapper in wrappers:
        wrapper.check_active_rows(names)
    # Asked before anything changes, for it may refuse.
    bias = record.choose(behind(model, names)) if record else None
    if any(isinstance(w, BaseTunerLayer) and w.merged for w in wrappers):
        warnings.warn("adapters are merged into the base model; they are unmerged before others are activated.")
        unmerge(model)
    # Scripts let every parameter train, and expect this to choose again. The first layer and the last tell: to ask all
    # takes longer than the rest where there are many adapters.
    if any(set(w.training_names()).difference(w.active_adapters) for w in (*wrappers[:1], *wrappers[-1:])):
        for wrapper in wrappers:
            wrapper.set_requires_grad(wrapper.training_names(), False)
    for wrapper in wrappers:
        wrapper.set_adapter(names, inference_mode)
    if record:
        record.apply(bias, not inference_mode)
        record.paused = bias


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off; off, the model is its base."""
    names: list[str] = []
    for _, wrapper in wrappers_of(model):
        wrapper.enable_adapters(enabled)
        names = names or wrapper.active_adapters
    if record := biases_of(model):
        record.paused = record.applied or record.paused
        record.apply((record.choose(behind(model, names)) if names else record.paused) if enabled else None)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Choose whether these adapters train, active or not."""
    for _, wrapper in wrappers_of(model):
        wrapper.set_requires_grad(adapter_names, requires_grad)
    record = biases_of(model)
    if record and record.applied in names_of(adapter_names):
        for _, p in record.parameters(record.applied):
            p.requires_grad_(requires_grad and isinstance(p, nn.Parameter))


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Hold an adapter in float32 where it is in a 16-bit dtype, so that small updates are not rounded away.

    Whole modules that it trains (``modules_to_save``) stay as they are: they compute in the model's dtype.
    """
    for _, wrapper in wrappers_of(model) if autocast_adapter_dtype else ():
        _widen(wrapper, adapter_name, wrapper.adapter_parameters(adapter_name))


def _widen(wrapper: nn.Module, adapter_name: str, parameters: Iterable[torch.Tensor]) -> None:
    if not isinstance(wrapper, ModulesToSaveWrapper):
        for p in (*parameters, *wrapper.adapter_constants(adapter_name)):
            if p.dtype in (torch.float16, torch.bfloat16):
                p.data = p.data.float()


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str, layer_cls: type[nn.Module] = BaseTunerLayer
) -> list[str] | None:
    """Remove an adapter from all layers.

    Args:
        prefix: unused; adapters are found by structure.

    Returns:
        The adapters that are active afterwards, None if none are left.

    Raises:
        ValueError: if it is merged somewhere; nothing is changed then.
    """
    require_unmerged(model, adapter_name)
    remove(model, adapter_name, layer_cls)
    active, rest = active_of(model), sorted(adapters_of(model))
    if active or not rest:
        return active or None
    warnings.warn(f"adapter {adapter_name!r} was active; {rest[0]!r} is active now.")
    set_adapter(model, rest[0])
    return rest[:1]


def require_unmerged(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError where an adapter that is to be deleted is merged."""
    if merged := [path for path, layer in layers_of(model) if adapter_name in layer.merged_adapters]:
        raise ValueError(
            f"adapter {adapter_name!r} cannot be deleted while it is merged (in {merged[0] or 'the model'}"
            + (f" and {len(merged) - 1} more layers" if len(merged) > 1 else "")
            + "). Unmerge first, with unmerge_adapter()."
        )


def remove(model: nn.Module, adapter_name: str, layer_cls: type[nn.Module] = BaseTunerLayer) -> None:
    """Take an adapter out of all layers, and the layers out of the model that hold no other one."""
    holders, shared = holders_of(model), []
    for path, wrapper in reversed(list(wrappers_of(model))):  # inner ones first: the paths of the others stay true
        if not isinstance(wrapper, layer_cls | AuxiliaryTrainingWrapper):
            continue
        if isinstance(wrapper, BaseTunerLayer):
            shared += [getattr(wrapper, attribute, {}) for attribute in wrapper.adapter_cls.common]
        wrapper.delete_adapter(adapter_name)
        if path and not wrapper.adapter_names:
            if isinstance(wrapper, BaseTunerLayer):
                wrapper.release()
            inner = wrapper.base_layer if isinstance(wrapper, BaseTunerLayer) else wrapper.unload(merge=False)
            replace_module(model, path, inner, holders)
    for container in shared:  # last, as layers may need them until they have let go
        if adapter_name in container:
            del container[adapter_name]
    if record := biases_of(model):
        record.delete(adapter_name)


def active_of(model: nn.Module) -> list[str]:
    """The active adapters of a model."""
    return next((active for _, wrapper in wrappers_of(model) if (active := wrapper.active_adapters)), [])


def settle(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """What follows when an adapter has got its parts, in one pass.

    The base model is frozen, and the new adapter until it is activated; it is held in float32
    (:func:`cast_adapter_dtype`). Layers that are new have the same adapters active, or are switched off, as the rest.
    """
    record = biases_of(model)
    trained = {id(p) for _, p in record.parameters(record.applied)} if record and record.applied else set()
    wrappers = []
    for site in walk(model):
        for p in site.module._parameters.values():
            if p is not None and p.requires_grad and id(p) not in trained:
                p.requires_grad_(False)
        wrappers += [wrapper for _, wrapper in site.wrappers]
    active: list[str] = next((names for wrapper in wrappers if (names := wrapper.active_adapters)), [])
    off = any(wrapper.disable_adapters for wrapper in wrappers)
    for wrapper in wrappers:
        if adapter_name in wrapper:
            parameters = list(wrapper.adapter_parameters(adapter_name))
            for p in parameters:
                p.requires_grad_(False)
            if autocast_adapter_dtype:
                _widen(wrapper, adapter_name, parameters)
        if active and not wrapper._active_adapter:
            wrapper.set_adapter(active)
        if off:
            wrapper.enable_adapters(False)
    if record and record.applied == adapter_name:
        for _, p in record.parameters(adapter_name):
            p.requires_grad_(False)


ROUNDING = 0.01
"""Relative error of a merged weight from which a warning tells of it."""


def merge(
    model: nn.Module,
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
    left: Callable[[BaseTunerLayer], bool] | None = None,
) -> None:
    """Merge adapters (default: the active ones) into the base weights of all layers, or of none.

    Args:
        left: says which layers stay as they are.

    Raises:
        ValueError: if a layer cannot be merged; the others are then as they were.
    """
    _check_together(model, adapter_names)
    mark_shared_weights(model)
    layers = [item for item in layers_of(model) if left is None or not left(item[1])][::-1]
    # inner ones first, as they adapt the weight before those around them; before all, what will refuse
    layers.sort(key=lambda item: not _refuses(item[1], adapter_names, safe_merge))
    before = [list(layer.merged_adapters) for _, layer in layers]
    for path, layer in layers:
        try:
            layer.merge(safe_merge, adapter_names)
        except BaseException as error:
            for (_, other), names in zip(layers, before):
                if other.merged_adapters != names:
                    other.unmerge()
                    other.merge(adapter_names=names)
            error.args = (f"{path}: {error}",) if len(error.args) == 1 else error.args
            raise
    _tell_rounding([item for item, names in zip(layers, before) if item[1].merged_adapters != names])


def _check_together(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raise ValueError for adapters that cannot be active together: merged together, one would undo the other."""
    wrappers = [w for _, w in (*layers_of(model), *wrappers_of(model))]
    merged = [name for w in wrappers if isinstance(w, BaseTunerLayer) for name in w.merged_adapters]
    names = dict.fromkeys([*merged, *(active_of(model) if adapter_names is None else adapter_names)])
    for wrapper in wrappers:
        wrapper.check_active_rows(list(names))
    if record := biases_of(model):
        record.choose(behind(model, names))


def _tell_rounding(layers: list[tuple[str, BaseTunerLayer]]) -> None:
    """Warn if rounding to the storage's codes has changed the weights just merged by more than a hundredth."""
    path, layer = max(layers, key=lambda item: item[1].merge_error, default=("", None))
    if layer is not None and layer.merge_error > ROUNDING:
        warnings.warn(
            f"merging rounded the weights to what {layer.storage.name} can keep: relative error up to "
            f"{layer.merge_error:.1%} (in {path or 'the model'}). merge_and_unload(dequantize=True) gives dense "
            "merged layers without it; unmerging restores the original codes."
        )


@torch.no_grad()
def _refuses(layer: BaseTunerLayer, adapter_names: list[str] | None, safe_merge: bool) -> bool:
    """Whether a merge will fail at this layer."""
    new = layer.to_merge(adapter_names)
    if layer.kind.whole or layer.adapter_cls.any_module or not new:
        return False
    if not layer.storage.can_write or any(layer.adapters[name].unmergeable() for name in new):
        return True
    if not safe_merge:
        return False
    adapters = [layer.adapters[name] for name in new]
    tensors = weights.folded_weight(layer, adapters), weights.folded_bias(layer, adapters)
    return not all(t is None or bool(t.isfinite().all()) for t in tensors)


def unmerge(model: nn.Module) -> None:
    """Take all merged adapters out of the base weights."""
    for _, layer in layers_of(model):
        layer.unmerge()


def mark_shared_weights(model: nn.Module) -> None:
    """Note in each layer whether another module holds the same parameter: merging must not change that one."""
    holders: dict[int, set[int]] = {}
    for site in walk(model):
        for p in site.module._parameters.values():
            if p is not None:
                holders.setdefault(id(p), set()).add(id(site.module))
    for _, layer in layers_of(model):
        if not layer.kind.whole and not layer.merged:
            p = layer.get_base_layer()._parameters.get(layer.kind.weight)
            layer.shares_weight = p is not None and len(holders.get(id(p), ())) > 1


def _unloads_itself(layer: BaseTunerLayer) -> bool:
    """Whether a layer of a third party has a way of its own to give back its base."""
    ours = BaseTunerLayer.unload_and_optionally_merge_module
    return type(layer).unload_and_optionally_merge_module is not ours


def unload(
    model: nn.Module,
    merge_first: bool = True,
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
    progressbar: bool = False,
    dequantize_first: bool = False,
    undeclared_biases: bool = False,
) -> nn.Module:
    """Take all adapters out of the model, after merging them if asked; returns the plain model, changed in place."""
    declared: dict[str, bool] = {}
    if merge_first and not undeclared_biases:
        _check_together(model, adapter_names)
        declared = declare_biases(model, new_biases(model, adapter_names))
    record = biases_of(model)
    tied: list[Any] = []
    if hasattr(model, "config") and shares_embeddings(model):
        tied = [site.module for site in tied_sites(model, cast(nn.Module, embeddings_of(model)[0]))]
    if merge_first:
        active = active_of(model)
        back = dequantize(model, adapter_names) if dequantize_first else None
        try:
            merge(model, adapter_names, safe_merge, _unloads_itself)
        except BaseException:
            if back is not None:
                back()
            raise
        bias = record.choose(behind(model, active if adapter_names is None else adapter_names)) if record else None
    else:
        unmerge(model)
        bias = None
    if record:
        record.apply(bias, requires_grad=False)
        record_of(model).biases = None
    # holders come before what they hold, so each name is that of the plain model when its turn comes
    holders, sites = holders_of(model), [site for site in walk(model) if site.wrappers]
    for site in tqdm(sites, disable=not progressbar, desc="Unloading and merging" if merge_first else "Unloading"):
        plain = site.module
        for _, wrapper in site.wrappers:
            if isinstance(wrapper, BaseTunerLayer):
                wrapper.release()
                if _unloads_itself(wrapper):
                    plain = wrapper.unload_and_optionally_merge_module(merge_first, safe_merge, adapter_names)
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                inside = wrapper.unload(merge_first, adapter_names)
                plain = plain if isinstance(inside, BaseTunerLayer) else inside
        plain.requires_grad_(False)
        replace_module(model, site.key, plain, holders)
    set_declared(model, declared)
    if tied:
        _tie_or_untie(model, tied)
    separate_layers(model) if merge_first else restore_layers(model)
    drop_compositions(model)
    return model


def _tie_or_untie(model: nn.Module, others: list[Any]) -> None:
    """After merging, what had the embedding's weight has it again if both got the same; if a head did not, the config
    says so."""
    ends: Any = embeddings_of(model)
    first, last = ends
    for other in others:
        if other.weight is not first.weight and torch.equal(other.weight, first.weight):
            other.weight = first.weight
    if first.weight is last.weight:
        return
    warnings.warn(
        "the input and the output embedding shared their weight, and differ with the adapter merged into them: they "
        "are untied, and the model's config says tie_word_embeddings=False from now on."
    )
    config: Any = model.config
    parts: tuple[Any, ...] = (config, getattr(config, "text_config", None))
    for part in parts:
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """A context in which the model is its base; each layer is on or off after it as before."""
    before = [(wrapper, wrapper.disable_adapters) for _, wrapper in wrappers_of(model)]
    if len({off for _, off in before}) > 1:
        warnings.warn(
            "some adapter layers are switched on and some off. All are off in this context, and as before after it."
        )
    enable_adapters(model, False)
    try:
        yield
    finally:
        if not all(off for _, off in before) or not before:
            enable_adapters(model, True)
            for wrapper, off in before:
                if off:
                    wrapper.enable_adapters(False)
