"""The ways in which a layer's output is computed with its adapters: the first that serves a call is taken.

A route is a function of the layer, the adapters that act (at least one) and the call. It says whether it serves by
what it gives: an output, or None. Whether the base layer may be passed by is asked of
:meth:`BaseTunerLayer.direct_weight`, and nowhere else.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.core.adapter import Adapter
from peft.core.layer import parallel
from peft.core.layer import weight as weights
from peft.core.layer.composed import leaves_of
from peft.kernels.linear import NO_CONTEXT, Factors, is_eager, low_rank_linear
from peft.kernels.made_again import reading
from peft.kernels.strict import is_plain


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer

    Adapters = Sequence[Adapter]
    Keywords = dict[str, Any]


def stand_in(layer: BaseTunerLayer, adapters: Adapters, args: tuple, kwargs: Keywords) -> Any:
    """A module that an adapter has in the place of the base module, called in the base's dtype."""
    module = adapters[-1].stand_in()
    if module is None:
        return None
    dtype = other_dtype(layer, module)
    if dtype is None:
        return module(*args, **kwargs)
    inner = weights.dtype_of_module(module)
    y = module(*(with_floats_in(inner, a) for a in args), **{k: with_floats_in(inner, v) for k, v in kwargs.items()})
    return with_floats_in(dtype, y)


def parted(layer: BaseTunerLayer, adapters: Adapters, args: tuple, kwargs: Keywords) -> Any:
    """A layer of which this process computes a part: low-rank updates of the part, or other ways on the whole."""
    team = parallel.team_of(layer, args[0]) if args else None
    if team is None:
        return None
    factors = None if len(args) > 1 or kwargs else all_factors(layer, adapters, args[0])
    if factors is not None:
        return parallel.low_rank(layer, team, args[0], factors)

    def compute(x: torch.Tensor) -> torch.Tensor:
        found = (route(layer, adapters, (x, *args[1:]), kwargs) for route in (folded, updated))
        return next(y for y in found if y is not None)

    return parallel.as_whole(layer, team, args[0], compute)


def by_kernel(layer: BaseTunerLayer, adapters: Adapters, args: tuple, kwargs: Keywords) -> Any:
    """A method's kernel for the whole layer."""
    if len(args) != 1 or kwargs:
        return None
    cls = type(adapters[0])
    alike = len(adapters) == 1 or all(type(adapter) is cls for adapter in adapters)
    return cls.kernel(layer, adapters, args[0]) if alike else None


def low_rank(layer: BaseTunerLayer, adapters: Adapters, args: tuple, kwargs: Keywords) -> Any:
    """The fused products of low-rank updates, beside the base layer or with its weight."""
    if len(args) != 1 or kwargs:
        return None
    trains = torch.is_grad_enabled() and is_eager(args[0])
    factors = all_factors(layer, adapters, args[0], trains)
    if factors is None:
        return None
    weight = layer.bypass_matrix(args[0])
    fresh = weight is None and layer.base_is_fresh()
    share = None if torch.compiler.is_compiling() else layer.context.readers.share(layer, args[0], factors)
    return low_rank_linear(layer._modules["base_layer"], args[0], factors, weight, fresh, share)


def folded(layer: BaseTunerLayer, adapters: Adapters, args: tuple, kwargs: Keywords) -> Any:
    """One product with the weight that has the adapters in it; else the base layer's output and what they change."""
    if layer.kind.opaque:
        values = weights.effective(layer, adapters)
        return layer.storage.call(layer.get_base_layer(), values, args, kwargs)
    only, prefer = False, True
    for adapter in adapters:
        only, prefer = only or adapter.only_folds(), prefer and adapter.prefers_folding()
    if not only and not prefer:
        return None
    x = args[0]
    if (direct := layer.direct_weight(x)) is not None:
        bias = weights.folded_bias(layer, adapters)
        y = weights.multiplied(layer, x, lambda: weights.folded_into(layer, direct, adapters), leaves_of(adapters))
        return y if bias is None else y + layer.kind.along_channels(bias, layer.get_base_layer())
    if not only:
        return None
    below = weights.adapters_below(layer)
    y = layer.base_layer(*args, **kwargs)
    made_of = leaves_of([*adapters, *(adapter for inner in below for adapter in inner)])
    dtype = x.dtype if x.is_floating_point() else None  # what is made again in the backward must not hold x
    change = weights.multiplied(layer, x, lambda: _folded_change(layer, adapters, below, dtype), made_of)
    return (y + change).to(y.dtype)


def _folded_change(
    layer: BaseTunerLayer, adapters: Adapters, below: tuple[Adapters, ...], dtype: torch.dtype | None
) -> torch.Tensor:
    """What adapters change of the weight that those in the layers inside this one have made."""
    inner, rest = weights.layer_inside(layer), below[1:]
    before = weights.wide(
        weights.base_weight(layer) if inner is None else weights.folded_weight(inner, below[0], rest)
    )
    after, base = before, weights.unmerged_weight(layer)
    for adapter in weights.fold_order(adapters):
        after = adapter.fold(after, base)
    return (after - before).to(dtype or before.dtype)


def updated(layer: BaseTunerLayer, adapters: Adapters, args: tuple, kwargs: Keywords) -> Any:
    """The base layer on an input that adapters may change, and what they make of its output, one after another."""
    x = inner = args[0]
    changes, spares, kind = False, True, layer.kind
    for adapter in adapters:  # loops, not any and all: these are asked in each call of each layer
        changes, spares = changes or adapter.changes_input, spares and adapter.spares_input
    # looking at all that autograd keeps takes longer than adapters do that see to it themselves
    with NO_CONTEXT if spares else reading(x):
        if changes:
            for adapter in reversed(weights.fold_order(adapters)):  # the one next to x is folded last
                inner = adapter.input(adapter.cast(inner))
            inner = inner if inner.dtype is x.dtype else inner.to(x.dtype)
        given = layer._modules["base_layer"](inner, *args[1:], **kwargs)  # type: ignore[misc]
        base_y = y = kind.tensor_in(given)
        for adapter in adapters:
            y = adapter.output(adapter.cast(x), y, base_y)
        return kind.with_tensor(given, y if y.dtype is base_y.dtype else y.to(base_y.dtype))


ROUTES = (stand_in, parted, by_kernel, low_rank, folded, updated)
PLAIN_ROUTES = (stand_in, parted, folded, updated)
"""Those within :func:`peft.kernels.plain`."""


def adapted(layer: BaseTunerLayer, adapters: Adapters, args: tuple, kwargs: Keywords) -> Any:
    """The layer's output with these adapters, at least one."""
    alone = len(adapters) == 1 and not layer.kind.opaque and not torch.compiler.is_compiling()
    routes = ways_of(type(adapters[0])) if alone else ROUTES  # type: ignore[arg-type]
    for route in PLAIN_ROUTES if is_plain() else routes:
        y = route(layer, adapters, args, kwargs)
        if y is not None:
            return y
    raise AssertionError("the last route serves every call")


@functools.cache
def ways_of(cls: type[Adapter]) -> tuple[Callable[..., Any], ...]:
    """The routes that can serve one adapter of a class: the others ask for what only classes of their own define."""

    def defines(*names: str) -> bool:
        return any(inspect.getattr_static(cls, name) is not vars(Adapter)[name] for name in names)

    vain = {
        stand_in: not defines("stand_in"),
        by_kernel: not defines("kernel"),
        low_rank: cls.changes_input or not defines("factors", "training_factors"),
        folded: not defines("prefers_folding", "only_folds"),
    }
    return tuple(route for route in ROUTES if not vain.get(route))


@functools.cache
def only_adds(cls: type[Adapter]) -> bool:
    """Whether adapters of a class have factors, and no other way to act while they do."""
    return {stand_in, by_kernel, low_rank}.intersection(ways_of(cls)) == {low_rank}  # type: ignore[arg-type]


def input_first(layer: BaseTunerLayer, kwargs: Keywords) -> tuple[tuple, Keywords]:
    """A call by keywords, with the layer's input in first place: by its name in the base layer's forward, or ``x``."""
    own = next(iter(inspect.signature(layer.get_base_layer().forward).parameters), "x")
    for name in (own, "x", "input"):
        if name in kwargs:
            return (kwargs[name],), {other: value for other, value in kwargs.items() if other != name}
    raise TypeError(f"{type(layer).__name__} is called without its input: give it first, or by name, {own}=...")


def all_factors(
    layer: BaseTunerLayer, adapters: Adapters, x: torch.Tensor, trains: bool = False
) -> list[Factors] | None:
    """The factors of adapters, if all have them and the fused kernels can be used for this input.

    One for each adapter, or with ``trains`` as many as its :meth:`training_factors` are.
    """
    if not layer.kind.matrix or layer.kind.opaque or not x.is_floating_point():
        return None
    found: list[Factors] = []
    for adapter in adapters:
        if adapter.changes_input:
            return None
        if trains:
            parts = adapter.training_factors()
        else:
            factors = adapter.factors()
            parts = None if factors is None else (factors,)
        if parts is None or not (layer.cast_input_dtype_enabled or parts[0].down.dtype == x.dtype):
            return None
        found += parts
    return found


def other_dtype(layer: BaseTunerLayer, module: nn.Module) -> torch.dtype | None:
    """The base module's dtype where a module that stands in for it is held in another (a wider) one."""
    dtype = weights.dtype_of_module(layer.get_base_layer())
    return None if dtype is None or dtype == weights.dtype_of_module(module) else dtype


def attribute_of(layer: BaseTunerLayer, module: nn.Module, name: str) -> Any:
    """An attribute of a module that stands in, in the base module's dtype: the parent may compute with it itself."""
    value, dtype = getattr(module, name), other_dtype(layer, module)
    if dtype is not None and isinstance(value, nn.Module):
        return copy.deepcopy(value).to(dtype)  # the one that trains keeps its dtype
    return value if dtype is None else with_floats_in(dtype, value)


def with_floats_in(dtype: torch.dtype | None, value: Any) -> Any:
    """Floating-point tensors, also those in tuples, in a dtype."""
    if isinstance(value, tuple):
        return tuple(with_floats_in(dtype, part) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
