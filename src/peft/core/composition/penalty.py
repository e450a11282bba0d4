"""The term that fusions have in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft.core.composition.expressions import Fuse
from peft.core.layer.composed import Fused
from peft.core.model.record import context_of
from peft.core.model.walk import layers_of


def penalty(model: nn.Module, active: Sequence[str]) -> torch.Tensor | None:
    """The sum of regularization * (V - I)^2 over the fusions that act in a call, None without one.

    Args:
        model: the base model, with the adapters in it. active: its active adapters, for calls that name none.
    """
    context = context_of(model)
    acting = context.behind(context.adapter_names or active)
    fusions = {
        name: x for name in acting if isinstance(x := context.compositions.get(name), Fuse) and x.regularization
    }
    total = None
    for _, layer in layers_of(model) if fusions else ():
        for name, fuse in fusions.items():
            fused = layer.adapters.get(name)
            if isinstance(fused, Fused) and not layer.disable_adapters:
                for attention in fused.fusion.values():
                    term = fuse.regularization * attention.penalty()
                    total = term if total is None else total + term.to(total)
    return total


def with_penalty(model: nn.Module, active: Sequence[str], outputs: Any) -> Any:
    """The outputs of a training call; a loss among them has the term of the fusions in it."""
    loss = getattr(outputs, "loss", None)
    if context_of(model).compositions and model.training and isinstance(loss, torch.Tensor):
        term = penalty(model, active)
        if term is not None:
            outputs.loss = loss + term.to(loss)
    return outputs
