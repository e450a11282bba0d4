"""One switch for what makes training steps take less memory, whoever runs them: no trainer needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from peft.core.model.gradient_checkpointing import FUNCTION, Around, with_switch
from peft.core.model.record import drop_if_empty, known_record, record_of
from peft.core.model.walk import unreplicated
from peft.kernels.loss import chunked_loss, is_chunked, require_usual_loss
from peft.kernels.remake import recomputed
from peft.peft_model import PeftModelForCausalLM
from peft.tools.heap import Trimmed, can_trim


@dataclass(frozen=True)
class MemorySavings:
    """What :func:`enable_memory_savings` has switched on; its arguments say what each is."""

    recompute: bool
    checkpointing: bool
    offload: bool
    chunked_loss: bool
    trim: bool = False


def enable_memory_savings(
    model: nn.Module,
    *,
    recompute: bool = True,
    checkpointing: bool | None = None,
    offload: bool | None = None,
    chunked_loss: bool = False,
    trim: bool | None = None,
) -> MemorySavings:
    """Make the training steps of a model take less memory; losses and gradients stay what they are.

    What cannot be seen in any result is on unless said otherwise. It acts in calls of the model in training mode with
    gradients, whoever makes them: a ``Trainer``, DDP, a loop. Calls in evaluation mode, files and adapters that are
    added later are not touched. A second call takes the place of the first, :func:`disable_memory_savings` undoes it.
    What each part gives was measured: see "What each saving gives" on the page "Past one card". The optimizer's
    states are :func:`peft.optimizers.create_8bit_optimizer`'s.

    Args:
        model: any module, adapted or not: a PeftModel, a model of transformers with adapters of its own.
        recompute: what autograd would keep although it can be made again, bit for bit, by one pass over a tensor that
            is kept anyway (outputs of activations and of norms) is not kept.
        checkpointing: transformer blocks keep their inputs alone and are computed again in the backward pass, which
            takes about a third more time. None: if the model has such blocks.
        offload: those inputs wait in CPU memory. None: if the model is on an accelerator.
        chunked_loss: a causal LM computes its loss without the logits of the whole batch; the logits in the output of
            a training call are then the last token's, which is why it is off.
        trim: on a CPU, holes in the heap of C's library are given back to the system when the process has grown by
            half; they are often more than what is in use. None: with ``recompute``, which sees when, on glibc.

    Returns:
        What is on now.

    Raises:
        ValueError: if something is asked for that this model cannot do. Nothing is changed then.

    Examples:
        >>> enable_memory_savings(model, chunked_loss=True).checkpointing
        True
        >>> disable_memory_savings(model)
    """
    model, base = _models(model)
    switches = list(with_switch(base))
    if checkpointing and not switches:
        raise ValueError(
            f"{type(base).__name__} has no blocks that transformers could checkpoint: leave checkpointing=True out."
        )
    checkpointing = bool(switches) if checkpointing is None else checkpointing
    device = next((p.device.type for p in base.parameters()), "cpu")
    offload, trim = _offloads(offload, checkpointing, device), _trims(trim, recompute, device)
    if chunked_loss:
        require_usual_loss(base)
    disable_memory_savings(model)
    savings = MemorySavings(recompute, checkpointing, offload, chunked_loss, trim)
    record_of(base).savings = _Switched(savings, model, base, switches if checkpointing else [], device)
    return savings


def _offloads(offload: bool | None, checkpointing: bool, device: str) -> bool:
    able = checkpointing and device not in ("cpu", "meta")
    if offload and not able:
        why = "the model is in CPU memory already" if checkpointing else "checkpointing is off"
        raise ValueError(
            f"offload=True moves the inputs of checkpointed blocks to CPU memory, but {why}: leave it out."
        )
    return able if offload is None else offload


def _trims(trim: bool | None, recompute: bool, device: str) -> bool:
    able = recompute and device == "cpu" and can_trim()
    if trim and not able:
        why = "recompute is off" if not recompute else "the model is not on a CPU, or the C library is not glibc"
        raise ValueError(f"trim=True returns memory of the CPU's heap as recompute goes on, but {why}: leave it out.")
    return able if trim is None else trim


def disable_memory_savings(model: nn.Module) -> None:
    """Undo :func:`enable_memory_savings`: everything is as it was before. Without it, nothing happens."""
    _, base = _models(model)
    record = known_record(base)
    if record is not None and record.savings is not None:
        record.savings.undo()
        record.savings = None
        drop_if_empty(base)


def _models(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model without wrappers of several processes, and the base model in it."""
    model = unreplicated(model)
    return model, model.get_base_model() if hasattr(model, "get_base_model") else model


class _Switched:
    """The hooks of a model, around each of its training calls, and what is to be undone."""

    def __init__(
        self, savings: MemorySavings, model: nn.Module, base: nn.Module, switches: list[Any], device: str
    ) -> None:
        self.savings, self.open = savings, dict[int, list[ExitStack]]()
        self.watch = Trimmed() if savings.trim else None
        # such a model asks itself, so that a call may say otherwise
        self.asks = model if savings.chunked_loss and isinstance(model, PeftModelForCausalLM) else None
        self.changed: list[tuple[Any, list[str], dict[str, Any]]] = []  # module, attributes, those that it had
        for module in switches:
            function = getattr(module, FUNCTION, None) if module.gradient_checkpointing else None
            function = function or partial(checkpoint, use_reentrant=False)
            function = _OnHost(function, device) if savings.offload else function
            self._set(module, **{"gradient_checkpointing": True, FUNCTION: function})
        if self.asks is not None:
            self._set(self.asks, chunked_loss=True)
        self.handles = (
            base.register_forward_pre_hook(self.enter, with_kwargs=True),
            base.register_forward_hook(self.leave, always_call=True),
        )

    def _set(self, module: Any, **values: Any) -> None:
        self.changed.append((module, list(values), {k: v for k, v in vars(module).items() if k in values}))
        for name, value in values.items():
            setattr(module, name, value)

    def undo(self) -> None:
        """Remove the hooks, and give modules their attributes back."""
        for handle in self.handles:
            handle.remove()
        for module, names, before in self.changed:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(before)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook of the model: before a call."""
        if torch.compiler.is_compiling():
            return
        contexts = ExitStack()
        self.open.setdefault(get_ident(), []).append(contexts)  # replicas of DataParallel share the hooks
        if not (module.training and torch.is_grad_enabled()):
            return
        if self.savings.recompute:
            contexts.enter_context(recomputed(self.watch))
        chunks = self.savings.chunked_loss and self.asks is None and kwargs.get("labels") is not None
        if chunks and not is_chunked(module):
            contexts.enter_context(chunked_loss(module))

    def leave(self, *_: Any) -> None:
        """Hook of the model: after a call, also one that has failed."""
        if (contexts := self.open.get(get_ident())) and not torch.compiler.is_compiling():
            contexts.pop().close()


class _OnHost(Around):
    """A checkpointing function whose kept inputs wait in CPU memory."""

    def __init__(self, function: Callable, device: str) -> None:
        super().__init__(function)
        self.device = device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=True, device_type=self.device):
            return self.function(*args, **kwargs)
