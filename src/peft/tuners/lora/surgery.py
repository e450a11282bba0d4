"""Spectral Surgery: singular values of a trained LoRA, weighed anew by what the loss says (arXiv 2603.03995)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from peft.kernels.decompositions import product_svd
from peft.meanwhile import having, in_mode
from peft.tuners.lora.factors import factors_of
from peft.tuners.lora.intruders import beside, plain_layers


MODES = ("select", "smooth", "gradient")
AMPLIFIED, WEAKENED, SHARE, TEMPERATURE = 1.25, 0.8, 0.2, 0.35  # what the authors use


def sensitivities(
    gradient: torch.Tensor, a: torch.Tensor, u: torch.Tensor, v: torch.Tensor, scaling: float
) -> torch.Tensor:
    """dL / dS_k = u_k^T G v_k, ``[k]``, G the gradient of s B A, from that of B alone.

    The gradient of B is s G A^T, and each v_k is A^T c_k, so G v_k is the gradient of B times c_k, divided by s.

    Args:
        gradient: of B, ``[out, r]``. a: ``[r, in]``. u: ``[out, k]``. v: V^T ``[k, in]``.
    """
    c = torch.linalg.pinv(a.mT) @ v.mT
    return (u * (gradient @ c)).sum(0) / scaling


def gates(values: torch.Tensor, sensitivity: torch.Tensor, mode: str) -> torch.Tensor:
    """What each singular value is multiplied by, before their sum is made what it was.

    Args:
        values: S ``[k]``. sensitivity: of each, the mean of ``|dL / dS_k|``; for "gradient" that of ``dL / dS_k``.
    """
    size = sensitivity.abs()
    if mode == "gradient":  # S_k e^(-S_k g_k), in units of the largest
        step = values * sensitivity
        return (-TEMPERATURE * step / step.abs().max().clamp(min=torch.finfo(step.dtype).tiny)).exp()
    if mode == "smooth":
        middle = size.median()
        spread = (size - middle).abs().median().clamp(min=torch.finfo(size.dtype).tiny)
        return WEAKENED + (AMPLIFIED - WEAKENED) * ((size - middle) / spread * TEMPERATURE).sigmoid()
    count = max(1, round(SHARE * len(values)))
    order, found = size.argsort(), torch.ones_like(values)
    if len(values) > 1:
        found[order[:count]], found[order[-count:]] = WEAKENED, AMPLIFIED
    return found


def spectral_surgery(
    model: Any,
    losses: Iterable[torch.Tensor],
    adapter_name: str = "default",
    new_adapter_name: str = "refined",
    mode: str = "select",
) -> dict[str, torch.Tensor]:
    """Add a LoRA that is another one with its singular values weighed anew, and make it the active one.

    No training: on some batches of the task, the gradient says how much the loss depends on each singular value of
    s B A. The directions stay, and so does the sum of the values of a layer. The old adapter stays, too.

    Args:
        model: a model with a trained LoRA; it is put into evaluation mode while the losses are computed.
        losses: one for each batch, of this model; a generator, so that one graph is held at a time.
        mode: "select": the fifth with the largest sensitivity is amplified by 1.25 and the one with the smallest
            weakened by 0.8; "smooth": between the two, by a sigmoid; "gradient": each goes where the loss falls.

    Returns:
        by the path of each layer, what its singular values were multiplied by, largest value first.

    Raises:
        ValueError: there is no such adapter, or it is more than a pair (DoRA, grouped convolutions) or merged; there
            are no losses, or one does not depend on the adapter. Nothing is added then.

    Examples:
        >>> spectral_surgery(model, (model(**batch).loss for batch in batches))
        >>> model.save_pretrained("refined")
    """
    if mode not in MODES:
        raise ValueError(f"mode should be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    layers = plain_layers(model, adapter_name, "Spectral Surgery")
    pairs = [factors_of(layer, adapter_name) for _, layer in layers]
    found = _measured(model, adapter_name, losses, [b for _, b in pairs])  # type: ignore[misc]
    changes = {}
    with torch.no_grad():
        for (path, layer), (a, b), seen in zip(layers, pairs, found):  # type: ignore[misc]
            s, (wide_a, wide_b) = layer.scaling[adapter_name], (factor.flatten(1).float() for factor in (a, b))
            u, values, v = product_svd(wide_a, wide_b)
            each = torch.stack([sensitivities(g.flatten(1).float(), wide_a, u, v, s) for g in seen])
            by = gates(s * values, each.mean(0) if mode == "gradient" else each.abs().mean(0), mode)
            total = (by * values).sum()
            changes[path] = by * (values.sum() / total if total > 0 else 1), u, values, v
    write = beside(model, adapter_name, new_adapter_name)
    for path, (by, u, values, v) in changes.items():
        write(path, u, by * values, v)
    model.set_adapter(new_adapter_name)
    return {path: by for path, (by, *_) in changes.items()}


def _measured(
    model: Any, name: str, losses: Iterable[torch.Tensor], factors: list[torch.nn.Parameter]
) -> list[list[torch.Tensor]]:
    """The gradients of each factor, one for each loss; the model's own gradients and modes stay as they are."""
    active = list(model.active_adapters)
    found: list[tuple[torch.Tensor, ...]] = []
    with having(factors, requires_grad=True), in_mode(model, training=False):
        try:
            model.set_adapter(name)
            for loss in losses:
                found.append(torch.autograd.grad(loss, factors, allow_unused=True, materialize_grads=True))
        finally:
            model.set_adapter(active if len(active) > 1 else active[0])
    if not found or not any(g.any() for each in found for g in each):
        raise ValueError(
            f"adapter {name!r} has no gradient in {len(found)} losses, so nothing is known of its singular values. "
            "Give losses of this model, computed one by one: (model(**batch).loss for batch in batches)."
        )
    return [list(each) for each in zip(*found)]
