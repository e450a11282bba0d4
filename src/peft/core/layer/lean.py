"""A call like most while text is generated: one adapter, no gradients, nothing out of the ordinary.

For one token a layer's arithmetic is so short that what is asked before it counts: the routes ask fifty questions in
as many functions, of objects that the weights of other layers have pushed out of the processor's cache. Here the same
is asked in one place and in the fewest steps. What is not as expected goes to the routes, which give the same.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from peft.core.adapter import Adapter
from peft.core.base.kinds import Kind, Linear
from peft.core.base.storage import Plain, Storage, storage_of
from peft.kernels.linear import inferred, is_eager, is_hooked
from peft.kernels.strict import is_plain


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer


def lean(layer: BaseTunerLayer, x: torch.Tensor) -> torch.Tensor | None:
    """The layer's output for ``x``, None where the routes have to give it.

    Nothing is kept from call to call but what classes say: tensors may be replaced, or changed in ways that leave no
    trace (``p.data.copy_``), and modules get hooks, at any time.
    """
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled() or not is_eager(x) or is_plain():
        return None
    state, active = layer.__dict__, layer._active_adapter
    context, storage = state["context"], state["_storage"]
    if len(active) != 1 or state["_disable_adapters"] or state["merged_adapters"]:
        return None
    if context.adapter_names is not None or context.current is not None:
        return None
    adapter = state["adapters"].get(active[0])
    if adapter is None or not _only_adds(type(adapter)):  # type: ignore[arg-type]
        return None
    # what BaseTunerLayer.bypass_matrix asks, of a linear layer of torch's own
    base: nn.Module = state["_modules"]["base_layer"]
    if type(base) is not nn.Linear or storage is None or not storage.own or is_hooked(base):
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        return None
    if type(bias) not in (nn.Parameter, type(None)) or weight.dtype is not x.dtype or weight.device != x.device:
        return None
    factors = adapter.factors()
    if factors is None or not (factors.down.dtype is x.dtype or state["cast_input_dtype_enabled"]):
        return None
    return inferred(x, weight, bias, (factors,))


class Noted(NamedTuple):
    """How the base weight of a layer was kept when it was last asked.

    Attributes:
        key: what that depended on. own: a linear layer of torch's own computes with it as it stands.
    """

    key: tuple
    storage: Storage
    own: bool


def noted(kind: Kind, key: tuple, base: nn.Module) -> Noted:
    """What to note of a base layer with this :func:`storage_key`."""
    storage = storage_of(base, kind.weight)
    return Noted(key, storage, key == _OWN and type(storage) is Plain and type(kind) is Linear)


_OWN = (nn.Linear, nn.Parameter, None, False, 0)


@functools.cache
def _only_adds(cls: Any) -> bool:
    """Whether adapters of a class have factors, and no other way to act while they do."""
    kernel = cls.kernel.__func__ is not Adapter.kernel.__func__  # type: ignore[attr-defined]
    own = kernel or cls.stand_in is not Adapter.stand_in or cls.changes_input
    return not own and cls.factors is not Adapter.factors
