"""Gradient checkpointing: its reentrant form needs inputs that require grad, which a frozen embedding never gives.

And what a block recomputes belongs to the call that it was a part of, though the model may have been called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.context import Context
from peft.core.model.record import drop_if_empty, known_record, record_of
from peft.core.model.walk import embeddings_of


FUNCTION = "_gradient_checkpointing_func"
"""The attribute of a block that holds what recomputes it: ``function(block's forward, *arguments)``."""


class Around:
    """A checkpointing function in the place of another one, which it calls: ``function(block's forward, ...)``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @property
    def keywords(self) -> dict[str, Any]:
        """As a partial function has them: ``use_reentrant`` and its like."""
        return getattr(self.function, "keywords", {})


class Repeated(Around):
    """A checkpointing function whose recomputation reads the facts of the call that it repeats.

    Two calls may come before one backward pass (a chosen and a rejected answer); each block then recomputes with the
    tokens, adapters and tasks of its own call.
    """

    def __init__(self, function: Callable[..., Any], context: Context) -> None:
        super().__init__(function)
        self.context = context

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        facts = None if torch.compiler.is_compiling() else self.context.noted()
        if facts is None:
            return self.function(run, *args, **kwargs)

        def again(*args: Any, **kwargs: Any) -> Any:
            with self.context.as_noted(facts):
                return run(*args, **kwargs)

        return self.function(again, *args, **kwargs)


class InputGrads:
    """A forward hook of the input embedding: while reentrant checkpointing is on, its output requires grad.

    So do ``inputs_embeds`` that the model is called with (:meth:`from_embeddings`, a hook of the model). It looks at
    the model's own switches in every call, so it does not matter when, or by whom, they are turned.
    """

    def __init__(self, model: nn.Module) -> None:
        self.switches = list(with_switch(model))

    def needed(self) -> bool:
        """Whether some block recomputes its forward in the reentrant way."""
        if not torch.is_grad_enabled():
            return False
        return any(
            module.gradient_checkpointing and module.training and is_reentrant(module) for module in self.switches
        )

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

    def repeat(self, module: nn.Module, args: tuple) -> None:
        """Hook of the model: have what is recomputed of this call read its facts."""
        context = record_of(module).context
        if context is None or not torch.is_grad_enabled():
            return
        for block in self.switches:
            function = block.__dict__.get(FUNCTION)
            if function is not None and not isinstance(function, Repeated):
                setattr(block, FUNCTION, Repeated(function, context))


def with_switch(model: nn.Module) -> Iterator[Any]:
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


def is_reentrant(block: nn.Module) -> bool:
    """Whether a block is recomputed in the reentrant way, if it is: torch's own default."""
    return getattr(getattr(block, FUNCTION, None), "keywords", {}).get("use_reentrant", True)


def switched_on(model: nn.Module) -> Iterator[Any]:
    """The modules in which gradient checkpointing is switched on."""
    return (module for module in with_switch(model) if module.gradient_checkpointing)


def is_switched_on(model: nn.Module) -> bool:
    """Whether gradient checkpointing is switched on in some block."""
    return next(switched_on(model), None) is not None


def watch_checkpointing(model: nn.Module) -> None:
    """Install the hooks on a transformers model, once."""
    embedding = embeddings_of(model)[0]
    if embedding is None or record_of(model).checkpointing is not None:
        return
    watch = InputGrads(model)
    hooks = (
        embedding.register_forward_hook(watch),
        model.register_forward_pre_hook(watch.from_embeddings, with_kwargs=True),
        model.register_forward_pre_hook(watch.repeat),
    )
    record_of(model).checkpointing = watch, hooks


def stop_watching(model: nn.Module) -> None:
    """Remove the hooks."""
    record = known_record(model)
    if record is not None and record.checkpointing is not None:
        for hook in record.checkpointing[1]:
            hook.remove()
        for block in record.checkpointing[0].switches:
            if isinstance(function := block.__dict__.get(FUNCTION), Repeated):
                setattr(block, FUNCTION, function.function)
        record.checkpointing = None
        drop_if_empty(model)
