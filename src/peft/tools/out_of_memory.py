"""What an error for want of memory says: what a step takes, by estimate, and what would take less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from peft.core.model.gradient_checkpointing import is_switched_on
from peft.core.model.walk import walk
from peft.tools.footprint import (
    OPTIMIZERS,
    activation_bytes,
    blocks_of,
    bytes_saved,
    device_of,
    meta_copy,
    on_meta,
    readable,
    stored_bytes,
)


_EXPLAINING: ContextVar[bool] = ContextVar("_EXPLAINING", default=False)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch has a class for accelerators, and a message for the CPU."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explain_out_of_memory(model: nn.Module) -> Iterator[None]:
    """In this context, errors for want of memory get a note: what a step takes, by estimate, and what would take less.

    The forward of an adapted model explains its own errors. This is for what it does not see: backward, optimizer, or
    a training as a whole::

        with peft.explain_out_of_memory(model):
            trainer.train()

    The figures are those of the last forward of ``model`` in the context. The errors stay what they are otherwise.

    Examples:
        >>> with explain_out_of_memory(model):
        ...     loss = model(**batch).loss
    """
    given: list[Any] = [(), {}]

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            given[:] = on_meta(args), on_meta(kwargs)  # their shapes, so that no batch is kept

    with model.register_forward_pre_hook(note, with_kwargs=True):
        try:
            yield
        except RuntimeError as error:
            add_way_out(error, model, *given)
            raise


def add_way_out(error: Exception, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Add the note of :func:`explain_out_of_memory` to the error of a forward with these arguments, or after it.

    Errors of other kinds, and those that have the note, stay as they are. It never raises, and needs no memory of the
    device that has none left.
    """
    if not _is_out_of_memory(error) or _EXPLAINING.get() or hasattr(error, "_has_way_out"):
        return  # the estimate itself is a forward
    token = _EXPLAINING.set(True)
    try:
        note = _way_out(model, args, kwargs)
    except Exception as failure:
        reason = str(failure).strip().splitlines()[:1]
        note = f"{_WAYS_OUT} (No figures: {type(failure).__name__}{': ' + reason[0] if reason else ''})"
    finally:
        _EXPLAINING.reset(token)
    error._has_way_out = True  # type: ignore[attr-defined]
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        error.args = (f"{error}\n{note}", *error.args[1:])


_WAYS_OUT = (
    "Out of memory. What helps: a smaller batch (with gradient_accumulation_steps to make up for it), gradient "
    "checkpointing (model.gradient_checkpointing_enable()), a base loaded in 4 bits "
    "(quantization_config=BitsAndBytesConfig(load_in_4bit=True))."
)


def _way_out(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str:
    device, copied = device_of(model), meta_copy(model)
    args, kwargs = on_meta(args), on_meta(kwargs)
    kwargs.pop("attention_mask", None)  # its values, which the model may look at, are of no account here
    on = is_switched_on(model)
    batch = next((t.shape[0] for t in [*args, *kwargs.values()] if isinstance(t, torch.Tensor) and t.dim()), 1)
    now = activation_bytes(copied, args, kwargs, on, device)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    lines = [
        f"Out of memory with a batch of {batch}. A training step is estimated at {readable(stored_bytes(model))} for "
        f"weights, {readable(trained)} for gradients, {readable(OPTIMIZERS['adamw'] * trained)} for AdamW's states "
        f"and {readable(now)} for activations (peft.estimate_memory). What helps:"
    ]
    if batch > 1:
        half, (less, fewer) = batch // 2, _first(args, kwargs, batch, batch // 2)
        left = readable(activation_bytes(meta_copy(model), less, fewer, on, device))
        lines.append(f"- a smaller batch: {half} takes {left} of activations; gradient_accumulation_steps makes up")
    if not on and blocks_of(model):
        left = readable(activation_bytes(meta_copy(model), args, kwargs, True, device))
        lines.append(f"- gradient checkpointing, model.gradient_checkpointing_enable(): {left} of activations")
    saved = sum(bytes_saved(site, model, 4) for site in walk(model))
    if saved > 0:
        left = readable(stored_bytes(model) - saved)
        lines.append(
            f"- a base loaded in 4 bits, quantization_config=BitsAndBytesConfig(load_in_4bit=True): {left} of weights"
        )
    return "\n".join(lines)


def _first(args: tuple, kwargs: dict[str, Any], batch: int, count: int) -> tuple[tuple, dict[str, Any]]:
    """Only the first samples of the tensors that have one entry for each sample."""

    def cut(value: Any) -> Any:
        sliced = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch
        return value[:count] if sliced else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
