"""A batch whose rows use different adapters: how it is split, and how its parts are put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function

from peft.core.base.rows import joined, rows_of
from peft.core.layer.composed import in_order, made_of
from peft.core.layer.parallel import several_processes, team_of
from peft.core.layer.rewritten import refuse_several_bases
from peft.core.layer.routes import adapted, all_factors
from peft.core.model.context import Groups
from peft.kernels.grouped import can_group, grouped_linear
from peft.kernels.strict import is_plain


if TYPE_CHECKING:
    from peft.core.adapter import Adapter
    from peft.core.layer.layer import BaseTunerLayer


def mixed(layer: BaseTunerLayer, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The layer's output where each row of the batch has its own adapter; one that is not here does nothing.

    Where several processes train, the adapters of no row here get gradients of zero: other processes may have rows of
    theirs, and would wait for this one.
    """
    y = _mixed(layer, names, args, kwargs)
    if not (isinstance(y, torch.Tensor) and torch.is_grad_enabled() and several_processes()):
        return y
    absent = [adapter for name, adapter in layer.adapters.items() if name not in names]
    waiting = [p for adapter in absent for p in adapter.parameters() if p.requires_grad]
    return _Touched.apply(y, *waiting) if waiting else y


class _Touched(Function):
    """A tensor as it is, which parameters take part in without an effect."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return gradient, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def _mixed(layer: BaseTunerLayer, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
    require_unmerged(layer)
    refuse_several_bases(layer, names)
    kind, base = layer.kind, layer.get_base_layer()
    first = args[0] if args else next(iter(kwargs.values()))
    axis = kind.batch_axis(base)
    if first.shape[axis] == 1 and len(names) > 1 and args:  # a row that the samples share, such as positions
        first = first.expand(*[len(names) if a == axis else -1 for a in range(first.dim())])
        args = (first, *args[1:])
    groups = layer.context.groups(names, first.shape[axis], first.device)
    if len(groups.parts) == 1:
        return _of_one(layer, groups.parts[0][0], args, kwargs)
    adapters = [made_of(layer, name) for name, _ in groups.parts]
    here = [adapter for adapter in adapters if adapter is not None]
    if not here and not kind.companions:
        return layer.base_layer(*args, **kwargs)
    alone = kind.opaque or kind.whole or axis or team_of(layer, first) is not None
    if not alone and len(args) == 1 and not kwargs and not is_plain():
        y = _grouped(layer, groups, adapters, args[0])
        if y is not None:
            return y
    apart = alone or any(adapter.only_folds() or adapter.stand_in() is not None for adapter in here)
    if not apart and here and all(adapter.prefers_folding() for adapter in here):
        apart = layer.may_bypass_base(first)
    if apart:
        return layer.context.split(groups, kind, base, args, kwargs, partial(_of_one, layer))
    return _updates(layer, groups, adapters, args, kwargs)


def require_unmerged(layer: BaseTunerLayer) -> None:
    """Raise ValueError where adapters are merged: they would act on every row."""
    if layer.merged_adapters:
        raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first.")


class _FastPath:
    """Torch's switch, one for all threads: how many mixed calls are under way, and whether it was on before them."""

    lock = Lock()
    was_on = True
    calls = 0


@contextmanager
def without_fast_path() -> Iterator[None]:
    """While a mixed call is computed: ``nn.TransformerEncoder`` would take one weight for all rows.

    The switch is one for all threads, so the first of several calls turns it off and the last one back.
    """
    switch = torch.backends.mha
    with _FastPath.lock:
        if not _FastPath.calls:
            _FastPath.was_on = switch.get_fastpath_enabled()
            switch.set_fastpath_enabled(False)
        _FastPath.calls += 1
    try:
        yield
    finally:
        with _FastPath.lock:
            _FastPath.calls -= 1
            if not _FastPath.calls:
                switch.set_fastpath_enabled(_FastPath.was_on)


def _of_one(layer: BaseTunerLayer, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The call with one adapter, also in layers whose weight the base layer reads."""
    with layer.context.only(name):
        if (adapter := made_of(layer, name)) is not None:
            return adapted(layer, in_order([adapter]), args, kwargs)
        return layer.base_layer(*args, **kwargs)


def _grouped(
    layer: BaseTunerLayer, groups: Groups, adapters: Sequence[Adapter | None], x: torch.Tensor
) -> torch.Tensor | None:
    """By one product with the stacked factors of all adapters, where all have some."""
    found = all_factors(layer, [adapter for adapter in adapters if adapter is not None], x)
    if found is None:
        return None
    left = iter(found)
    factors = [None if adapter is None else next(left) for adapter in adapters]
    if not can_group(x, factors):
        return None
    weight = layer.bypass_matrix(x)
    base, fresh = layer._modules["base_layer"], weight is None and layer.base_is_fresh()
    owner = layer if layer.context.common.pooled else None
    return grouped_linear(owner, base, x, groups.index, factors, weight, fresh)


def _updates(
    layer: BaseTunerLayer, groups: Groups, adapters: Sequence[Adapter | None], args: tuple, kwargs: dict[str, Any]
) -> torch.Tensor:
    """One call of the base layer for all rows, and what each adapter makes of its own."""
    x, *rest = args
    owned = [rows_of(x, rows) for _, rows in groups.parts]
    inner = x
    if any(adapter is not None and adapter.changes_input for adapter in adapters):
        turned = [
            part if adapter is None else adapter.input(adapter.cast(part)).to(x.dtype)
            for adapter, part in zip(adapters, owned)
        ]
        inner = joined(turned, groups.order)
    base_y = layer.base_layer(inner, *rest, **kwargs)
    parts = []
    for adapter, own, (_, rows) in zip(adapters, owned, groups.parts):
        part = rows_of(base_y, rows)
        if adapter is not None:
            with layer.context.on_rows(rows, len(x)):
                part = adapter.output(adapter.cast(own), part, part).to(base_y.dtype)
        parts.append(part)
    return joined(parts, groups.order)
