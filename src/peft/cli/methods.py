"""``peft methods``: the registered methods, or one of them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from peft.cli.command import Command, UsageError, argument
from peft.cli.output import Output
from peft.cli.recipe import VARIANTS, resolve
from peft.config import Options, option
from peft.errors import nearest
from peft.tools import catalogue
from peft.tools.learning_rates import LEARNING_RATES


@dataclass
class MethodsOptions(Options):
    """Which method."""

    name: str | None = argument("A method; all of them if left out.", "?")
    find: str | None = option(None, "Only methods that have this word in what is said of them.")


def act(options: MethodsOptions, output: Output) -> dict[str, Any]:
    """The methods as plain values."""
    known = {method.key: method for method in catalogue.methods()}
    if options.name is not None:
        name, fields = resolve(options.name)
        if name not in known:
            hint = nearest(name, [*known, *VARIANTS])
            raise UsageError(f"there is no method {options.name!r}.{hint} `peft methods` lists them.")
        return {"ok": True, "set": fields, **_page(known[name])}
    rows = [_row(method) for method in known.values()]
    if options.find is not None:
        word = options.find.lower()
        rows = [row for row in rows if word in " ".join(map(str, row.values())).lower()]
    return {"ok": bool(rows), "methods": rows}


def _row(method: catalogue.Method) -> dict[str, Any]:
    name, formula = method.words
    rate = LEARNING_RATES.get(method.key)
    return {"method": method.key, "name": name, "what": " ".join(formula.split()),
            "learning_rate": None if rate is None else rate.value}  # fmt: skip


def _page(method: catalogue.Method) -> dict[str, Any]:
    own, shared = method.fields()
    use = inspect.cleandoc(method.config.__doc__ or "")
    rate = LEARNING_RATES.get(method.key)
    fields = [
        {"field": f.name, "default": repr(catalogue.default_of(f)), "help": f.metadata.get("help", "")} for f in own
    ]
    return {**_row(method), "config": method.config.__name__, "use": use, "fields": fields,
            "rate_source": rate and rate.source, "shared": [f.name for f in shared]}  # fmt: skip


def show(found: dict[str, Any], output: Output) -> None:
    """A table, or a page."""
    if "methods" in found:
        rows = [[row["method"], row["learning_rate"], _short(row["what"])] for row in found["methods"]]
        output.table(None, ["method", "rate", "what it is"], rows)
        output.print(f"Names of settings: {', '.join(VARIANTS)}. peft methods NAME tells all about one.")
        return
    output.print(f"{found['name']}: {found['what']}\n\n{found['use']}\n")
    if found["learning_rate"]:
        output.print(f"Learning rate to begin with: {found['learning_rate']:g} ({found['rate_source']}).")
    if found["set"]:
        output.print(f"This name sets {', '.join(f'{k}={v}' for k, v in found['set'].items())}.")
    output.table(found["config"], ["field", "default", "help"],
                 [[f["field"], f["default"], f["help"]] for f in found["fields"]])  # fmt: skip
    output.print(f"Also: {', '.join(found['shared'])}.")


def _short(text: str, most: int = 90) -> str:
    text = re.sub(r"\s*\((?:arXiv|ICLR|NeurIPS)[^)]*\)", "", text)
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


COMMAND = Command(
    "methods",
    "The methods with their formulas and learning rates, or one method's page.",
    "  peft methods\n  peft methods lora\n  peft methods --find rotation",
    MethodsOptions,
    act,
    show,
)
