"""What each expression does at one layer, with the members that are there."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from peft.composition.expressions import Average, Fuse, Split, Stack
from peft.core.adapter import Adapter, part
from peft.core.layer import weight as weights
from peft.core.layer.composed import (
    Change,
    Composed,
    Step,
    acts_by_weight,
    change_of,
    composed_class,
    in_order,
    leaves_of,
)


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer


def check_members(layer: BaseTunerLayer, name: str) -> None:
    """Raise ValueError where the members of a composition cannot be put together at a layer, as it says."""
    cls = composed_class(layer, name)
    reason = None if cls is None else cls(layer, name).refusal_here()
    if reason:
        expression = layer.context.compositions[name]
        raise ValueError(f"{expression!r} has no meaning at {layer.key or 'the module'}: {reason}.")


class Chain(Composed, of=Stack):
    """A stack: one after another."""

    def stacked(self) -> Iterator[Adapter]:
        yield from in_order(self.here())

    def change(self, state: torch.Tensor, step: Step, place: str = "output") -> Change | None:
        if self.only_folds():  # what one makes of the weight, the next one reads
            return step(self, state)
        first, total = None, None
        for member in self.here():
            change = change_of(member, state if total is None else state + total, step, place)
            if change is not None:
                first = first or change
                total = change.total if total is None else total + change.total
        if first is None or total is None:
            return None
        return first._replace(update=total if first.shift is None else total - first.shift)

    def only_folds(self) -> bool:
        return any(acts_by_weight(member) for member in self.here())

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        for member in weights.fold_order(list(self.stacked())):
            weight = member.fold(weight, base)
        return weight

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        for member in weights.fold_order(list(self.stacked())):
            bias = member.fold_bias(bias)
        return bias

    def clash(self, others: Sequence[Adapter]) -> str | None:
        before = list(others)
        for member in self.here():
            if reason := member.clash(before):
                return reason
            before += leaves_of([member])
        return None

    def stand_in(self) -> Any:
        return next((found for member in self.here() if (found := member.stand_in()) is not None), None)


class Beside(Composed):
    """Members that act on the same state, each on its own.

    Attributes:
        no_weight: why there is no weight to give where another computation reads it; "" where there is one.
    """

    no_weight: ClassVar[str] = ""

    def refusal_here(self) -> str | None:
        if self.no_weight and (self.kind.opaque or self.layer.read_by_parent):
            return f"its weight is read by another computation, {self.no_weight}"
        kind = type(self.expression).__name__
        if not getattr(self.layer, "composes", True):
            methods = ", ".join(sorted({type(leaf).__name__ for leaf in leaves_of([self])}))
            return f"{methods} adapters can be stacked, and used row by row, but what they change has no {kind}"
        if any(leaf.stand_in() is not None for leaf in leaves_of([self])):
            return f"its members have copies of the whole module, of which one can act at a time, not all in {kind}"
        return super().refusal_here()


class Mean(Beside, of=Average):
    """A weighted mean: h + sum_i w_i (f_i(h) - h)."""

    def weighted(self) -> list[tuple[float, Adapter]]:
        """The weights and the members that are here."""
        expression: Any = self.expression
        return [(w, member) for w, member in zip(expression.shares, self.members()) if member is not None]

    def change(self, state: torch.Tensor, step: Step, place: str = "output") -> Change | None:
        found = [(w, change) for w, member in self.weighted() if (change := change_of(member, state, step, place))]
        if not found:
            return None
        last = found[-1][1]
        total = functools.reduce(torch.add, (w * change.total for w, change in found))
        return last._replace(update=total if last.shift is None else total - last.shift)

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        changes = (w * (member.fold(weight, base) - weight) for w, member in self.weighted())
        return weight + functools.reduce(torch.add, changes)

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        total = bias
        for share, member in self.weighted():
            if (change := weights.added_to(bias, member)) is not None:
                total = share * change if total is None else total + share * change
        return total


class Attention(nn.Module):
    """AdapterFusion at one place: Q and K ``[width, width]``, with biases, and V ``[width, width]``, I at first."""

    def __init__(self, width: int, dynamic: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.value = nn.Linear(width, width, bias=False) if dynamic else None
        if self.value is not None:
            nn.init.constant_(self.value.weight, 1e-6)  # the start that the library adapters has
            with torch.no_grad():
                self.value.weight.fill_diagonal_(1.0)

    def forward(self, reads: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        """sum_i p_i V u_i ``[..., width]``, see :class:`peft.composition.expressions.Fuse`.

        Args:
            reads: q ``[..., width]``. updates: u_i ``[..., members, width]``.
        """
        scores = (self.key(updates) @ self.query(reads).unsqueeze(-1)).squeeze(-1)
        mixed = (scores.softmax(-1).unsqueeze(-2) @ updates).squeeze(-2)
        return mixed if self.value is None else self.value(mixed)

    def penalty(self) -> torch.Tensor:
        """The sum of (V - I)^2, 0 without V."""
        if self.value is None:
            return self.query.weight.new_zeros(())
        weight = self.value.weight
        return (weight - torch.eye(len(weight), device=weight.device, dtype=weight.dtype)).square().sum()


class Fused(Beside, of=Fuse):
    """AdapterFusion: attention over what the members make of the state; one at each place of the layer."""

    fusion = part(nn.ModuleDict)
    no_weight = "and no one weight equals a fusion"

    def create(self, config: Any, key: str) -> None:
        expression: Any = self.expression
        layer: Any = self.layer
        widths = layer.widths(leaves_of([self])) if self.kind.whole else {"output": self.out_features}
        self.fusion = nn.ModuleDict({k: Attention(width, expression.kind == "dynamic") for k, width in widths.items()})

    def change(self, state: torch.Tensor, step: Step, place: str = "output") -> Change | None:
        found = [None if member is None else change_of(member, state, step, place) for member in self.members()]
        last = next((change for change in reversed(found) if change is not None), None)
        if last is None:
            return None
        kind, attention = self.kind, self.fusion[place]
        dtype = attention.query.weight.dtype
        reads = kind.channels_last(last.reads).to(dtype)
        nothing = torch.zeros_like(reads)
        updates = [nothing if change is None else kind.channels_last(change.update).to(dtype) for change in found]
        return last._replace(update=kind.channels_back(attention(reads, torch.stack(updates, -2))))

    def loss_term(self) -> torch.Tensor | None:
        expression: Any = self.expression
        if not expression.regularization or not self.training:
            return None
        terms = [expression.regularization * attention.penalty() for attention in self.fusion.values()]
        return sum(terms[1:], terms[0])

    def unmergeable(self) -> str | None:
        return "what a fusion attends to depends on the sample, so no one weight equals it. Keep it unmerged."


class Ranges(Beside, of=Split):
    """Members at ranges of the tokens of each text, which ``layer.extent`` counts."""

    no_weight = "for all tokens at once"

    def change(self, state: torch.Tensor, step: Step, place: str = "output") -> Change | None:
        expression: Any = self.expression
        layer: Any = self.layer
        position, start, last, total = layer.extent.positions(state), 0, None, None
        for member, length in zip_longest(self.members(), expression.splits):
            change = None if member is None else change_of(member, state, step, place)
            if change is not None:
                here = position >= start if length is None else (position >= start) & (position < start + length)
                part = change.total.masked_fill(~here[..., None], 0)
                last, total = change, part if total is None else total + part
            start += length or 0
        if last is None or total is None:
            return None
        return last._replace(update=total, shift=None)

    def unmergeable(self) -> str | None:
        return "which member acts depends on the token, so no one weight equals it. Keep it unmerged."
