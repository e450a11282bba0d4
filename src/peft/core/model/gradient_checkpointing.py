"""Gradient checkpointing: its reentrant form needs inputs that require grad, which a frozen embedding never gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.record import drop_if_empty, known_record, record_of
from peft.core.model.walk import embeddings_of


class InputGrads:
    """A forward hook of the input embedding: while reentrant checkpointing is on, its output requires grad.

    So do ``inputs_embeds`` that the model is called with (:meth:`from_embeddings`, a hook of the model). It looks at
    the model's own switches in every call, so it does not matter when, or by whom, they are turned.
    """

    def __init__(self, model: nn.Module) -> None:
        self.switches = list(_with_switch(model))

    def needed(self) -> bool:
        """Whether some block recomputes its forward in the reentrant way."""
        if not torch.is_grad_enabled():
            return False
        for module in self.switches:
            if module.gradient_checkpointing and module.training:
                function = getattr(module, "_gradient_checkpointing_func", None)
                return getattr(function, "keywords", {}).get("use_reentrant", True)
        return False

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, torch.Tensor) and not output.requires_grad and self.needed():
            output.requires_grad_(True)
        return output

    def from_embeddings(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The model's call, with ``inputs_embeds`` that require grad where needed; the caller's tensor does not."""
        embeds = kwargs.get("inputs_embeds")
        if isinstance(embeds, torch.Tensor) and not embeds.requires_grad and self.needed():
            kwargs = {**kwargs, "inputs_embeds": embeds.detach().requires_grad_()}
        return args, kwargs


def _with_switch(model: nn.Module) -> Iterator[Any]:
    """The modules that have a switch for gradient checkpointing."""
    name, seen, classes, stack = "gradient_checkpointing", set(), {}, [model]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        cls = type(module)
        if cls not in classes:
            classes[cls] = hasattr(cls, name)
        if classes[cls] or name in module.__dict__:
            yield module
        if isinstance(module, BaseTunerLayer) and not module.adapter_cls.any_module:  # pairs and vectors have none
            stack.append(module.base_layer)
        elif module._modules:
            stack += [child for child in module._modules.values() if child is not None]


def is_switched_on(model: nn.Module) -> bool:
    """Whether gradient checkpointing is switched on in some block."""
    return any(module.gradient_checkpointing for module in _with_switch(model))


def watch_checkpointing(model: nn.Module) -> None:
    """Install the hooks on a transformers model, once."""
    embedding = embeddings_of(model)[0]
    if embedding is None or record_of(model).checkpointing is not None:
        return
    watch = InputGrads(model)
    hooks = (
        embedding.register_forward_hook(watch),
        model.register_forward_pre_hook(watch.from_embeddings, with_kwargs=True),
    )
    record_of(model).checkpointing = watch, hooks


def stop_watching(model: nn.Module) -> None:
    """Remove the hooks."""
    record = known_record(model)
    if record is not None and record.checkpointing is not None:
        for hook in record.checkpointing[1]:
            hook.remove()
        record.checkpointing = None
        drop_if_empty(model)
