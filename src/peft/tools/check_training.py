"""Why a loss does not fall: what can be seen in a model, its optimizer, and one forward and backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft.core.files.entries import prompts_of
from peft.core.model.gradient_checkpointing import FUNCTION, is_reentrant
from peft.core.model.walk import layers_of, wrappers_of
from peft.errors import PeftWarning, some
from peft.meanwhile import having, in_mode
from peft.tools.status import count_parameters


LOW_LEARNING_RATE = 5e-5
"""At or below this, a learning rate is one for training all weights; adapters take 1e-4 to 1e-2."""
SMALL_SHARE = 0.1
"""A model of which less than this trains is trained by adapters."""
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Finding:
    """One reason why training does not get on.

    Attributes:
        code: a short name for the kind of trouble, such as ``"nothing_trains"``.
        message: what is so. advice: what to do.
    """

    code: str
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message} {self.advice}"


def check_training(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> list[Finding]:
    """Look for what keeps a model's loss from falling. An empty list means that nothing was found.

    With a batch, one forward and backward pass is run in training mode; gradients, buffers, modes and random states
    are put back. Without, only what can be seen at rest is reported.

    Args:
        model: a model with adapters.
        batch: keyword arguments of the model's forward, on its device, with labels.
        optimizer: the optimizer of the training, made already.
        learning_rate: its highest rate, where there is no optimizer yet.
        loss: output of the model -> loss, for models whose output has none.

    Raises:
        ValueError: for a batch whose output has no loss.

    Examples:
        >>> for finding in check_training(model, batch, learning_rate=2e-5):
        ...     print(finding.code)
        low_learning_rate
    """
    found = [*_at_rest(model), *_of_optimizer(model, optimizer, learning_rate)]
    if batch is not None:
        found += _of_labels(batch)
        found += _of_step(model, batch, loss, any(f.code == "nothing_trains" for f in found))
    return found


def tell_untrained(model: nn.Module, output: Any) -> None:
    """Warn of the loss of a training call that has no gradient, where that is because of the adapters; and say why."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor) and torch.is_grad_enabled() and not loss.requires_grad:
        for finding in _at_rest(model):
            if finding.code in ("nothing_trains", "adapter_merged"):
                warnings.warn(f"this loss has no gradient. {finding.message} {finding.advice}", PeftWarning)


# --- at rest --------------------------------------------------------------------------------------------------


def _holders_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What holds parameters of adapters, by its path: layers and wrappers in the model, and prompts beside it."""
    yield from wrappers_of(model)
    if (prompts := prompts_of(model)) is not None:
        yield "prompt_encoder", prompts


def _acting(holder: Any) -> list[str]:
    """The active adapters, and those that they are made of."""
    context = getattr(holder, "context", None)
    return holder.active_adapters if context is None else context.behind(holder.active_adapters)


def _at_rest(model: nn.Module) -> Iterator[Finding]:
    holders, layers = list(_holders_of(model)), list(layers_of(model))
    if not any(p.requires_grad for p in model.parameters()):
        yield Finding(
            "nothing_trains",
            "No parameter requires grad, so no step changes anything.",
            "A loaded adapter is frozen unless PeftModel.from_pretrained(..., is_trainable=True) says otherwise, and "
            "one whose config has inference_mode=True stays so; model.set_adapter(name) makes one train.",
        )
    if disabled := [path for path, holder in holders if holder.disable_adapters]:
        yield Finding(
            "adapter_disabled",
            f"The adapters are switched off in {some(disabled, 3)}, so the model computes without them.",
            "Switch them on with model.enable_adapter_layers().",
        )
    if merged := [path for path, layer in layers if layer.merged]:
        yield Finding(
            "adapter_merged",
            f"Adapters are merged in {some(merged, 3)}: their parameters take no part in the forward.",
            "Take them out with model.unmerge_adapter().",
        )
    idle = {name for _, holder in holders for name in holder.adapter_names if _trains(holder, name)}
    idle -= {name for _, holder in holders for name in _acting(holder)}
    if idle:
        yield Finding(
            "adapter_inactive",
            f"The parameters of {sorted(idle)} require grad, but these adapters are not active.",
            "Activate what you train with model.set_adapter(name).",
        )


def _trains(holder: Any, name: str) -> bool:
    return any(p.requires_grad for p in holder.adapter_parameters(name))


# --- optimizer and labels -------------------------------------------------------------------------------------


def _of_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, learning_rate: float | None
) -> Iterator[Finding]:
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing := [name for key, name in trained.items() if key not in held]:
            yield Finding(
                "not_in_optimizer",
                f"The optimizer does not hold {some(missing, 3)}, which require grad.",
                "Make the optimizer after the adapters, from [p for p in model.parameters() if p.requires_grad].",
            )
        rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        learning_rate = max(map(float, rates)) if learning_rate is None else learning_rate
    if learning_rate is None or not trained:
        return
    share = count_parameters(model)[0] / max(1, count_parameters(model)[1])
    if learning_rate <= LOW_LEARNING_RATE and share < SMALL_SHARE and any(True for _ in _holders_of(model)):
        yield Finding(
            "low_learning_rate",
            f"A learning rate of {learning_rate:g} is one for training all weights; {100 * share:.2g} % train here.",
            "Adapters take larger steps: 1e-4 to 5e-4 is usual for low-rank updates, 1e-3 to 1e-2 for vectors of "
            "scales and for prompts.",
        )


def _of_labels(batch: Mapping[str, Any]) -> Iterator[Finding]:
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.numel() == 0:
        return
    used = labels != IGNORED_LABEL
    rows = int((~used.flatten(1).any(1)).sum()) if labels.dim() > 1 else int((~used).sum())
    if rows:
        all_of = "All labels of the batch" if not used.any() else f"All labels of {rows} of {len(labels)} samples"
        yield Finding(
            "labels_masked",
            f"{all_of} are {IGNORED_LABEL}, which the loss leaves out.",
            "See whether the answer was cut off by max_length, or whether the collator masks it as it masks padding "
            "(where the padding token is the end-of-text token).",
        )


# --- one step -------------------------------------------------------------------------------------------------


def _of_step(
    model: nn.Module, batch: Mapping[str, Any], loss: Callable[[Any], torch.Tensor] | None, frozen: bool
) -> list[Finding]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _untouched(model), _starved_blocks(model) as starved:
        output = model(**batch)
        value = loss(output) if loss is not None else getattr(output, "loss", None)
        if value is None:
            raise ValueError(
                f"the output of {type(model).__name__} has no loss. Give the batch labels, or a function: "
                "check_training(model, batch, loss=lambda output: ...)."
            )
        with having(trained.values(), grad=None):
            if value.requires_grad:
                value.backward()  # torch.autograd.grad does not see into reentrant checkpoints
            grads = [p.grad for p in trained.values()]
    found = []
    if not value.isfinite().all():
        found.append(
            Finding(
                "loss_not_finite",
                f"The loss is {value.item() if value.numel() == 1 else 'not finite'}.",
                "Look at the labels and the learning rate; float16 needs autocast and a gradient scaler, or bfloat16.",
            )
        )
    if starved and trained:
        found.append(
            Finding(
                "checkpointing_without_grad",
                f"Gradient checkpointing is on in its reentrant form, and the inputs of {some(starved, 3)} do not "
                "require grad, so nothing inside gets a gradient.",
                "Call model.enable_input_require_grads(), or gradient_checkpointing_enable("
                "gradient_checkpointing_kwargs={'use_reentrant': False}).",
            )
        )
    if frozen:
        return found
    owners = {id(p): path for path, w in _holders_of(model) for n in w.adapter_names for p in w.adapter_parameters(n)}
    pairs = [(owners.get(id(p), name), grad) for (name, p), grad in zip(trained.items(), grads)]
    return [*found, *_of_gradients(pairs)]


def _of_gradients(grads: list[tuple[str, torch.Tensor | None]]) -> Iterator[Finding]:
    """What the gradients of (layer, gradient) say, by layer: a factor has none to begin with where another is zero."""
    none: dict[str, bool] = {}
    zero: dict[str, bool] = {}
    for layer, grad in grads:
        none[layer] = none.get(layer, True) and grad is None
        zero[layer] = zero.get(layer, True) and (grad is None or not bool(grad.any()))
    unused = [layer for layer, missing in none.items() if missing]
    if unused:
        what = (
            "No trained parameter gets" if len(unused) == len(none) else f"The parameters of {some(unused, 3)} get no"
        )
        yield Finding(
            "no_gradients",
            f"{what}{' a' if len(unused) == len(none) else ''} gradient: the loss does not depend on them.",
            "The adapter may be inactive, the layer may not be used in this forward, or a torch.no_grad() or detach() "
            "lies between it and the loss.",
        )
    still = [layer for layer, nothing in zero.items() if nothing and layer not in unused]
    if still:
        yield Finding(
            "zero_gradients",
            f"All gradients are zero in {some(still, 3)}.",
            "See whether labels are masked, whether all factors of the adapter were set to zero, and whether float16 "
            "lets small gradients vanish.",
        )


@contextmanager
def _starved_blocks(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules under reentrant checkpointing that are called with inputs that require no grad."""
    starved: list[str] = []

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if inputs and name not in starved and not any(t.requires_grad for t in inputs):
                starved.append(name)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if getattr(module, "gradient_checkpointing", False) and hasattr(module, FUNCTION) and is_reentrant(module):
                hooks.enter_context(module.register_forward_pre_hook(watch(name), with_kwargs=True))
        yield starved


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Training mode with gradients on; modes, buffers and random states are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # running means move in a forward
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), in_mode(model, training=True):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
