"""The weight and bias of a layer with and without its adapters, and what puts adapters into them and takes them out.

Every fold sees the unmerged W beside the weight so far, so that adapters which reweight W act side by side. A layer of
another method may be nested inside; it adapts the same weight first.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.core.base.storage import Plain, storage_of
from peft.errors import CheckpointError, NoEqualWeightError
from peft.kernels.few import is_small
from peft.kernels.made_weight import made_product
from peft.kernels.strict import forbid_dense


if TYPE_CHECKING:
    from peft.core.adapter import Adapter
    from peft.core.layer.layer import BaseTunerLayer

    Adapters = Sequence[Adapter]


# --- the base layer's own -----------------------------------------------------------------------------------------


def base_weight(layer: BaseTunerLayer) -> torch.Tensor:
    """The dense base weight as it is now, ``[out, in, *kernel]``."""
    base = layer.get_base_layer()
    return layer.kind.orient(layer.storage.read(base, layer.kind.weight), base)


def set_base_weight(layer: BaseTunerLayer, weight: torch.Tensor) -> None:
    """Replace the base weight by ``[out, in, *kernel]``, in its memory unless something needs the old one."""
    base, attribute = layer.get_base_layer(), layer.kind.weight
    stored = layer.kind.restore(weight, base)
    if "weight" in layer.originals or layer.shares_weight or not layer.storage.overwrite(base, attribute, stored):
        layer.storage.write(base, attribute, stored, layer.shares_weight)


def base_bias(layer: BaseTunerLayer) -> torch.Tensor | None:
    """The base bias as it is now, ``[out]``, detached unless it trains."""
    base, attribute = layer.get_base_layer(), layer.kind.bias
    bias = getattr(base, attribute, None) if attribute else None
    if bias is None or (bias.requires_grad and not bias.is_meta):
        return bias
    return storage_of(base, str(attribute)).read(base, str(attribute))


def unmerged_weight(layer: BaseTunerLayer) -> torch.Tensor:
    """The base weight without any adapter, ``[out, in, *kernel]``; 16-bit ones in float32."""
    weight = wide(base_weight(layer))
    for outer in (layer, *layers_inside(layer)):
        if outer.merged and outer.kind.weight == layer.kind.weight:
            weight = _stripped(outer, weight)
    return weight


def _stripped(layer: BaseTunerLayer, weight: torch.Tensor) -> torch.Tensor:
    """The weight without what this layer has merged into it."""
    if "weight" in layer.originals:
        base, storage, kept = layer.originals["weight"]
        return wide(layer.kind.orient(storage.read_kept(base, layer.kind.weight, kept), base))
    for adapter in reversed(fold_order(layer.merged_ones())):
        weight = adapter.unfold(weight)
    return weight


def unmerged_bias(layer: BaseTunerLayer) -> torch.Tensor | None:
    """The bias without what this layer has merged into it."""
    return layer.originals["bias"] if "bias" in layer.originals else base_bias(layer)


def bias_below(layer: BaseTunerLayer) -> torch.Tensor | None:
    """The bias in what the layer below gives: the base's, and what adapters of other methods there make of it."""
    inner = layer_inside(layer)
    return base_bias(layer) if inner is None or layer.context.is_mixed else folded_bias(inner, inner.current())


def sums_exactly(layer: BaseTunerLayer) -> bool:
    """Whether W can hold an update added to it: quantised or 16-bit weights would round small ones away."""
    return layer.storage.holds_updates_exactly(layer.get_base_layer(), layer.kind.weight)


def wide(weight: torch.Tensor) -> torch.Tensor:
    """In float32 what has 16 bits: so weights are folded, and rounded once, and matrices decomposed."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


# --- with adapters ------------------------------------------------------------------------------------------------


def fold_order(adapters: Adapters) -> Adapters:
    """Maps of x apply one after another, hence to W in reverse order."""
    reverse = len(adapters) > 1 and any(adapter.folds_in_reverse() for adapter in adapters)
    return adapters[::-1] if reverse else adapters


def layer_inside(layer: BaseTunerLayer) -> BaseTunerLayer | None:
    """The tuner layer between this one and the base layer that acts on the same weight, if any."""
    inner: Any = layer._modules["base_layer"]
    kind = inner.kind if hasattr(type(inner), "adapter_cls") else None
    return inner if kind is not None and kind.weight and kind.weight == layer.kind.weight else None


def layers_inside(layer: BaseTunerLayer) -> list[BaseTunerLayer]:
    """All tuner layers inside this one, from the next one inwards, whichever weight they act on."""
    found, inner = [], layer._modules["base_layer"]
    while hasattr(type(inner), "adapter_cls"):
        found.append(inner)
        inner = inner._modules["base_layer"]
    return found  # type: ignore[return-value]


def adapters_below(layer: BaseTunerLayer) -> tuple[Adapters, ...]:
    """The adapters that act on the same weight in the layers inside this one, from the next one inwards."""
    inner = layer_inside(layer)
    return () if inner is None else (inner.current(), *adapters_below(inner))


def folded_weight(
    layer: BaseTunerLayer, adapters: Adapters, below: tuple[Adapters, ...] | None = None
) -> torch.Tensor:
    """The weight ``[out, in, *kernel]`` with these adapters in it, and those in the layers inside this one."""
    inner, (first, *rest) = layer_inside(layer), (adapters_below(layer) if below is None else below) or ((),)
    weight = base_weight(layer) if inner is None else folded_weight(inner, first, tuple(rest))
    if not adapters:
        return weight
    base = weight if inner is None and not layer.merged else unmerged_weight(layer)
    return _folded_one_by_one(weight, base, adapters)


def folded_into(layer: BaseTunerLayer, direct: torch.Tensor, adapters: Adapters) -> torch.Tensor:
    """The same where :meth:`BaseTunerLayer.direct_weight` gives W as it is stored: there is nothing else in it."""
    weight = layer.kind.orient(direct.detach(), layer._modules["base_layer"])
    return _folded_one_by_one(weight, weight, adapters)


def _folded_one_by_one(weight: torch.Tensor, base: torch.Tensor, adapters: Adapters) -> torch.Tensor:
    """A weight with these adapters in it, in its dtype; ``base`` is the one without any, wide or the very same."""
    dtype, same, weight = weight.dtype, base is weight, wide(weight)
    base = weight if same else base
    for adapter in fold_order(adapters):
        weight = adapter.fold(weight, base)
    return weight if weight.dtype is dtype else weight.to(dtype)


def folded_bias(layer: BaseTunerLayer, adapters: Adapters) -> torch.Tensor | None:
    """The bias ``[out]`` with these adapters in it."""
    inner = layer_inside(layer)
    bias = old = base_bias(layer) if inner is None else folded_bias(inner, inner.current())
    for adapter in fold_order(adapters):
        bias = adapter.fold_bias(bias)
    if bias is old:
        return bias
    if bias is None:
        return None
    like = getattr(layer.get_base_layer(), layer.kind.weight) if old is None else old
    return bias.to(like.dtype) if like.is_floating_point() else bias


def effective(layer: BaseTunerLayer, adapters: Adapters) -> dict[str, torch.Tensor]:
    """The tensors that the base layer should read, as it stores them, by attribute; nested layers included."""
    values: dict[str, torch.Tensor | None] = {}
    for inner in reversed(layers_inside(layer)):
        values.update(effective_here(inner, inner.current()))
    values.update(effective_here(layer, adapters))
    return {name: value for name, value in values.items() if value is not None}


def effective_here(layer: BaseTunerLayer, adapters: Adapters) -> dict[str, torch.Tensor | None]:
    """The weight and bias of this layer's own kind with its adapters in them, as it stores them, by attribute."""
    stored = layer.kind.restore(folded_weight(layer, adapters), layer.get_base_layer())
    values: dict[str, torch.Tensor | None] = {layer.kind.weight: stored}
    if layer.kind.bias:
        values[layer.kind.bias] = folded_bias(layer, adapters)
    return values


def weight_change(layer: BaseTunerLayer, adapter: Adapter) -> torch.Tensor:
    """What an adapter adds to the base weight, ``[out, in, *kernel]``.

    Raises:
        ValueError: if no weight equals the adapter.
    """
    if reason := adapter.unmergeable():
        raise NoEqualWeightError(reason)
    if adapter.stand_in() is not None:
        raise NoEqualWeightError(
            f"{type(layer).__name__} replaces the module whole; there is no change of one weight."
        )
    base = unmerged_weight(layer)
    return adapter.fold(base, base) - base


def bias_change(adapter: Adapter) -> torch.Tensor | None:
    """What an adapter adds to the base bias ``[out]``, or None.

    Raises:
        ValueError: if the adapter changes biases and is merged.
    """
    change = added_to(base_bias(adapter.layer), adapter)
    if change is not None and adapter.layer.merged:
        raise ValueError("the adapter changes biases, and is merged; call unmerge_adapter() before converting it.")
    return change


def added_to(bias: torch.Tensor | None, adapter: Adapter) -> torch.Tensor | None:
    """What an adapter adds to this bias ``[out]``, or None."""
    changed = adapter.fold_bias(bias)
    if changed is None or changed is bias:
        return None
    return changed if bias is None else changed - bias


def multiplied(
    layer: BaseTunerLayer, x: torch.Tensor, make: Callable[[], torch.Tensor], adapters: Adapters
) -> torch.Tensor:
    """``make() x``, with a weight ``[out, in, *kernel]`` made of these adapters: made again in the backward pass.

    Neither the weight nor what it is computed from is kept meanwhile: a dense base that was dequantised, or an update
    that takes as much memory as W. Exceptions are small weights, and those that are dear to make.
    """
    forbid_dense(layer)
    base = layer.get_base_layer()
    if not torch.is_grad_enabled() or (type(layer.storage) is Plain and is_small(math.prod(layer.shape))):
        return layer.kind.apply(base, x, make())
    if layer.kind.matrix and layer.storage.name is None and all(adapter.dear_to_make() for adapter in adapters):
        out, inner = layer.shape
        if out * inner <= x.numel() * (1 + out / inner):  # no larger than what the layer takes and gives
            return layer.kind.apply(base, x, make())
    read = [p for adapter in adapters for p in adapter.parameters()]
    if not torch.compiler.is_compiling():  # else nothing is made again later
        make = _with_tensors_of_now(make, adapters)
    multiply, gradients = partial(layer.kind.apply, base), partial(layer.kind.gradients, base)
    return made_product(multiply, gradients, x, make, [*read, *base.parameters(recurse=False)])


def _with_tensors_of_now(make: Callable[[], torch.Tensor], adapters: Adapters) -> Callable[[], torch.Tensor]:
    """``make`` with the tensors that the adapters hold now, also when it is called again in the backward pass.

    ``torch.func.functional_call`` takes the given tensors away again after the forward.
    """
    held = [slot for adapter in adapters for slot in _slots(adapter)]

    def made() -> torch.Tensor:
        changed = [(where, name, where.get(name), then) for where, name, then in held if where.get(name) is not then]
        for where, name, _, then in changed:
            where[name] = then
        try:
            return make()
        finally:
            for where, name, now, _ in changed:
                where[name] = now

    return made


def _slots(adapter: Adapter) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Where an adapter's trained tensors are: dict, key, tensor."""
    for attribute, declared, value in adapter.held():
        if declared.container is nn.ModuleDict:
            for module in value.modules():
                yield from ((module._parameters, key, p) for key, p in module._parameters.items() if p is not None)
        elif declared.container is nn.ParameterDict:
            holder: Any = adapter.layer._modules[attribute]
            yield (holder._parameters if adapter.name in holder._parameters else holder.__dict__), adapter.name, value


# --- merge --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(layer: BaseTunerLayer, new: Adapters, safe_merge: bool) -> None:
    """Put these adapters into the base weight beside those that are in it; the layer is unchanged by errors.

    Raises:
        ValueError: if one cannot be merged or has no values yet, or the merged weight is not finite.
    """
    for adapter in new:
        if reason := adapter.unmergeable():
            raise NoEqualWeightError(f"adapter {adapter.name!r} cannot be merged: {reason}")
    base_is_meta = any(p.is_meta for p in layer.get_base_layer().parameters())
    for adapter in () if base_is_meta else new:  # some products with tensors on meta give what is in memory
        if any(p.is_meta for p in layer.adapter_parameters(adapter.name)):
            raise CheckpointError(
                f"adapter {adapter.name!r} has no values yet (low_cpu_mem_usage), so it cannot be merged: load all "
                "its tensors with set_peft_model_state_dict first."
            )
    names = [*layer.merged_adapters, *(adapter.name for adapter in new)]
    adapters = [layer.adapters[name] for name in names]
    layer.check_active(names)
    if any(adapter.stand_in() is not None for adapter in new):
        _swap(layer, adapters, safe_merge)
        return
    # What is merged already is folded again beside the new: each sees the unmerged W.
    unmerge(layer)
    check_writable(layer)
    stored, bias = base_weight(layer), base_bias(layer)
    dtype, weight, base = stored.dtype, wide(stored), unmerged_weight(layer)
    for adapter in fold_order(adapters):
        weight, bias = adapter.fold(weight, base), adapter.fold_bias(bias)
    if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise ValueError(
            f"merging {', '.join(repr(adapter.name) for adapter in new)} gives a weight with NaN or infinite entries; "
            "nothing was merged. The adapter is broken or was trained in a dtype too narrow for it."
        )
    _write(layer, adapters, weight.to(dtype), bias)


def _swap(layer: BaseTunerLayer, adapters: Adapters, safe_merge: bool) -> None:
    """A copy of the module that an adapter has in its place becomes the base layer."""
    (adapter,) = adapters
    duplicate = copy.deepcopy(adapter.stand_in())
    assert duplicate is not None
    duplicate.requires_grad_(False)
    if safe_merge and not all(p.isfinite().all() for p in duplicate.parameters()):
        raise ValueError(f"adapter {adapter.name!r} holds NaN or infinite entries; nothing was merged.")
    if (dtype := dtype_of_module(layer.base_layer)) is not None:
        duplicate.to(dtype)
    layer.originals = {"module": layer.base_layer}
    layer.base_layer, layer.merged_adapters = duplicate, [adapter.name]


def dtype_of_module(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first of its parameters that floats, None where it has none."""
    for some in (module._parameters.values(), module.parameters()):  # its own come first, and take no walk
        for p in some:  # no next(.., None): torch 2.8 does not compile it
            if p is not None and p.is_floating_point():
                return p.dtype
    return None


def check_writable(layer: BaseTunerLayer) -> None:
    """Raise ValueError where the base weight cannot be replaced."""
    if reason := layer.storage.unwritable(layer.get_base_layer(), layer.kind.weight):
        raise ValueError(reason)


def _write(layer: BaseTunerLayer, adapters: Adapters, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    base, kind, storage, attribute = layer.get_base_layer(), layer.kind, layer.storage, str(layer.kind.bias)
    old_bias, keep = base_bias(layer), any(adapter.keeps_base() for adapter in adapters)
    if keep or layer.shares_weight or not storage.lossless:
        layer.originals["weight"] = base, storage, storage.keep(base, kind.weight)
    wanted = None if storage.lossless else wide(weight)
    if (keep or not storage.lossless) and old_bias is not None:
        layer.originals["bias"] = old_bias.detach()
    if wanted is None or not _shifted(layer, adapters):
        set_base_weight(layer, weight)
    if wanted is not None:
        layer.merge_error = float((wide(base_weight(layer)) - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if bias is not None and old_bias is None:
        warnings.warn(
            f"merging gives {type(base).__name__} a bias that it did not have; a model saved with it "
            "loads only where its architecture declares that bias."
        )
        layer.originals["bias"] = None
        setattr(base, attribute, nn.Parameter(bias.to(weight.dtype), requires_grad=False))
    elif bias is not None and old_bias is not None and bias is not old_bias:
        storage_of(base, attribute).write(base, attribute, bias.to(old_bias.dtype))
    layer.merged_adapters = [adapter.name for adapter in adapters]


def _shifted(layer: BaseTunerLayer, adapters: Adapters) -> bool:
    """Put adapters into the zero points of a quantised weight, where these can hold them; else nothing is done."""
    changes = [adapter.group_change() for adapter in adapters]
    if None in changes or len({change[1] for change in changes if change is not None}) != 1:
        return False
    total, size = sum(change[0] for change in changes if change is not None), changes[0][1]  # type: ignore[index]
    return layer.storage.shift_groups(layer.get_base_layer(), layer.kind.weight, total, size)


@torch.no_grad()
def unmerge(layer: BaseTunerLayer) -> None:
    """Take all merged adapters out of the base weight."""
    if not layer.merged_adapters:
        return
    if "module" in layer.originals:
        layer.base_layer, layer.originals, layer.merged_adapters = layer.originals["module"], {}, []
        return
    base, kind, attribute = layer.get_base_layer(), layer.kind, str(layer.kind.bias)
    bias = base_bias(layer)
    if "weight" in layer.originals:
        old_base, storage, kept_weight = layer.originals["weight"]
        if old_base is not base:  # somebody has dequantised the model meanwhile
            layer.replace_base(old_base)
            base = old_base
        storage.put_back(base, kind.weight, kept_weight)
    else:
        stored = base_weight(layer)
        set_base_weight(layer, _stripped(layer, wide(stored)).to(stored.dtype))
    if "bias" in layer.originals:
        kept = layer.originals["bias"]
        if kept is None:
            setattr(base, attribute, None)
        else:
            storage_of(base, attribute).write(base, attribute, kept)
    elif bias is not None:
        old = bias
        for adapter in reversed(fold_order(layer.merged_ones())):
            bias = adapter.unfold_bias(bias)
        if bias is not None and bias is not old:
            storage_of(base, attribute).write(base, attribute, bias.to(old.dtype))
    layer.merged_adapters, layer.originals = [], {}


@contextmanager
def taken_out(layers: Iterable[BaseTunerLayer]) -> Iterator[bool]:
    """A context in which nothing is merged into these layers, outer ones first; yields whether anything was."""
    before = [(layer, list(layer.merged_adapters)) for layer in layers if layer.merged]
    for layer, _ in before:
        layer.unmerge()
    try:
        yield bool(before)
    finally:
        for layer, names in reversed(before):
            layer.merge(adapter_names=names)
