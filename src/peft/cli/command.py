"""What a command is, and how its flags are made from the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from peft.cli.output import Output
from peft.config import Options
from peft.errors import ConfigError, PeftError
from peft.options import value_of


class UsageError(PeftError, ValueError):
    """A command was asked for in a wrong way: exit status 2."""


class Failure(PeftError):
    """What a command was asked about is wrong: exit status 1."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: as it is typed. summary: one line. example: what a user would type.
        options: the dataclass of its arguments. It may say ``SHORT`` (a flag -> the one that it stands for) and
            ``UNUSED`` (fields of options within it that the command does not read).
        act: does the work: (options, output) -> what ``--json`` prints. Its key "ok" set to False is exit status 1.
        show: prints that for people.
        recipe: whether it takes a recipe, ``--set`` and the fields of ``--adapter``.
    """

    name: str
    summary: str
    example: str
    options: type
    act: Callable[[Any, Output], dict[str, Any]]
    show: Callable[[dict[str, Any], Output], None]
    recipe: bool = False


def argument(help: str, nargs: str | None = None, default: Any = None) -> Any:
    """A positional argument of a command. ``nargs`` is argparse's: None, "?", "*" or "+"."""
    metadata = {"help": help, "positional": True, "nargs": nargs}
    return dataclasses.field(default=default, metadata=metadata)


def output_of(options: Any) -> str:
    """Where a command is to write.

    Raises:
        ConfigError: that was not said.
    """
    if options.output is None:
        raise ConfigError("where to write is missing: say it with --output, or -o.")
    return options.output


def need(extra: str, *modules: str) -> None:
    """Make sure that libraries are installed.

    Raises:
        UsageError: one is not; the message has the command that installs it.
    """
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise UsageError(f"this needs {', '.join(missing)}: pip install 'peft[{extra}]'")


def parser_of(command: Command) -> ArgumentParser:
    """The parser of a command, without the fields of ``--adapter``."""
    parser = ArgumentParser(
        prog=f"peft {command.name}",
        description=command.summary,
        epilog=f"example:\n{command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        usage=f"peft {command.name} [RECIPE] [--set NAME=VALUE ...] [FLAGS]" if command.recipe else None,
    )
    parser.allow_abbrev = False  # a slip, as --adapter.rank, is no other field that begins so
    if command.recipe:
        parser.add_argument("--recipe", action="config", help="The recipe, a YAML file; may also come first, bare.")
    # the fields of ``--adapter`` come one by one, as those of the method that is asked for
    add_fields(parser, command.options, skip={"adapter"} if command.recipe else getattr(command.options, "UNUSED", ()))
    parser.add_argument("--json", action="store_true", help="Print what was found as JSON, and nothing else.")
    parser.add_argument("--debug", action="store_true", help="Show where an error came from.")
    return parser


def add_fields(parser: ArgumentParser, cls: type, prefix: str = "", skip: Iterable[str] = ()) -> None:
    """Add a flag for each field of a dataclass; the help is the field's own. Nested dataclasses get ``--a.b``."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if f"{prefix}{field.name}" in skip or not field.init:
            continue
        inner = field.metadata.get("nested")
        if inner is not None and issubclass(inner, Options) and not prefix:
            add_fields(parser, inner, f"{field.name}.", skip)
            continue
        free = {"pattern", "nested"} & set(
            field.metadata
        )  # what the annotation does not tell, the field checks itself
        kind = Any if free else hints[field.name]
        text = field.metadata.get("help", "").replace("%", "%%")
        if field.metadata.get("positional"):
            nargs = field.metadata["nargs"]
            more = {"nargs": nargs} if nargs else {}
            parser.add_argument(field.name, type=str, help=text, **more)
            continue
        choices = field.metadata.get("choices")
        if choices and not any(str(choice) in text for choice in choices):
            text += f" One of {', '.join(str(value_of(choice)) for choice in choices)}."
        default = field.default
        if default is not dataclasses.MISSING and default is not None and not isinstance(default, type):
            text += f" (default: {value_of(default)})"
        flags = [f"--{prefix}{field.name}", *(["-o"] if field.name == "output" else [])]
        metavar: Any = {} if kind is bool else {"metavar": "VALUE"}
        parser.add_argument(*flags, type=kind, help=text, default=argparse.SUPPRESS, **metavar)


def bracketed(cls: type, argv: list[str]) -> list[str]:
    """Arguments whose lists are in brackets: ``--methods lora,ia3`` as ``--methods [lora,ia3]``; lists of one, too."""
    flags, words = dict(_lists(cls)), []
    for place, word in enumerate(argv):
        flag, is_pair, value = word.partition("=")
        if is_pair and flag in flags and _bare_list(value, flags[flag]):
            word = f"{flag}=[{value}]"
        elif place and argv[place - 1] in flags and _bare_list(word, flags[argv[place - 1]]):
            word = f"[{word}]"
        words.append(word)
    return words


def _bare_list(value: str, alone: bool) -> bool:
    """Whether a value is a list without brackets. alone: the flag takes nothing but lists, so one entry is one."""
    return ("," in value or (alone and value not in ("", "null"))) and not value.startswith(("[", "{", "--"))


def _lists(cls: type, prefix: str = "") -> Iterable[tuple[str, bool]]:
    """Flags of the fields of a dataclass that take lists, and whether they take nothing else."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = field.metadata.get("nested")
        if inner is not None and issubclass(inner, Options) and not prefix:
            yield from _lists(inner, f"{field.name}.")
            continue
        hint = hints[field.name]
        kinds = {hint} if typing.get_origin(hint) is list else {*typing.get_args(hint)} - {type(None)}
        lists = {kind for kind in kinds if typing.get_origin(kind) is list}
        if lists:
            yield f"--{prefix}{field.name}", lists == kinds


def make(cls: type, values: dict[str, Any]) -> Any:
    """An instance of a dataclass of options from the values of a parser, nested ones included."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    given = {}
    for name, value in values.items():
        inner = known[name].metadata.get("nested") if name in known else None
        if name in known:
            given[name] = make(inner, value) if inner is not None and isinstance(value, dict) else value
    return cls(**given)
