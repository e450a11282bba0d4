"""What a config asks for and does not happen is said, for every method, in one warning at the end of an injection.

Code that looks a module up in a field of a config (:func:`peft.config.resolve_pattern`, ``targeting.matches``) notes
which entry it has found; code that meets a module for which a field counts says which field. Whoever injects an
adapter opens a :func:`recording`; the entries that nothing has found by its end are told, each with the nearest name
that the model has, and the fields that count at no module.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft.errors import UnusedEntryWarning


class Usage:
    """The entries of one config that were found so far.

    Attributes:
        asked: field -> what the user gave, ``field.inner`` for options within it. What the library fills in later is
            not the user's, and not told.
        found: id of a collection that was searched -> the entries that were found in it.
        counted: fields that count only at some modules (``option(lacks=...)``), and have met one.
        remarks: sentences about what else does not happen as asked.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.asked = dict(_fields(config))
        self.found: dict[int, set[Any]] = {}
        self.counted: set[str] = set()
        self.remarks: dict[str, None] = {}

    def unused(self, ignored: Iterable[str] = ()) -> dict[str, list[Any]]:
        """Field -> the entries that were looked for and never found."""
        result = {}
        for field, value in self.asked.items():
            if value is None or id(value) not in self.found:
                continue
            entries: Any = value if isinstance(value, (list, tuple, set, frozenset, dict, range)) else [value]
            found: Any = self.found[id(value)]
            if left := [entry for entry in entries if entry not in found and entry not in ignored]:
                result[field] = sorted(left, key=str) if isinstance(value, (set, frozenset)) else left
        return result

    def idle(self) -> Iterator[str]:
        """A sentence for each field that counts at no module of the model."""
        for field in dataclasses.fields(self.config):
            value, lacks = self.asked[field.name], field.metadata.get("lacks")
            if lacks and value and value != field.default and field.name not in self.counted:
                yield f"{field.name}={value!r} does nothing: {lacks}."

    def tell(self, names: Callable[[], Iterable[str]], ignored: Iterable[str], fields: bool = True) -> None:
        """Give the one warning, if there is anything to say."""
        unused, said = self.unused(ignored), []
        if unused:
            keys = list(names())
            listed = "; ".join(f"{field}: {_with_nearest(entries, keys)}" for field, entries in unused.items())
            said.append(f"these entries match nothing in the model, or nothing that is adapted: {listed}.")
        said += [*(self.idle() if fields else ()), *self.remarks]
        if said:
            warnings.warn(f"{type(self.config).__name__}: " + " ".join(said), UnusedEntryWarning, stacklevel=4)


def _fields(options: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        yield above + field.name, value
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{above}{field.name}.")


def _with_nearest(entries: list[Any], keys: list[str]) -> str:
    shown = [f"{entry!r}{_hint(entry, keys)}" for entry in entries[:10]]
    return ", ".join(shown) + (f" and {len(entries) - 10} more" if len(entries) > 10 else "")


def _hint(entry: Any, keys: list[str]) -> str:
    close = near(str(entry), keys, cutoff=0.5) if isinstance(entry, str) else []
    if not close:
        return ""
    if close[0] == entry:
        return " (there, but no such thing as this field names, or left out by another)"
    return f" (nearest: {close[0]!r})"


def near(name: str, keys: Iterable[str], cutoff: float = 0.4) -> list[str]:
    """Names close to one asked for, which is compared with as many last parts of each as it has itself."""
    depth = name.count(".") + 1
    tails = dict.fromkeys(".".join(key.split(".")[-depth:]) for key in keys)
    return difflib.get_close_matches(name, list(tails), n=3, cutoff=cutoff)


def tell_misspelt(function: Callable, given: Iterable[str], others: Iterable[str] = ()) -> None:
    """Warn of keywords that a function takes and does not read, if they are close to one that it reads.

    Args:
        given: the keywords that it has no parameter for. others: those among them that it reads.
    """
    read = [*inspect.signature(function).parameters, *others] if given else ()
    for name in [name for name in given if name not in read]:
        if close := difflib.get_close_matches(name, read, n=1, cutoff=0.85):
            said = f"{function.__name__} has no keyword {name!r}, which does nothing. Did you mean {close[0]!r}?"
            warnings.warn(said, UnusedEntryWarning, stacklevel=4)


_current: ContextVar[Usage | None] = ContextVar("usage", default=None)


@contextmanager
def recording(
    config: Any, names: Callable[[], Iterable[str]], ignored: Iterable[str] = (), fields: bool = True
) -> Iterator[None]:
    """A context that ends with one warning of what the config asks for in vain; one inside another is part of it.

    Args:
        names: gives the names that the entries could have meant; called only if there is something to tell.
        ignored: entries whose absence is no mistake. fields: whether :func:`counts` is called for all that count.
    """
    if _current.get() is not None:
        yield
        return
    usage = Usage(config)
    token = _current.set(usage)
    try:
        yield
    finally:
        _current.reset(token)
    usage.tell(names, ignored, fields)


def note(collection: Any, entries: Iterable[Any] = ()) -> None:
    """Say that a field's value was searched, and which of its entries were found."""
    usage = _current.get()
    if usage is not None and collection is not None:
        usage.found.setdefault(id(collection), set()).update(entries)


def counts(field: str) -> None:
    """Say that a module is there for which this field of the config counts."""
    usage = _current.get()
    if usage is not None:
        usage.counted.add(field)


def remark(sentence: str) -> None:
    """Add a sentence to the warning: something else that does not happen as asked."""
    usage = _current.get()
    if usage is not None:
        usage.remarks[sentence] = None
