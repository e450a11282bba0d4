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
    found: dict[tuple[str, str], list[torch.Tensor]] = {}  # by adapter, and the field that weighs its terms
    for _, layer in layers_of(model):
        for name in () if layer.disable_adapters else acting:
            adapter = layer.adapters.get(name)
            if adapter is not None and adds_to_loss(type(adapter)):
                term = adapter.loss_term() if _weight(configs, name, adapter.loss_weight) else None
                if term is not None:
                    found.setdefault((name, adapter.loss_weight), []).append(term)
    total = None
    for (name, field), terms in found.items():
        term = sum(term.to(terms[0]) for term in terms[1:]) + terms[0]  # layers may be on different devices
        if field:
            term = _weight(configs, name, field) * term / len(terms)
        total = term if total is None else total + term.to(total)
    return total


def _weight(configs: Mapping[str, Any], name: str, field: str) -> float:
    """What the config of an adapter, or of the one of its methods that has such a field, weighs its terms with."""
    return getattr(next(config for config in configs[name].members if hasattr(config, field)), field) if field else 1.0
