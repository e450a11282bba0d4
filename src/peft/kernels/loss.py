"""Cross-entropy of a causal LM without the logits of the whole batch: -log softmax(f(W h + b))[label], chunk by chunk.

Each chunk of tokens makes its logits, its loss and the gradient of its hidden states at once, so that one chunk of
logits is in memory at a time (the plan of Liger's fused linear cross-entropy, arXiv 2410.10989, which takes over on
GPUs where it is installed). Heads that are more than a linear layer are run again in the backward pass instead.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from peft.kernels.linear import bare_weight, no_autocast
from peft.meanwhile import having


CHUNK = 2**24  # logits in memory at a time; the weight is read once for each chunk


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items_in_batch: torch.Tensor | int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The cross-entropy of ``softcap * tanh(scale * (W h + b) / softcap)`` with labels, in float32, a scalar.

    Args:
        hidden: h ``[..., d]``. weight: W ``[vocabulary, d]``. bias: b ``[vocabulary]`` or None.
        labels: ``[...]``, one for each h (already shifted); those equal to ``ignore_index`` do not count.
        num_items_in_batch: what the sum is divided by; None: the number of labels that count.
        softcap: None leaves the logits as they are.
    """
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).to(hidden.device)
    if rows.is_cuda and bias is None and (fused := _liger()) is not None:
        scaled = rows if scale == 1 else rows * scale
        total = fused(scaled, weight, labels, ignore_index=ignore_index, reduction="sum", softcap=softcap)
    else:
        with no_autocast(hidden):
            total = ChunkedCrossEntropy.apply(rows, weight, bias, labels, ignore_index, softcap, scale)
    return _divided(total, labels, ignore_index, num_items_in_batch)


def _liger() -> Callable[..., torch.Tensor] | None:
    """Liger's fused linear cross-entropy, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _divided(
    total: torch.Tensor, labels: torch.Tensor, ignore_index: int, count: torch.Tensor | int | None
) -> torch.Tensor:
    if count is None:
        count = (labels != ignore_index).sum()
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


def _transformed(logits: torch.Tensor, softcap: float | None, scale: float) -> torch.Tensor:
    logits = logits if scale == 1 else logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class ChunkedCrossEntropy(Function):
    """The sum of the losses of all rows; gradients are made in the forward pass, where they are wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ignore_index: int,
        softcap: float | None,
        scale: float,
    ) -> torch.Tensor:
        needs_rows, read_elsewhere, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        places = _counting(labels, ignore_index)
        d_rows = torch.zeros_like(rows) if needs_rows else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if read_elsewhere else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        size = min(max(1, CHUNK // len(weight)), len(places))
        room = weight.new_empty(size, len(weight))
        for place in places.split(size) if size else ():
            part, target = rows[place].to(weight.dtype), labels[place].unsqueeze(1)
            raw = torch.mm(part, weight.t(), out=room[: len(place)])
            if bias is not None:
                raw.add_(bias)
            loss, gradient = _loss_and_gradient(raw, target, softcap, scale, any(ctx.needs_input_grad[:3]))
            total += loss
            if d_rows is not None:
                d_rows[place] = torch.mm(gradient, weight).to(rows.dtype)
            if d_weight is not None:
                d_weight += gradient.t() @ part
            if d_bias is not None:
                d_bias += gradient.sum(0)
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        d_rows, d_weight, d_bias = ctx.saved_tensors
        d_rows = None if d_rows is None else d_rows * gradient.to(d_rows.dtype)
        d_weight = None if d_weight is None else (d_weight * gradient).to(ctx.dtypes[0])
        d_bias = None if d_bias is None else (d_bias * gradient).to(ctx.dtypes[1])
        return d_rows, d_weight, d_bias, None, None, None, None


def _counting(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The rows with a label that counts: the others cost nothing."""
    if labels.is_meta:
        return torch.arange(len(labels), device=labels.device)
    return (labels != ignore_index).nonzero().squeeze(1)


def _loss_and_gradient(
    raw: torch.Tensor, target: torch.Tensor, softcap: float | None, scale: float, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of -log softmax(f(raw))[target] and its gradient by ``raw``, which is overwritten if in float32."""
    logits = raw if raw.dtype == torch.float32 else raw.float()
    if scale != 1:
        logits.mul_(scale)
    capped = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        capped = logits.clone() if wants_gradient else None
        logits.mul_(softcap)
    if logits.device.type == "cpu":  # in place: an entry is read for the last time before it is written
        torch.log_softmax(logits, -1, out=logits)
    else:
        logits = torch.log_softmax(logits, -1)
    loss = -logits.gather(1, target).sum()
    if not wants_gradient:
        return loss, raw
    gradient = logits.exp_().scatter_add_(1, target, logits.new_full((), -1).expand_as(target))
    if capped is not None:
        gradient.mul_(capped.square_().neg_().add_(1))
    if scale != 1:
        gradient.mul_(scale)
    return loss, gradient.to(raw.dtype)


def _through_head(
    head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, ignore_index: int, softcap: float | None, scale: float
) -> torch.Tensor:
    """The same for a head of any kind, such as an adapted or quantised one: chunks are run again in the backward."""

    def part(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = _transformed(head(rows), softcap, scale).float()
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")

    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).to(hidden.device)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    size = max(1, CHUNK // int(getattr(head, "out_features", 2**15)))
    for start in range(0, len(rows), size):
        ends = start, start + size
        total = total + checkpoint(part, rows[slice(*ends)], labels[slice(*ends)], use_reentrant=False)
    return total


@contextmanager
def chunked_loss(model: nn.Module) -> Iterator[None]:
    """A context in which a causal LM of transformers computes its loss in chunks; its logits are the last token's.

    Raises:
        ValueError: if the model has no output head, a loss of its own, or does with its logits what is not known here.
    """
    head = require_usual_loss(model)
    seen: list[torch.Tensor] = []

    def shorten(module: nn.Module, args: tuple) -> tuple:
        if seen:  # a chunk, or another use of the head
            return args
        seen.append(args[0])
        return (args[0][..., -1:, :], *args[1:])

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        return _model_loss(model, head, seen[0], logits, labels, **kwargs)

    with head.register_forward_pre_hook(shorten), having([model], loss_function=loss):
        yield


def is_chunked(model: nn.Module) -> bool:
    """Whether the model is within :func:`chunked_loss`."""
    return getattr(getattr(model, "loss_function", None), "__module__", "") == __name__


def require_usual_loss(model: nn.Module) -> nn.Module:
    """The output head of a model of which :func:`chunked_loss` can make the loss.

    Raises:
        ValueError: if it cannot.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    own = getattr(model, "loss_function", None)
    if head is None or getattr(own, "__name__", "") != "ForCausalLMLoss":
        raise ValueError(
            f"chunked_loss needs a causal LM of transformers with an output head and its usual loss; "
            f"{type(model).__name__} has {'the loss ' + repr(own) if head is not None else 'no head'}. "
            "Leave chunked_loss out."
        )
    return head


def _model_loss(
    model: nn.Module,
    head: nn.Module,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """What ``ForCausalLMLoss`` gives for the logits of ``hidden``; ``logits`` are the last token's."""
    softcap, scale = _logit_options(model)
    _check_transform(model, head, hidden, logits, softcap, scale)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    weight = getattr(head, "weight", None)
    if type(head) is nn.Linear and is_plain_head(head):
        return chunked_cross_entropy(
            hidden, weight, shift_labels, head.bias, ignore_index, num_items_in_batch, softcap, scale
        )
    total = _through_head(head, hidden, shift_labels, ignore_index, softcap, scale)
    return _divided(total, shift_labels, ignore_index, num_items_in_batch)


def is_plain_head(head: nn.Module) -> bool:
    """Whether the head does nothing but its product; the one hook of :func:`chunked_loss` aside."""
    hooks = head._forward_pre_hooks
    (key,) = list(hooks)[-1:]
    ours = hooks.pop(key)
    try:
        return bare_weight(head) is not None
    finally:
        hooks[key] = ours


def _logit_options(model: nn.Module) -> tuple[float | None, float]:
    """The soft cap and the factor that the model's config puts on its logits."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return getattr(config, "final_logit_softcapping", None), scale / divisor


def _check_transform(
    model: nn.Module,
    head: nn.Module,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    softcap: float | None,
    scale: float,
) -> None:
    """Raise ValueError if the model does something else with the logits; seen on the last token of the first row."""
    if logits.is_meta:
        return
    with torch.no_grad():
        ours = _transformed(head(hidden[:1, -1:]), softcap, scale).float()
        if not torch.allclose(ours, logits[:1].float(), rtol=0.02, atol=0.02 * float(ours.abs().max())):
            raise ValueError(
                f"{type(model).__name__} changes its logits in a way that chunked_loss does not know; call it without."
            )
