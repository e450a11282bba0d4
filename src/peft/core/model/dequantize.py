"""Dense layers in the place of quantised ones, so that merging rounds nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from peft.core.base.storage import storage_of
from peft.core.layer import weight as weights
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.walk import layers_of, walk


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
    found = [(path, x) for path, x in layers_of(model) if not x.kind.whole and x.storage.name is not None]
    found = [(path, x) for path, x in found if x.merged or x.to_merge(adapter_names)]
    for path, layer in found:
        if reason := _no_dense_layer(layer):
            raise ValueError(f"{path}: {reason} Load the base model unquantised and the adapter on it.")
    widest, layers, replaced = _widest(model), [layer for _, layer in found], []
    with weights.taken_out(layers):
        for layer in layers:
            if layer.storage.name is not None:  # else a layer around it has seen to it
                old = layer.get_base_layer()
                own = layer.storage.compute_dtype(old, layer.kind.weight)
                dtype = torch.promote_types(own or widest or torch.float32, widest or own or torch.float32)
                replaced.append((layer, layer.replace_base(_dense(layer, dtype))))

    def back() -> None:
        with weights.taken_out(layers):
            for layer, old in replaced:
                layer.replace_base(old)

    return back


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
    weight, bias = weights.base_weight(layer).to(dtype), weights.base_bias(layer)
    if _is_torchs(old):  # the weight alone is another class
        new = copy.copy(old)
        new._parameters = dict(old._parameters)
    else:
        new = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    new.weight = nn.Parameter(layer.kind.restore(weight, old).contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return new.train(old.training)
