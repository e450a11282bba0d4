"""An adapter that is made of adapters, as an expression: what the rest of the library needs to know of one.

An expression names adapters, or holds further expressions; it knows no model. Which there are, and what each means, is
in :mod:`peft.composition`; what one does at a layer says a subclass of :class:`peft.core.layer.composed.Composed`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.errors import ConfigError


@dataclass(frozen=True, init=False, repr=False)
class Composition:
    """Base of all expressions. Equal ones are equal, and can be keys of dicts.

    Attributes:
        members: names of adapters, ``"__base__"`` for none, or expressions.
        by_row: it says which rows of a batch a member gets.
        in_turn: its members act one after another: what one puts in the place of a module, a later one replaces.
        trains_alone: its members do not train along with it.

    Raises:
        ConfigError: (a ValueError) if a member is neither, or an expression that has no meaning here; the message says
            what to write instead.
    """

    members: tuple[str | Composition, ...]
    LEAST: ClassVar[int] = 1
    by_row: ClassVar[bool] = False
    in_turn: ClassVar[bool] = False
    trains_alone: ClassVar[bool] = False

    def __init__(self, *members: str | Composition, **fields: Any) -> None:
        object.__setattr__(self, "members", tuple(members))
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        for member in members:
            if not isinstance(member, str | Composition):
                raise ConfigError(
                    f"{type(self).__name__} holds {member!r}, a {type(member).__name__}: its members are names of "
                    "adapters, or expressions such as Stack('a', 'b')."
                )
        if len(members) < self.LEAST:
            raise ConfigError(f"{type(self).__name__}() has no member: name the adapters, {type(self).__name__}('a').")
        self.check()

    def check(self) -> None:
        """Raise ConfigError where the members, or the fields, have no meaning together."""
        name = type(self).__name__
        for member in self.members:
            if isinstance(member, Composition) and member.splits_rows:
                kind = type(member).__name__
                inner = ", ".join(f"{name}({other!r}, ...)" for other in member.members[:2])
                raise ConfigError(
                    f"{name} cannot hold {member!r}: {kind} gives rows of a batch to its members, and {name} puts "
                    f"together what its members make of the same row. Write it outside: {kind}({inner}, ...)."
                )

    @property
    def splits_rows(self) -> bool:
        """Whether rows of a batch are treated differently by it, or by an expression in it."""
        return self.by_row or any(isinstance(m, Composition) and m.splits_rows for m in self.members)

    def __repr__(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        shown = [repr(member) for member in self.members]
        shown += [f"{name}={value!r}" for name, value in self.fields.items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def slug(self) -> str:
        """A name for it that can be that of an adapter: ``stack_language_task``."""
        return re.sub(r"\W+", "_", repr(self)).strip("_").lower()

    def names(self) -> Iterator[str]:
        """The names in it, in order, those in expressions that it holds included."""
        for member in self.members:
            yield from (member,) if isinstance(member, str) else member.names()

    @property
    def fields(self) -> dict[str, Any]:
        """What it says beside its members."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "members"}

    def with_members(self, members: Sequence[str | Composition]) -> Composition:
        """The same expression of other members."""
        return as_kept(type(self), members, self.fields)

    def to_dict(self) -> dict[str, Any]:
        """The expression as plain values, for a file."""
        members = [member if isinstance(member, str) else member.to_dict() for member in self.members]
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.fields.items()}
        return {"type": type(self).__name__, "members": members, **plain}


def as_kept(kind: type[Composition], members: Sequence[str | Composition], fields: dict[str, Any]) -> Composition:
    """An expression with its fields as they are kept: weights that are normalised already, for example."""
    # Past the constructor of the class, which would normalise weights once more.
    made = object.__new__(kind)
    Composition.__init__(made, *members, **fields)
    return made


def alternatives(expression: str | Composition) -> list[str | Composition]:
    """What may act on a row, none of which splits rows."""
    if isinstance(expression, str) or not expression.splits_rows:
        return [expression]
    if expression.by_row:
        return [row for member in expression.members for row in alternatives(member)]
    dividing, stacked = divided_stack(expression)
    return [stacked(row) for row in alternatives(dividing)]


def divided_stack(stack: Composition) -> tuple[Composition, Callable[[Any], Composition]]:
    """The member of a stack that splits rows, and what makes the stack with another one in its place."""
    dividing = next(m for m in stack.members if isinstance(m, Composition) and m.splits_rows)
    place = stack.members.index(dividing)
    before, after = stack.members[:place], stack.members[place + 1 :]
    return dividing, lambda row: stack.with_members((*before, row, *after))
