"""A call like most, in training and while text is generated: one adapter, nothing out of the ordinary.

For one token a layer's arithmetic is so short that what is asked before it counts: the routes ask fifty questions in
as many functions, of objects that the weights of other layers have pushed out of the processor's cache. Here the same
is asked in one place and in the fewest steps. What is not as expected goes to the routes, which give the same.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft.core.adapter import Adapter
from peft.core.base.kinds import Kind, Linear
from peft.core.base.storage import Plain, Storage, storage_of
from peft.core.layer.routes import all_factors, only_adds
from peft.kernels.linear import Factors, are_few, in_step, inferred, is_eager
from peft.kernels.strict import is_plain


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer


def lean(layer: BaseTunerLayer, x: torch.Tensor) -> torch.Tensor | None:
    """The layer's output for ``x``, None where the routes have to give it.

    Of tensors nothing is kept from call to call: they may be replaced, or change in ways that leave no trace
    (``p.data.copy_``), at any time.
    """
    trains = torch.is_grad_enabled()
    if torch._C._is_any_autocast_enabled() or not is_eager(x) or is_plain():
        return None
    state, active = layer.__dict__, layer._active_adapter
    context, seen = state["context"], state.get("_seen")
    if len(active) != 1 or state["_disable_adapters"] or state["merged_adapters"]:
        return None
    if context.adapter_names is not None or context.current is not None:
        return None
    if seen is not None and (y := seen.output(layer, active[0], x, trains)) is not None:
        return y
    adapter = state["adapters"].get(active[0])
    if adapter is None or not only_adds(type(adapter)):  # type: ignore[arg-type]
        return None
    base, known = state["_modules"]["base_layer"], state["_storage"]
    if type(base) is not nn.Linear or known is None or not known.own:
        return None
    weight = known.storage.direct_weight(base, "weight", frozen=False)
    if weight is None or hasattr(weight, "ds_id") or weight.dtype is not x.dtype or weight.device != x.device:
        return None
    factors, bias = all_factors(layer, (adapter,), x, trains), base._parameters.get("bias")
    if factors is None:
        return None
    drops = bool(factors[0].dropout)
    state["_seen"] = Seen.of(layer, adapter) if adapter.held_in is not None and (trains or not drops) else None
    if trains:
        return in_step(x, weight, bias, factors, partial(context.readers.share, layer, x, factors))
    return inferred(x, weight, bias, factors, drops and are_few(x, factors))


_BIASES = (nn.Parameter, type(None))


class Seen(NamedTuple):
    """The modules of a layer that takes the short way, as they were in the last call.

    To ask whether they are the same is less than to find them again, and reads a third of the memory. It is one flat
    record for the same reason. Copies and pickles have none.

    Attributes:
        hooks: the number of the next hook of any module: while no hook has come, none has come to these.
        own: the base layer's dict. names: the adapter's ``held_in``. a, b, drop: A, B and the dropout.
        box_a, in_a, of_a: what the layer has by the first of the names, the dict of modules in that, A's own dict.
        of_drop: None where the dropout cannot act.
    """

    hooks: int
    base: nn.Module
    own: dict[str, Any]
    names: tuple[str, str, str, str]
    box_a: nn.Module
    in_a: dict[str, Any]
    a: nn.Module
    of_a: dict[str, Any]
    box_b: nn.Module
    in_b: dict[str, Any]
    b: nn.Module
    of_b: dict[str, Any]
    box_drop: nn.Module
    in_drop: dict[str, Any]
    drop: nn.Module
    of_drop: dict[str, Any] | None

    @classmethod
    def of(cls, layer: BaseTunerLayer, adapter: Adapter) -> Seen:
        """What is seen in a layer on the short way; no dropout acts there without autograd."""
        assert adapter.held_in is not None
        parts: list[Any] = []
        for name in adapter.held_in[:3]:
            box: Any = layer._modules[name]
            module = box._modules[adapter.name]
            parts += [box, box._modules, module, None if type(module) is nn.Identity else module.__dict__]
        base: Any = layer._modules["base_layer"]
        return cls(RemovableHandle.next_id, base, base.__dict__, adapter.held_in, *parts)

    def output(self, layer: BaseTunerLayer, name: str, x: torch.Tensor, trains: bool) -> torch.Tensor | None:
        """The layer's output while all of it is still so, None otherwise.

        Args:
            trains: autograd records the call.
        """
        hooks, base, own, names, box_a, in_a, a, of_a, box_b, in_b, b, of_b, box_drop, in_drop, drop, of_drop = self
        state = layer.__dict__
        modules = state["_modules"]
        if hooks != RemovableHandle.next_id or modules["base_layer"] is not base or type(base) is not nn.Linear:
            return None
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return None
        if trains and (own["_backward_hooks"] or own["_backward_pre_hooks"]):
            return None
        if in_a.get(name) is not a or in_b.get(name) is not b or in_drop.get(name) is not drop:
            return None
        if modules[names[0]] is not box_a or modules[names[1]] is not box_b or modules[names[2]] is not box_drop:
            return None
        if "forward" in own or "forward" in of_a or "forward" in of_b:
            return None
        rate = 0.0
        if of_drop is not None:
            rate = of_drop["p"] if of_drop["training"] else 0.0
            if "forward" in of_drop or (rate and not (trains and rate < 1)):
                return None
        tensors, others = own["_parameters"], of_b["_parameters"]
        weight, bias = tensors.get("weight"), tensors.get("bias")
        down, up = of_a["_parameters"].get("weight"), others.get("weight")
        if not (type(weight) is type(down) is type(up) is nn.Parameter) or type(bias) not in _BIASES:
            return None
        if weight.dtype is not x.dtype or weight.device != x.device or others["bias"] is not None:
            return None
        if isinstance(scale := state[names[3]][name], torch.Tensor):
            return None
        if down.dtype is not x.dtype and not state["cast_input_dtype_enabled"]:
            return None
        factors = (Factors(down, up, scale, rate),)
        if trains:
            return in_step(x, weight, bias, factors, partial(state["context"].readers.share, layer, x, factors))
        return inferred(x, weight, bias, factors)

    def __reduce__(self) -> Any:
        return type(None), ()


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
