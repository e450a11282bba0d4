"""From arguments to an exit status: find the command, parse, act, show, and tell errors without a traceback."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import warnings
from typing import Any

from peft._version import __version__
from peft.cli.command import Command, UsageError, add_fields, bracketed, make, parser_of
from peft.cli.output import Output
from peft.cli.recipe import NOT_IN_A_RECIPE, config_class, near_file, read_yaml
from peft.errors import ConfigError, nearest


# Said here as well as by the commands, so that help imports none of them.
COMMANDS = {
    "train": "Train an adapter from a recipe, or from flags alone.",
    "eval": "Loss and accuracy on held-out data, of the base model and of adapters side by side.",
    "generate": "Answer a prompt, or a file of prompts of which each names its adapter.",
    "inspect": "What an adapter is, and what it does to each layer.",
    "merge": "Merge adapters into the files of a model, shard by shard.",
    "convert": "Write an adapter of one tool as that of another.",
    "extract": "The LoRA that turns a base model into a fine-tuned one.",
    "resize": "Give an adapter another rank.",
    "estimate": "The memory that a training takes, from the config of a model alone.",
    "compare": "Train several methods on the same data, one table and one picture.",
    "methods": "The methods, or all about one of them.",
    "doctor": "What is wrong with an environment, a recipe, or a run whose loss does not fall.",
}
"""Command -> what it does, in a line. Each is in a module of its name, or in that of :data:`_MODULES`."""

_MODULES = {"eval": "evaluate", "inspect": "inspection"} | dict.fromkeys(
    ("convert", "extract", "resize"), "conversion"
)


def command(name: str) -> Command:
    """The command of this name.

    Raises:
        UsageError: there is none; the message has the nearest.
    """
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}.{nearest(name, COMMANDS)} There are {', '.join(COMMANDS)}.")
    module = importlib.import_module(f"peft.cli.{_MODULES.get(name, name)}")
    return module.COMMANDS[name] if hasattr(module, "COMMANDS") else module.COMMAND


def run(argv: list[str]) -> int:
    """Do what the arguments ask for; returns the exit status."""
    debug = "--debug" in argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        _help()
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"peft {__version__}")
        return 0
    output = Output("--json" in argv)
    try:
        chosen = command(argv[0])
        options = parse(chosen, argv[1:])
        return _act(chosen, options, output)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        output.say("interrupted", "red")
        return 130
    except Exception as error:
        if debug:
            raise
        usage = isinstance(error, (UsageError, argparse.ArgumentError))
        lines = [str(error) or type(error).__name__, *getattr(error, "__notes__", ())]
        output.say("\n".join([f"error: {lines[0]}", *lines[1:]]), "red")
        output.json({"ok": False, "error": "\n".join(lines), "kind": type(error).__name__})
        if usage:
            output.say(f"See peft {argv[0]} --help." if argv[0] in COMMANDS else "See peft --help.")
        return 2 if usage else 1


def _act(chosen: Command, options: Any, output: Output) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loaders of data fork, of which tokenizers warn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other
        warnings.showwarning = lambda message, *_: output.warn(f"warning: {message}")  # type: ignore[assignment]
        found = chosen.act(options, output)
    output.json(found)
    if output.first and not output.as_json:
        chosen.show(found, output)
    return 1 if found.get("ok") is False else 0


def _help() -> None:
    output = Output()
    output.print(f"peft {__version__}: parameter-efficient fine-tuning\n\nusage: peft COMMAND [ARGUMENTS]\n")
    for name, summary in COMMANDS.items():
        output.print(f"  {name:<10}{summary}")
    output.print("\npeft COMMAND --help tells the arguments of a command, with an example.")


def parse(chosen: Command, argv: list[str]) -> Any:
    """The options of a command.

    Raises:
        UsageError: for arguments that it does not have, and values that they do not take.
    """
    parser = parser_of(chosen)
    short = getattr(chosen.options, "SHORT", {})
    argv = [short.get(name, name) + pair + value for word in argv for name, pair, value in [word.partition("=")]]
    if chosen.recipe:
        argv = _recipe_first(argv)
        try:
            cls = config_class(_method_of(argv))
        except ConfigError as error:
            raise UsageError(str(error)) from error
        add_fields(parser, cls, "adapter.", NOT_IN_A_RECIPE)
    try:
        given = parser.parse_args(bracketed(chosen.options, argv)).clone(with_meta=False).as_dict()
    except argparse.ArgumentError as error:
        raise UsageError(_with_hint(str(error.message).strip(), parser)) from error
    except SystemExit as end:
        if end.code:
            raise UsageError("these arguments cannot be understood.") from end
        raise
    for name in ("json", "debug", *(["recipe"] if chosen.recipe else [])):
        given.pop(name, None)
    try:
        return make(chosen.options, given)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _recipe_first(argv: list[str]) -> list[str]:
    """``RECIPE --set a.b=c`` as flags: ``--recipe RECIPE --a.b=c``. What is set overrides what the file says."""
    files: list[str] = []
    flags: list[str] = []
    place = 0
    while place < len(argv):
        word = argv[place]
        if word == "--set" or word.startswith("--set="):
            pair, step = (word[6:], 1) if word.startswith("--set=") else ((argv[place + 1 :] or [""])[0], 2)
            if "=" not in pair:
                raise UsageError(f"--set takes name=value, as in --set trainer.steps=100; got {pair!r}.")
            flags.append(f"--{pair}")
            place += step
        elif not word.startswith("-") and not files and (place == 0 or _is_whole(argv[place - 1])):
            files.append(word)
            place += 1
        else:
            flags.append(word)
            place += 1
    for file in files:
        if not os.path.isfile(file):
            raise UsageError(f"there is no recipe {file!r}.{near_file(file)}")
    return [*(f"--recipe={file}" for file in files), *flags]


def _is_whole(word: str) -> bool:
    """Whether the word before does not wait for a value."""
    return "=" in word or word in ("--json", "--debug") or not word.startswith("-")


def _method_of(argv: list[str]) -> str:
    """The method that the arguments ask for, before they are parsed: its fields are flags."""
    method = None
    for place, word in enumerate(argv):
        if word.startswith("--recipe=") or word == "--recipe":
            method = read_yaml(word[9:] or (argv[place + 1 :] or [""])[0]).get("method", method)
    for place, word in enumerate(argv):
        if word.startswith("--method=") or word == "--method":
            method = word[9:] or (argv[place + 1 :] or [""])[0]
    return method or "lora"


def _with_hint(message: str, parser: Any) -> str:
    """The message of a parser, with the nearest flag where one is unknown."""
    known = [flag for action in parser._actions for flag in action.option_strings]
    known += ["--set"] if "--recipe" in known else []
    for mark in ("unrecognized arguments: ", "Unrecognized arguments: ", "Key '"):
        if mark in message:
            word = message.split(mark, 1)[1].split("'")[0].split("=")[0].split()[0]
            flag = word if word.startswith("-") else f"--{word}"
            bare = (action.dest for action in parser._actions if not action.option_strings)
            if name := next((name for name in bare if name.startswith(flag.lstrip("-"))), None):
                return f"there is no {flag!r} here: give {name} without a flag."
            return f"there is no {flag!r} here.{nearest(flag, known)}"
    if "Does not validate" in message or "Expected a" in message:
        name, value = message.split('"')[1], message.rpartition("Given value: ")[2] or message.rpartition("value: ")[2]
        kinds = sorted(set(re.findall(r"Expected (?:a )?<class '(\w+)'>", message)) - {"NoneType"})
        return f"--{name} takes {' or '.join(kinds) or 'another kind of value'}, not {value.strip()!r}."
    return message.replace('Parser key "', '"')
