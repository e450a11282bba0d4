"""Fields of configs: their default, what they are for, and which values they take, declared by `option` in one place.

Documentation and command line are made from the same declarations. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import numbers
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from peft.errors import ConfigChoiceError, ConfigError, ConfigPatternError, ConfigTypeError, PeftWarning, nearest


# Annotations of fields that hold whole numbers, as dataclasses record them.
_WHOLE = (int, int | None, "int", "int | None", "Optional[int]", "dict[str, int] | None")
_NUMBERS = (int, float, "int", "float", "int | None", "float | None")
_BOUNDS = {"minimum", "maximum", "below", "above"}


def option(
    default: Any = None,
    help: str = "",
    *,
    choices: Iterable[Any] | None = None,
    pattern: str | None = None,
    others: Callable[[], bool] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    above: float | None = None,
    needs: str | tuple[str, Any] | None = None,
    instead: str | None = None,
    stuck: float | None = None,
    lacks: str | None = None,
    names: type | None = None,
    nested: type | None = None,
    transient: bool = False,
    own: bool = False,
) -> Any:
    """Declare a config field: its default, what it is for, and which values it may take.

    Args:
        default: the default, or a class or function without arguments that makes it (`dict`, `list`).
        help: one or two sentences for the user.
        choices: the values allowed, apart from None.
        pattern: a regular expression; strings that match it whole are allowed besides `choices`.
        others: says whether somebody else may understand strings besides these; then any is allowed.
        minimum, maximum, below, above: bounds of a number; the last two are exclusive. A field annotated `int` that
            has a bound takes whole numbers only.
        needs: another field, or one and its value (or a tuple of them), without which this one does nothing; a value
            given in vain is told in a warning.
        instead: for a field that never does anything: what does. A value given for it is told in a warning.
        stuck: a value with which the adapter changes nothing, and never will; it is told in a warning.
        lacks: for a field that counts only at some modules: what a model without them lacks.
            Where such a module is met, :func:`peft.usage.counts` says so; without, a value is told in a warning.
        names: for a field of names of modules: `set`, if it takes a list of them, kept as a set, or a string that is
            a regular expression; `list`, if it takes a list alone; `str`, if one name may stand for a list of one;
            `dict`, if it has values by name, or by regular expression, whose bounds are then those of the field.
        nested: dataclass of a field that holds further options; a dict given for it becomes an instance.
        transient: the field belongs to the process and not to the adapter: it is not saved.
        own: the field is this library's alone: a file has it only where it is not the default, so that others read it.
    """
    rules = {name: value for name, value in locals().items() if name not in ("default", "help")}
    if choices is not None:
        rules["choices"] = tuple(choices)
    metadata = {"help": help, **{k: v for k, v in rules.items() if v is not None and v is not False}}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def value_of(value: Any) -> Any:
    """The value of a member of an enum, anything else as it is."""
    return value.value if isinstance(value, enum.Enum) else value


def _serves(value: Any, wanted: Any) -> bool:
    """Whether a field that another one needs has the value, or one of the values, that it has to have."""
    if wanted is True:
        return bool(value)
    return _is_choice(value, wanted if isinstance(wanted, tuple) else (wanted,))


def _is_choice(value: Any, choices: Iterable[Any]) -> bool:
    # `1 == True` holds in Python, but 1 is not what a field for True or "gaussian" asks for
    return any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in choices)


def check_choice(where: str, value: Any, rules: Any) -> None:
    """Raise ConfigChoiceError for a value that is none of ``rules["choices"]``; ``where`` names config and field."""
    choices, pattern = rules.get("choices"), rules.get("pattern")
    if choices is None or _is_choice(value, choices):
        return
    if pattern and isinstance(value, str) and re.fullmatch(pattern, value):
        return
    if isinstance(value, str) and (others := rules.get("others")) is not None and others():
        return
    allowed = [repr(value_of(c)) for c in choices] + ([repr(pattern.replace(r"\d+", "<number>"))] if pattern else [])
    hint = nearest(value_of(value), [value_of(c) for c in choices])
    raise ConfigChoiceError(f"{where}={value_of(value)!r} is not valid.{hint} Allowed: {', '.join(allowed)}.")


def _check_bounds(where: str, value: Any, rules: Any, whole: bool) -> None:
    low, high, below, above = (rules.get(rule) for rule in ("minimum", "maximum", "below", "above"))
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigTypeError(f"{where}={value!r} is not valid: it must be a {'whole number' if whole else 'number'}.")
    bounds = [(low, "at least", low is None or value >= low), (high, "at most", high is None or value <= high),
              (above, "above", above is None or value > above),
              (below, "below", below is None or value < below)]  # fmt: skip
    if not all(holds for _, _, holds in bounds):
        asked = " and ".join(f"{word} {bound}" for bound, word, _ in bounds if bound is not None)
        raise ConfigError(f"{where}={value!r} is not valid: it must be {asked}.")


def _named(where: str, value: Any, names: type) -> Any:
    """A value of a field of names, in the collection that the field keeps them in, each regular expression looked at.

    Raises:
        ConfigTypeError: it is of another type. ConfigPatternError: a regular expression is none.
    """
    if value is None:
        return None
    if names is dict:
        if not isinstance(value, dict):
            raise ConfigTypeError(f"{where} must be a dict of module name -> value, got {value!r}.")
        check_regexes(where, value, compiled)
        return value
    if isinstance(value, str):
        if names is list:
            raise ConfigTypeError(f"{where} must be a list of names, got {value!r}. Write [{value!r}].")
        if names is str:
            return [value]
        check_regexes(where, [value], re.compile)
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value):
        return set(value) if names is set else value if isinstance(value, list) else sorted(value)
    raise ConfigTypeError(f"{where} must be a list of names, or a string; got {value!r}.")


def check_regexes(where: str, patterns: Iterable[Any], read: Callable[[Any], re.Pattern]) -> None:
    """Raise ConfigPatternError for a pattern that ``read`` cannot compile."""
    for pattern in patterns:
        try:
            read(pattern)
        except (re.error, TypeError) as error:
            raise ConfigPatternError(f"{where} has {pattern!r}, which is no regular expression ({error}).") from None


@functools.lru_cache(maxsize=4096)
def compiled(key: str) -> re.Pattern:
    """What finds the names that a pattern by name means: those that end with it, or match it."""
    return re.compile(rf"(.*\.)?({key})")


@dataclass
class Options:
    """A group of fields declared with `option`, validated when an instance is made."""

    def __new__(cls, *args: Any, **kwargs: Any):
        # Before `__init__`, whose own error would not name the nearest field.
        known = cls._known_keywords()
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            hint = nearest(unknown[0], known)
            if unknown[0] in ("lr", "learning_rate"):
                hint = " The learning rate is the optimizer's, or the trainer's."
            elif unknown[0] == "rank" and "r" in known:
                hint = " Did you mean 'r'?"
            raise TypeError(f"{cls.__name__} has no field {unknown[0]!r}.{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            nested = field.metadata.get("nested")
            if nested is not None and isinstance(value, dict) and (value or field.default_factory is not dict):
                value = nested(**value)
                setattr(self, field.name, value)
            where = f"{type(self).__name__}: {field.name}"
            if (names := field.metadata.get("names")) is not None:
                value = _named(where, value, names)
                setattr(self, field.name, {} if value is None and field.default_factory is dict else value)
            if value is None:
                continue
            check_choice(where, value, field.metadata)
            numbers_of = {f"{where}[{key!r}]": value[key] for key in value} if names is dict else {where: value}
            bounded = bool(field.metadata.keys() & _BOUNDS)
            if names is dict or bounded or ("help" in field.metadata and field.type in _NUMBERS):
                for entry, number in numbers_of.items():
                    _check_bounds(entry, number, field.metadata, whole=bounded and field.type in _WHOLE)
            self._tell_idle(field, value)

    def _tell_idle(self, field: dataclasses.Field, value: Any) -> None:
        """Warn of a value that changes nothing."""
        rules = field.metadata
        needs = rules.get("needs")
        name, wanted = needs if isinstance(needs, tuple) else (needs, True)
        if value == field.default or value == {}:
            return
        if (reason := rules.get("instead")) is None:
            if name is not None and not _serves(getattr(self, name), wanted):
                values = " or ".join(
                    repr(value_of(one)) for one in (wanted if isinstance(wanted, tuple) else (wanted,))
                )
                reason = f"it counts only with {name if wanted is True else f'{name}={values}'}."
            elif value == rules.get("stuck"):
                reason = "with it the adapter changes nothing, and no gradient ever changes that."
        if reason is not None:
            self._tell_vain(field.name, reason)

    def _tell_vain(self, name: str, reason: str) -> None:
        """Warn that the value of a field changes nothing, and why."""
        told = f"{type(self).__name__}: {name}={getattr(self, name)!r} does nothing: {reason}"
        warnings.warn(told, PeftWarning, stacklevel=6)

    @classmethod
    def _known_keywords(cls) -> Any:
        parameters = inspect.signature(cls.__init__).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return _Everything()
        return [name for name in parameters if name != "self"]


class _Everything:
    def __contains__(self, item: object) -> bool:
        return True
