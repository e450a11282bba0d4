"""Optimizers that step in the product s B A of a pair, however it is split into its factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peft.core.layer.weight import wide
from peft.optimizers.adamw import adamw
from peft.optimizers.closure import loss_of
from peft.optimizers.pairs import pairs_of, require_whole


TOLERANCE = 1e-6


def polar(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U ``[n, r]`` with orthonormal columns and the inverse ``[r, r]`` of R in x = U R, R symmetric, for x ``[n, r]``.

    Directions in which x is zero, as all are in a B at its start, have no part in either.
    """
    q, s, v = torch.linalg.svd(x, full_matrices=False)
    there = s > TOLERANCE * s.max()
    inverse = torch.where(there, 1 / torch.where(there, s, 1), 0)
    return (q * there) @ v, v.mT * inverse @ v


class ProductOptimizer(Optimizer):
    """Steps in pairs, and AdamW's in whatever else trains. A method defines :meth:`half_step`.

    The two factors are seen as X Y^T = s B A: X is B ``[out, r]``, and Y is s A^T ``[in, r]``.

    Args:
        pairs: A, B and s of each. others: the other parameters. settings: of the groups of pairs.
        others_lr: learning rate of the others.
    """

    what = ""

    def __init__(
        self,
        pairs: list[tuple[nn.Parameter, nn.Parameter, float]],
        others: list[nn.Parameter],
        settings: dict[str, Any],
        others_lr: float,
    ) -> None:
        for name in ("lr", "weight_decay"):
            if settings[name] < 0:
                raise ValueError(f"{name} should be 0 or above, got {settings[name]}.")
        factors = [factor for a, b, _ in pairs for factor in (a, b)]
        groups = [{"params": factors, "scalings": [s for *_, s in pairs], **settings}]
        if others:
            adam = {"lr": others_lr, "betas": (0.9, 0.999), "eps": 1e-8, "correct_bias": True}
            groups.append({"params": others, "scalings": None, **adam, "weight_decay": settings["weight_decay"]})
        super().__init__(groups, {})

    def half_step(
        self, other: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        """What is added to one of X and Y, for its gradient, beside the other as it is.

        Args:
            state: what is kept for the one. group: settings.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure``, if given, computes the loss and its gradients, and its value is returned."""
        loss = loss_of(closure)
        for group in self.param_groups:
            if group["scalings"] is None:
                for p in group["params"]:
                    if p.grad is not None:
                        adamw(p, p.grad, self.state[p], group)
                continue
            factors = group["params"]
            for a, b, s in zip(factors[::2], factors[1::2], group["scalings"]):
                if a.grad is not None and b.grad is not None:
                    self._step(a, b, s, group)
        return loss

    def _step(self, a: nn.Parameter, b: nn.Parameter, s: float, group: dict[str, Any]) -> None:
        require_whole(a, self.what)
        x, y = wide(b.flatten(1)), wide(a.flatten(1)).T * s
        gx, gy = wide(b.grad.flatten(1)), wide(a.grad.flatten(1)).T / s
        dx, dy = self.half_step(y, gx, self.state[b], group), self.half_step(x, gy, self.state[a], group)
        # decay of the product by 1 - lr * weight_decay, half of it in each factor, and none in what is added to it
        shrink = math.sqrt(1 - group["lr"] * group["weight_decay"])
        b.copy_((x * shrink + dx / shrink).view_as(b))
        a.copy_(((y * shrink + dy / shrink).T / s).view_as(a))


def split(model: nn.Module, what: str) -> tuple[list[tuple[nn.Parameter, nn.Parameter, float]], list[nn.Parameter]]:
    """The pairs of a model's active adapters, with s, and what else trains.

    Pairs of tables and of grouped convolutions, and those of which only one factor trains, are among the latter.

    Raises:
        ValueError: if there is no pair.
    """
    pairs = []
    for pair in pairs_of(model):
        together = pair.a.shape[0] == pair.b.shape[1] and not pair.lookup and pair.layer.num_experts == 1
        if pair.a.requires_grad and pair.b.requires_grad and together:
            pairs.append((pair.a, pair.b, float(pair.layer.scaling[pair.name])))
    if not pairs:
        raise ValueError(
            f"this {type(model).__name__} has no layer in which both factors of an active LoRA adapter train, so "
            f"there is nothing for {what} to do."
        )
    known = {id(factor) for a, b, _ in pairs for factor in (a, b)}
    return pairs, [p for p in model.parameters() if p.requires_grad and id(p) not in known]
