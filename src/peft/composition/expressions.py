"""How adapters are put together, as expressions: ``Stack("language", Fuse("a", "b"))``.

What each stands for, with f_i(h) what member i makes of a state h of the model (a layer's output, a hidden state
between blocks):

    Stack       f_n(... f_1(h))                 one after another
    Average     h + sum_i w_i (f_i(h) - h)      the weighted mean of what they change
    Fuse        AdapterFusion: attention of h to what the members make of it
    Split       f_i(h) at the tokens of member i, h at tokens of none
    BatchSplit  f_i(h) for the rows of member i
    Parallel    f_1(h), f_2(h), ...             one input, as many outputs, as rows of one batch

A member that has nothing at a place of the model leaves h as it is there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.core.composition import Composition, as_kept, divided_stack
from peft.errors import ConfigError, nearest


def from_dict(values: Any) -> Composition:
    """The expression that :meth:`Composition.to_dict` wrote.

    Raises:
        ConfigError: if the values describe none.
    """
    kind = KINDS.get(values.get("type")) if isinstance(values, dict) else None
    if kind is None or not isinstance(values.get("members"), list):
        shown = values.get("type") if isinstance(values, dict) else values
        raise ConfigError(
            f"{shown!r} is no composition of adapters.{nearest(shown, KINDS)} Known: {', '.join(KINDS)}, each with "
            "its members."
        )
    members = [member if isinstance(member, str) else from_dict(member) for member in values["members"]]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := set(fields) - known - {"type"}:
        raise ConfigError(f"{kind.__name__} has no {', '.join(map(repr, sorted(unknown)))}.")
    return as_kept(kind, members, {name: value for name, value in fields.items() if name in known - {"members"}})


@dataclass(frozen=True, init=False, repr=False)
class Stack(Composition):
    """One after another: each member reads what those before it have made. An empty stack is the base model.

    Of adapters of weights, several active ones are a stack already. Of methods in blocks (bottleneck, ReFT), a list of
    active adapters acts side by side, and a stack does not.

    Examples:
        >>> Stack("language", Average("a", "b"))
        Stack('language', Average('a', 'b'))
    """

    LEAST: ClassVar[int] = 0
    in_turn: ClassVar[bool] = True

    def check(self) -> None:
        apart = [m for m in self.members if isinstance(m, Composition) and m.splits_rows]
        if len(apart) > 1:
            kind = type(apart[0]).__name__
            raise ConfigError(
                f"{self!r} divides the rows of a batch more than once, and does not say which go together. Divide "
                f"them once, outside: {kind}(Stack(...), Stack(...))."
            )


def _check_numbers(owner: Composition, name: str, whole: bool, rest: bool = False) -> None:
    """Raise ConfigError where a field does not hold one number for each member; ``rest``: the last may have none."""
    values: Any = getattr(owner, name)
    kind, what = type(owner).__name__, "whole numbers from 1" if whole else "numbers"
    allowed = int if whole else int | float
    for value in values:
        if isinstance(value, bool) or not isinstance(value, allowed) or (whole and value < 1):
            raise ConfigError(f"{kind}: {name} should be {what}, not {value!r}.")
    if len(values) != len(owner.members) and not (rest and 0 < len(values) == len(owner.members) - 1):
        raise ConfigError(f"{kind} has {len(owner.members)} members, but {len(values)} {name}; give one for each.")


@dataclass(frozen=True, init=False, repr=False)
class Average(Composition):
    """The weighted mean of what the members change: h + sum_i w_i (f_i(h) - h).

    Args:
        weights: one for each member; the same for all by default.
        normalize_weights: divide them by their sum; without it, weights [1, 1] add the changes up.

    Raises:
        ConfigError: if their number is not that of the members, or they sum to 0 and should be normalised.

    Examples:
        >>> Average("a", "b", weights=[3, 1]).weights
        (0.75, 0.25)
    """

    weights: tuple[float, ...] = ()

    def __init__(
        self,
        *members: str | Composition,
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
    ) -> None:
        super().__init__(*members, weights=tuple(weights or ()))
        if normalize_weights and self.weights:
            total = sum(self.weights)
            if not total:
                raise ConfigError(
                    f"Average: the weights {list(self.weights)} sum to 0, so they cannot be normalised. Pass "
                    "normalize_weights=False to take them as they are."
                )
            object.__setattr__(self, "weights", tuple(weight / total for weight in self.weights))

    def check(self) -> None:
        super().check()
        if self.weights:
            _check_numbers(self, "weights", whole=False)

    def __repr__(self) -> str:
        as_they_are = self.weights and abs(sum(self.weights) - 1) > 1e-6
        return f"{super().__repr__()[:-1]}, normalize_weights=False)" if as_they_are else super().__repr__()

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each member."""
        return self.weights or (1 / len(self.members),) * len(self.members)


@dataclass(frozen=True, init=False, repr=False)
class Fuse(Composition):
    """AdapterFusion (Pfeiffer et al. 2021, arXiv 2005.00247): attention over what the members make of a state.

    With u_i what member i adds to a state h, and q what it reads,

        h' = h + sum_i p_i V u_i,      p = softmax_i((Q q + b) . (K u_i + c)),

    as the library adapters has it. Q, K, V, b and c are of each place in the model, and trained: they have a name, and
    are saved under it. The members do not train along.

    Args:
        kind: "dynamic", or "static", which has no V.
        regularization: the loss gets this times the sum of (V - I)^2; for "dynamic".

    Raises:
        ConfigError: for another kind.

    Examples:
        >>> model.add_adapter("other", LoraConfig(r=2, task_type="CAUSAL_LM"))
        >>> model.add_composition("fused", Fuse("default", "other"))
        >>> model.set_adapter("fused")
    """

    kind: str = "dynamic"
    regularization: float = 0.01
    trains_alone: ClassVar[bool] = True

    def __init__(self, *members: str | Composition, kind: str = "dynamic", regularization: float = 0.01) -> None:
        super().__init__(*members, kind=kind, regularization=regularization)

    def check(self) -> None:
        super().check()
        if self.kind not in ("dynamic", "static"):
            raise ConfigError(f"Fuse: kind should be 'dynamic' or 'static', not {self.kind!r}.")
        if not isinstance(self.regularization, int | float) or self.regularization < 0:
            raise ConfigError(f"Fuse: regularization should be a number from 0, not {self.regularization!r}.")


@dataclass(frozen=True, init=False, repr=False)
class Split(Composition):
    """Token ranges to the members: the first tokens of each text to the first member, and so on.

    Tokens are counted from where a text begins, after padding on its left; those that ``generate`` writes count on.

    Args:
        splits: how many tokens each member gets, or one number for all of them. One number less than members: the
            last one gets the rest. Tokens beyond are the base model's.

    Raises:
        ConfigError: if their number is neither that of the members, nor one less.

    Examples:
        >>> Split("question", "answer", splits=[12])
        Split('question', 'answer', splits=(12,))
    """

    splits: tuple[int, ...] = ()

    def __init__(self, *members: str | Composition, splits: Sequence[int] | int) -> None:
        each = [splits] * len(members) if isinstance(splits, int) else splits
        super().__init__(*members, splits=tuple(each))

    def check(self) -> None:
        super().check()
        _check_numbers(self, "splits", whole=True, rest=True)


@dataclass(frozen=True, init=False, repr=False)
class BatchSplit(Composition):
    """Rows of the batch to the members: the first rows to the first member, and so on.

    Args:
        batch_sizes: how many rows each member gets, or one number for all of them.

    Raises:
        ConfigError: if their number is not that of the members.

    Examples:
        >>> BatchSplit("a", "b", batch_sizes=[2, 3])
        BatchSplit('a', 'b', batch_sizes=(2, 3))
    """

    batch_sizes: tuple[int, ...] = ()
    by_row: ClassVar[bool] = True

    def __init__(self, *members: str | Composition, batch_sizes: Sequence[int] | int) -> None:
        each = [batch_sizes] * len(members) if isinstance(batch_sizes, int) else batch_sizes
        super().__init__(*members, batch_sizes=tuple(each))

    def check(self) -> None:
        _check_numbers(self, "batch_sizes", whole=True)
        if any(isinstance(member, Composition) and copies(member) > 1 for member in self.members):
            raise ConfigError(
                f"{self!r} would give more outputs for some rows than for others. Put Parallel outside: "
                "Parallel(BatchSplit(...), BatchSplit(...))."
            )


@dataclass(frozen=True, init=False, repr=False)
class Parallel(Composition):
    """One input to each member, in one pass: a batch of B rows becomes one of B rows for each member, kept apart.

    The output has the rows of the first member, then those of the second, and so on: :meth:`apart` takes them apart.

    Examples:
        >>> model.set_adapter(Parallel("default", "__base__"))
        >>> ours, base = model.active_composition.apart(model(**batch).logits)
    """

    by_row: ClassVar[bool] = True

    def check(self) -> None:
        if any(isinstance(member, Composition) and copies(member) > 1 for member in self.members):
            raise ConfigError(f"{self!r} holds another Parallel: name all of its members in one.")

    def apart(self, output: Any) -> list[Any]:
        """A tensor ``[members * batch, ...]``, as one for each member."""
        return list(output.chunk(len(self.members)))


KINDS: dict[Any, type[Composition]] = {
    kind.__name__: kind for kind in (Stack, Average, Fuse, Split, BatchSplit, Parallel)
}


def unused(name: str, taken: Container[str]) -> str:
    """The name, or one like it that is not taken."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


# --- rows ---------------------------------------------------------------------------------------------------------


def copies(expression: str | Composition) -> int:
    """How often an expression repeats a batch: the members of the Parallel in it."""
    if isinstance(expression, str):
        return 1
    if isinstance(expression, Parallel):
        return len(expression.members)
    return max((copies(member) for member in expression.members), default=1)


def rows_of(expression: str | Composition, batch: int) -> list[str | Composition]:
    """What acts on each row of a batch, none of which splits rows; a Parallel repeats the batch for each member.

    Raises:
        ValueError: if the batch has another number of rows than a BatchSplit says.
    """
    if isinstance(expression, str) or not expression.splits_rows:
        return [expression] * batch
    if isinstance(expression, Parallel):
        return [row for member in expression.members for row in rows_of(member, batch)]
    if isinstance(expression, BatchSplit):
        if sum(expression.batch_sizes) != batch:
            raise ValueError(
                f"{expression!r} is for batches of {sum(expression.batch_sizes)} rows, and this one has {batch}. Set "
                "it with the batch_sizes of the batch at hand."
            )
        pairs = zip(expression.members, expression.batch_sizes)
        return [row for member, size in pairs for row in rows_of(member, size)]
    dividing, stacked = divided_stack(expression)
    return [stacked(row) for row in rows_of(dividing, batch)]
