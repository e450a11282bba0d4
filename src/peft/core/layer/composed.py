"""Adapters that are made of adapters of the same layer: what an expression stands for at one layer.

All of them compute by one recursion. An adapter of a method is asked what it changes of a state, by a *step* that the
layer knows: of a layer's output, of a hidden state between the parts of a block. One that is made of others puts
together what its members change (:func:`change_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from peft.core.adapter import Adapter
from peft.core.composition import Composition
from peft.core.layer import weight as weights


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer


class Change(NamedTuple):
    """What an adapter changes of a state h ``[batch, ..., width]``: h' = h + shift + update.

    Attributes:
        update: u, what its own mathematics gives.
        reads: what it reads of the state.
        shift: what it does besides adding u, None for nothing.
    """

    update: torch.Tensor
    reads: torch.Tensor
    shift: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        """h' - h."""
        return self.update if self.shift is None else self.update + self.shift


Step = Callable[[Any, torch.Tensor], Change | None]
"""What one adapter of a method changes of a state; None where it has nothing at this place."""


def made_of(layer: BaseTunerLayer, name: str | Composition) -> Adapter | None:
    """What a name, or an expression, stands for at a layer; None where it has nothing there."""
    if isinstance(name, str):
        return layer.adapters.get(name)
    if not any(member in layer.adapters for member in name.names()):
        return None
    return _class_for(name)(layer, name)  # type: ignore[arg-type]


def in_order(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters with those in the place of each stack that it stacks: a layer's own routes take them together."""
    return [leaf for a in adapters for leaf in (a.stacked() if isinstance(a, Composed) else (a,))]


def leaves_of(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters of methods among these, or that these are made of."""
    return [x for a in adapters for x in (leaves_of(a.here()) if isinstance(a, Composed) else (a,))]


def change_of(adapter: Adapter, state: torch.Tensor, step: Step, place: str = "output") -> Change | None:
    """What an adapter changes of a state.

    Args:
        step: what one of a method does. place: which of several states of the layer it is.
    """
    return adapter.change(state, step, place) if isinstance(adapter, Composed) else step(adapter, state)


class Composed(Adapter):
    """An adapter made of adapters. It is registered under a name, or stands for an expression in another one.

    A subclass says which expressions it is for: ``class Mean(Composed, of=Average)``.
    """

    name: Any  # a string, or the expression itself
    reversible = False
    classes: ClassVar[dict[type[Composition], type[Composed]]] = {}

    def __init_subclass__(cls, of: type[Composition] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if of is not None:
            Composed.classes[of] = cls

    @property
    def expression(self) -> Composition:
        return self.name if isinstance(self.name, Composition) else self.context.compositions[self.name]

    def members(self) -> list[Adapter | None]:
        """What the members are at this layer, None for those that are not here."""
        return [made_of(self.layer, member) for member in self.expression.members]

    def here(self) -> list[Adapter]:
        """Those that are here."""
        return [member for member in self.members() if member is not None]

    def stacked(self) -> Iterator[Adapter]:
        """What takes its place among the adapters that a layer's own routes know: itself, or what it stacks."""
        yield self

    def change(self, state: torch.Tensor, step: Step, place: str = "output") -> Change | None:
        """What it changes of a state; see :func:`change_of`."""
        raise NotImplementedError

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        raise ValueError(self.unmergeable())

    def create(self, config: Any, key: str) -> None:
        """It holds nothing of its own."""

    def refusal_here(self) -> str | None:
        """Why the members cannot be put together like this at this layer, or None."""
        found = (member.refusal_here() for member in self.here() if isinstance(member, Composed))
        return next(filter(None, found), None)

    # --- what the routes of a layer ask -----------------------------------------------------------------------
    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        def step(adapter: Adapter, state: torch.Tensor) -> Change:
            if acts_by_weight(adapter):
                update = weights.multiplied(self.layer, x, lambda: _difference(adapter, x), leaves_of([adapter]))
                update = update + _difference_of_biases(adapter)
            else:
                update = adapter.output(adapter.cast(x), state, base_y) - state
            return Change(update, state)

        change = self.change(y, step)
        return y if change is None else y + change.total

    def cast(self, x: torch.Tensor) -> torch.Tensor:  # each member has a dtype of its own
        return x

    def prefers_folding(self) -> bool:
        return not self.unmergeable() and all(leaf.prefers_folding() for leaf in leaves_of([self]))

    def clash(self, others: Sequence[Adapter]) -> str | None:
        return next(filter(None, (member.clash(others) for member in self.here())), None)

    def unmergeable(self) -> str | None:
        return next(filter(None, (member.unmergeable() for member in self.here())), None)

    def keeps_base(self) -> bool:
        return True


def acts_by_weight(adapter: Adapter) -> bool:
    """Whether what it makes of the layer's output alone is not all that it does."""
    return adapter.only_folds() or adapter.changes_input


def _difference(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to the weight."""
    base = weights.unmerged_weight(adapter.layer)
    return (adapter.fold(base, base) - base).to(x.dtype if x.is_floating_point() else base.dtype)


def _difference_of_biases(adapter: Adapter) -> torch.Tensor | float:
    """What an adapter adds to the bias, shaped like an output."""
    change = weights.added_to(adapter.base_bias(), adapter)
    return 0.0 if change is None else adapter.along_channels(change)


class ByRow(Composed):
    """What gives rows of a batch to its members: the model divides each call into rows before a layer sees it."""

    def change(self, state: torch.Tensor, step: Step, place: str = "output") -> Change | None:
        raise ValueError(self.unmergeable())

    def only_folds(self) -> bool:
        return True

    def unmergeable(self) -> str | None:
        return (
            f"{self.expression!r} gives each row of a batch adapters of its own, so no one weight equals it. Call the "
            "PeftModel itself, which divides the batch."
        )


def composed_class(layer: BaseTunerLayer, name: str) -> type[Composed] | None:
    """The class of the adapters of this name, None where it is no composition."""
    expression = layer.context.compositions.get(name)
    return None if expression is None else _class_for(expression)


def _class_for(expression: Composition) -> type[Composed]:
    return ByRow if expression.splits_rows else Composed.classes[type(expression)]
