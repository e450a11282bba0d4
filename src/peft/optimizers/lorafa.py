"""LoRA-FA: A is frozen, and B follows the gradient that the full update would have (arXiv 2308.03303)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peft._lazy import also_known
from peft.errors import PeftWarning
from peft.optimizers.adamw import adamw
from peft.optimizers.closure import loss_of
from peft.optimizers.pairs import damped_inverses, pairs_of, require_whole


DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW in which the gradient of a factor is ``g_B (A A^T)^+ / s^2``, A being the frozen factor beside it.

    With W' = W + s B A and A fixed, that is the B whose update is closest to the step of W' itself (arXiv 2308.03303).
    Parameters without a partner (:meth:`project`) are plain AdamW's.

    Args:
        params: parameters or groups of them.
        correct_bias: undo that the averages start at zero, as Adam does.

    Raises:
        ValueError: for a setting out of its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr should be 0 or above, got {lr}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas should be at least 0 and below 1, got {tuple(betas)}.")
        if eps < 0:
            raise ValueError(f"eps should be 0 or above, got {eps}.")
        self.partners: dict[nn.Parameter, tuple[nn.Parameter, float, bool]] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    def project(self, trained: nn.Parameter, frozen: nn.Parameter, scaling: float, left: bool = False) -> None:
        """Say which frozen factor stands beside a trained one.

        Args:
            trained: B ``[out, r, 1...]``; or, with ``left``, the A ``[r, tokens]`` of an embedding.
            frozen: A ``[r, in, *kernel]``; or, with ``left``, the embedding's B ``[out, r]``.
            scaling: s in W' = W + s B A.
            left: the trained factor is multiplied from the left.
        """
        self.partners[trained] = frozen, scaling, left

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "partners": self.partners}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure``, if given, computes the loss and its gradients, and its value is returned."""
        loss = loss_of(closure)
        projected = self._projected()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    adamw(p, projected.get(p, p.grad), self.state[p], group)
        return loss

    def _projected(self) -> dict[nn.Parameter, torch.Tensor]:
        """The gradients of factors with a partner, projected."""
        acting = [(p, *partner) for p, partner in self.partners.items() if p.grad is not None]
        for p, frozen, *_ in acting:
            require_whole(p, "LoRA-FA")
            require_whole(frozen, "LoRA-FA")
        factors = [f.T if left else _by_group(f, len(f) // p.shape[1]) for p, f, _, left in acting]
        found = {}
        for (p, f, scaling, left), inverse in zip(acting, damped_inverses(factors, DAMPING)):
            g = p.grad.to(inverse.dtype)
            g = inverse @ g if left else _by_group(g, len(f) // p.shape[1]) @ inverse
            found[p] = (g / scaling**2).reshape(p.shape).to(p.dtype)
        return found


def _by_group(factor: torch.Tensor, groups: int) -> torch.Tensor:
    """``[groups, rows / groups, columns]``: in a grouped convolution each group of B reads its own rows of A."""
    return factor.reshape(groups, len(factor) // groups, -1)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """A :class:`LoraFAOptimizer` for the active LoRA adapters of a model; their A is frozen from now on.

    Nothing is kept of the layers' inputs for a frozen A: only ``A x``. Of an embedding B is frozen instead, which is
    the factor that is drawn there, while A starts at zero.

    Args:
        model: a model with LoRA, in training.
        r: rank, and ``lora_alpha``: numerator of the scaling, of the adapter that is meant; each layer is trained with
            the scaling that it has, patterns included.
        use_rslora: deprecated: whether the scaling is ``lora_alpha / sqrt(r)``; what the adapter's config says holds.

    Raises:
        ValueError: if the model has no LoRA adapter that trains, or ``use_rslora`` contradicts it.

    Examples:
        >>> optimizer = create_lorafa_optimizer(model, r=16, lora_alpha=32, lr=7e-5)
        >>> Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    """
    pairs = [pair for pair in pairs_of(model) if pair.a.requires_grad or pair.b.requires_grad]
    if not pairs:
        raise ValueError(f"this {type(model).__name__} has no LoRA adapter that is active and trains.")
    if use_rslora is not None:
        other = next((pair for pair in pairs if pair.layer.use_rslora[pair.name] != use_rslora), None)
        if other is not None:
            raise ValueError(
                f"use_rslora={use_rslora} contradicts adapter {other.name!r}, which has {not use_rslora}."
            )
    scalings = {pair.layer.scaling[pair.name] for pair in pairs}
    if not any(math.isclose(s, lora_alpha / given) for s in scalings for given in (r, math.sqrt(r))):
        warnings.warn(
            f"no layer has r={r} and lora_alpha={lora_alpha}; each is trained with the scaling that it has, such as "
            f"{min(scalings)}.",
            PeftWarning,
        )
    for pair in pairs:
        (pair.b if pair.lookup else pair.a).requires_grad_(False)
        (pair.a if pair.lookup else pair.b).requires_grad_(True)
    optimizer = LoraFAOptimizer([p for p in model.parameters() if p.requires_grad], lr, weight_decay=weight_decay)
    for pair in pairs:
        trained, frozen = (pair.a, pair.b) if pair.lookup else (pair.b, pair.a)
        optimizer.project(trained, frozen, float(pair.layer.scaling[pair.name]), pair.lookup)
    return optimizer


also_known(__name__)
