"""The life of adapters in a model, written once: activate, scale, switch off, merge, unload, delete, cast.

Everything here works on any module that holds tuner layers, with or without a :class:`PeftModel` around it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from peft.core.base.storage import storage_of
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, biases_of
from peft.core.model.replicate import restore_layers, separate_layers
from peft.core.model.walk import embeddings_of, layers_of, replace_module, walk, wrappers_of


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
    """Raise ValueError for a name that is no adapter of the model; it lists those there are."""
    known = list(adapters_of(model) if known is None else known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"adapter {', '.join(map(repr, unknown))} not found. Adapters of this model: "
            f"{', '.join(map(repr, known)) or 'none'}. Add one with add_adapter or load_adapter."
        )


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[nn.Module] = BaseTunerLayer,
) -> None:
    """Make one or several adapters the active ones, and the only ones whose parameters train.

    Args:
        model: any module with tuner layers.
        adapter_name: one name, or a list; all of them act in each forward call.
        inference_mode: train none of them.
        layer_cls: change only tuner layers of this class (and the auxiliary wrappers).

    Raises:
        ValueError: if an adapter is unknown, or some cannot be active together; the model is then unchanged.
    """
    names = names_of(adapter_name)
    wrappers = [w for _, w in wrappers_of(model) if isinstance(w, layer_cls | AuxiliaryTrainingWrapper)]
    known = dict.fromkeys(name for wrapper in wrappers for name in wrapper.adapter_names)
    record = biases_of(model)
    if wrappers:
        require_adapters(model, names, known)
    for wrapper in wrappers:
        wrapper.check_active([name for name in names if name in wrapper])
    bias = record.choose(names) if record else None
    if any(isinstance(w, BaseTunerLayer) and w.merged for w in wrappers):
        warnings.warn("adapters are merged into the base model; they are unmerged before others are activated.")
        unmerge(model)
    for wrapper in wrappers:
        wrapper.set_adapter(names, inference_mode)
    if record:
        record.apply(bias, not inference_mode)


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off; off, the model is its base."""
    names: list[str] = []
    for _, wrapper in wrappers_of(model):
        wrapper.enable_adapters(enabled)
        names = names or wrapper.active_adapters
    if record := biases_of(model):
        record.apply(record.choose(names) if enabled else None)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Choose whether these adapters train, active or not."""
    for _, wrapper in wrappers_of(model):
        wrapper.set_requires_grad(adapter_names, requires_grad)
    record = biases_of(model)
    if record and record.applied in names_of(adapter_names):
        for _, p in record.parameters(record.applied):
            p.requires_grad_(requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Hold an adapter in float32 where it is in a 16-bit dtype, so that small updates are not rounded away.

    Whole modules that it trains (``modules_to_save``) stay as they are: they compute in the model's dtype.
    """
    if not autocast_adapter_dtype:
        return
    for _, wrapper in wrappers_of(model):
        _widen(wrapper, adapter_name)


def _widen(wrapper: nn.Module, adapter_name: str) -> None:
    if not isinstance(wrapper, ModulesToSaveWrapper):
        for p in wrapper.adapter_parameters(adapter_name):
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
    """
    remove(model, adapter_name, layer_cls)
    active, rest = active_of(model), adapters_of(model)
    if active or not rest:
        return active or None
    warnings.warn(f"adapter {adapter_name!r} was active; {rest[0]!r} is active now.")
    set_adapter(model, rest[0])
    return rest[:1]


def remove(model: nn.Module, adapter_name: str, layer_cls: type[nn.Module] = BaseTunerLayer) -> None:
    """Take an adapter out of all layers, and the layers out of the model that hold no other one."""
    for path, wrapper in reversed(list(wrappers_of(model))):  # inner ones first: the paths of the others stay true
        if not isinstance(wrapper, layer_cls | AuxiliaryTrainingWrapper):
            continue
        for attribute in getattr(wrapper, "shared", ()):
            if adapter_name in getattr(wrapper, attribute, ()):
                del getattr(wrapper, attribute)[adapter_name]
        wrapper.delete_adapter(adapter_name)
        if path and not wrapper.adapter_names:
            if isinstance(wrapper, BaseTunerLayer):
                wrapper.release()
            inner = wrapper.base_layer if isinstance(wrapper, BaseTunerLayer) else wrapper.unload(merge=False)
            replace_module(model, path, inner)
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
    active: list[str] = next((names for wrapper in wrappers if (names := wrapper._active_adapter)), [])
    off = any(wrapper.disable_adapters for wrapper in wrappers)
    for wrapper in wrappers:
        if adapter_name in wrapper:
            wrapper.set_requires_grad(adapter_name, False)
            if autocast_adapter_dtype:
                _widen(wrapper, adapter_name)
        if active and not wrapper._active_adapter:
            wrapper.set_adapter(active)
        if off:
            wrapper.enable_adapters(False)
    if record and record.applied == adapter_name:
        for _, p in record.parameters(adapter_name):
            p.requires_grad_(False)


ROUNDING = 0.01
"""Relative error of a merged weight from which a warning tells of it."""


def merge(model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """Merge adapters (default: the active ones) into the base weights of all layers, or of none.

    Raises:
        ValueError: if a layer cannot be merged; the others are then as they were.
    """
    mark_shared_weights(model)
    layers = list(reversed(list(layers_of(model))))
    # those that will refuse come first: while nothing is merged there is nothing to undo
    layers.sort(key=lambda item: not _refuses(item[1], adapter_names, safe_merge))
    before = [list(layer.merged_adapters) for _, layer in layers]
    for path, layer in layers:
        try:
            layer.merge(safe_merge, adapter_names)
        except Exception as error:
            for (_, other), names in zip(layers, before):
                if other.merged_adapters != names:
                    other.unmerge()
                    other.merge(adapter_names=names)
            error.args = (f"{path}: {error}",) if len(error.args) == 1 else error.args
            raise
    _tell_rounding([item for item, names in zip(layers, before) if item[1].merged_adapters != names])


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
def dequantize(model: nn.Module, adapter_names: list[str] | None = None) -> Callable[[], None]:
    """Put dense layers, in the compute dtype, in the place of the quantised ones that are to be merged.

    Quantised layers take inputs of any dtype, dense ones do not: where the model's other parameters are wider than the
    compute dtype (norms in float32, say), the layers get that dtype.

    Returns:
        A function that brings the quantised layers back, with what was merged into them.

    Raises:
        ValueError: if a weight cannot be read; the model is then unchanged.
    """
    layers = [(path, x) for path, x in layers_of(model) if x.kind is not None and x.storage.name is not None]
    layers = [(path, x) for path, x in layers if x.merged or x.to_merge(adapter_names)]
    for path, layer in layers:
        if reason := _no_dense_layer(layer):
            raise ValueError(f"{path}: {reason} Load the base model unquantised and the adapter on it.")
    widest = _widest(model)
    before = [(layer, list(layer.merged_adapters)) for _, layer in layers]
    for layer, _ in before:
        layer.unmerge()
    replaced = []
    for layer, _ in before:
        if layer.storage.name is not None:  # else a layer around it has seen to it
            old = layer.get_base_layer()
            own = layer.storage.compute_dtype(old, layer.kind.weight)
            dtype = torch.promote_types(own or widest or torch.float32, widest or own or torch.float32)
            replaced.append((layer, layer.replace_base(_dense(layer, dtype))))
    _merge_again(before)

    def back() -> None:
        for layer, _ in before:
            layer.unmerge()
        for layer, old in replaced:
            layer.replace_base(old)
        _merge_again(before)

    return back


def _merge_again(before: list[tuple[BaseTunerLayer, list[str]]]) -> None:
    for layer, names in reversed(before):
        if names:
            layer.merge(adapter_names=names)


def _no_dense_layer(layer: BaseTunerLayer) -> str | None:
    if not layer.storage.can_read:
        return f"weights kept by {layer.storage.name} cannot be read, so they cannot be dequantised."
    if layer.kind.name != "Linear" and not _is_torchs(layer.get_base_layer()):
        return (
            f"{layer.storage.name} keeps it as {type(layer.get_base_layer()).__name__}, which has no dense form here."
        )
    return None


def _is_torchs(m: nn.Module) -> bool:
    return type(m).__module__.startswith("torch.nn.")


def _widest(model: nn.Module) -> torch.dtype | None:
    """The widest dtype among the parameters of the model's dense modules, None if there are none."""
    found: torch.dtype | None = None
    for site in walk(model):
        parameters = [p for p in site.module._parameters.values() if p is not None]
        if any(storage_of(site.module, name).name is not None for name in ("weight", *site.module._parameters)):
            continue
        for p in parameters:
            if p.dtype in (torch.float16, torch.bfloat16, torch.float32):
                found = p.dtype if found is None else torch.promote_types(found, p.dtype)
    return found


def _dense(layer: BaseTunerLayer, dtype: torch.dtype) -> nn.Module:
    """An ordinary layer with the weight of a quantised one."""
    old = layer.get_base_layer()
    weight, bias = layer.get_base_weight().to(dtype), layer.get_base_bias()
    if _is_torchs(old):  # the weight alone is another class
        new = copy.copy(old)
        new._parameters = dict(old._parameters)
    else:
        new = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    new.weight = nn.Parameter(layer.kind.restore(weight, old).contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return new.train(old.training)


@torch.no_grad()
def _refuses(layer: BaseTunerLayer, adapter_names: list[str] | None, safe_merge: bool) -> bool:
    """Whether a merge will fail at this layer."""
    new = layer.to_merge(adapter_names)
    if layer.kind is None or not new:
        return False
    if not layer.storage.can_write or any(layer.unmergeable(name) for name in new):
        return True
    if not safe_merge:
        return False
    tensors = layer._folded_weight(new), layer._folded_bias(new)
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
        if layer.kind is not None and not layer.merged:
            p = layer.get_base_layer()._parameters.get(layer.kind.weight)
            layer.shares_weight = p is not None and len(holders.get(id(p), ())) > 1


def unload(
    model: nn.Module,
    merge_first: bool = True,
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
    progressbar: bool = False,
    dequantize_first: bool = False,
) -> nn.Module:
    """Take all adapters out of the model, after merging them if asked; returns the plain model, changed in place."""
    record = biases_of(model)
    tied = _tied_embeddings(model)
    if merge_first:
        active = active_of(model)
        back = dequantize(model, adapter_names) if dequantize_first else None
        try:
            merge(model, adapter_names, safe_merge)
        except Exception:
            if back is not None:
                back()
            raise
        bias = record.choose(active if adapter_names is None else adapter_names) if record else None
    else:
        unmerge(model)
        bias = None
    if record:
        record.apply(bias, requires_grad=False)
        del model.__dict__["_trained_biases"]
    # holders come before what they hold, so each name is that of the plain model when its turn comes
    sites = [site for site in walk(model) if site.wrappers]
    for site in tqdm(sites, disable=not progressbar, desc="Unloading and merging" if merge_first else "Unloading"):
        plain = site.module
        for _, wrapper in site.wrappers:
            if isinstance(wrapper, BaseTunerLayer):
                wrapper.release()
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                inside = wrapper.unload(merge_first, adapter_names)
                plain = plain if isinstance(inside, BaseTunerLayer) else inside
        plain.requires_grad_(False)
        replace_module(model, site.key, plain)
    if tied:
        _tie_or_untie(model)
    separate_layers(model) if merge_first else restore_layers(model)
    return model


def _tied_embeddings(model: nn.Module) -> bool:
    first, last = embeddings_of(model)
    weight = getattr(first, "weight", None)
    return hasattr(model, "config") and isinstance(weight, nn.Parameter) and weight is getattr(last, "weight", None)


def _tie_or_untie(model: nn.Module) -> None:
    """After merging, embedding and head share their weight again if both got the same; if not, the config says so."""
    first, last = embeddings_of(model)
    if torch.equal(first.weight, last.weight):
        last.weight = first.weight
        return
    config = model.config
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


@contextmanager
def adapters_disabled(model: nn.Module):
    """A context in which the model is its base; adapters that were off before stay off after it."""
    were_on = [not wrapper.disable_adapters for _, wrapper in wrappers_of(model)]
    enable_adapters(model, False)
    try:
        yield
    finally:
        if any(were_on) or not were_on:
            enable_adapters(model, True)
