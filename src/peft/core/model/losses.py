"""What adapters add to the loss of a call: methods with a term of their own, and fusions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft.core.adapter import Adapter
from peft.core.model.record import known_record
from peft.core.model.walk import layers_of


def adds_to_loss(adapter_cls: type[Adapter]) -> bool:
    """Whether the adapters of a method may add something to the loss."""
    return adapter_cls.loss_term is not Adapter.loss_term


def extra_loss(model: nn.Module, configs: Mapping[str, Any], active: list[str]) -> torch.Tensor | None:
    """The sum of the terms of all adapters that act in a call, the members of compositions too; None without one.

    Args:
        model: the base model, with the adapters in it. configs: of its adapters, by their names.
        active: its active adapters, for calls that name none.
    """
    record = known_record(model)
    context = None if record is None else record.context
    acting = active if context is None else context.behind(context.adapter_names or active)
    found: dict[tuple[str, str], list[Adapter]] = {}  # by name, and the field that weighs their terms
    for _, layer in layers_of(model):
        for name in () if layer.disable_adapters else acting:
            adapter = layer.adapters.get(name)
            if adapter is not None and adds_to_loss(type(adapter)):
                found.setdefault((name, adapter.loss_weight), []).append(adapter)
    total = None
    for (name, field), adapters in found.items():
        # of an adapter of several methods, the config of the one that has such a field
        weight = next(getattr(c, field) for c in configs[name].members if hasattr(c, field)) if field else 1.0
        terms = [term for x in adapters if (term := x.loss_term()) is not None] if weight else []
        if terms:
            term = sum(term.to(terms[0]) for term in terms[1:]) + terms[0]  # layers may be on different devices
            term = weight * term / len(terms) if field else term
            total = term if total is None else total + term.to(total)
    return total
