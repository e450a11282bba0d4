"""What commands print: tables and results to the standard output, progress and remarks to the standard error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Output:
    """Where a command prints.

    Args:
        as_json: print nothing for people to the standard output, only what :meth:`json` gets.

    Of the processes of a distributed run only the first prints.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.first = os.environ.get("RANK", "0") == "0"
        self.results = Console(quiet=not self.first or as_json, highlight=False, soft_wrap=True)
        self.remarks = Console(stderr=True, quiet=not self.first, highlight=False, soft_wrap=True)

    def say(self, text: str, style: str | None = None) -> None:
        """A remark on what is being done."""
        self.remarks.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        """A remark that something may be wrong."""
        self.say(text, "yellow")

    def print(self, text: str, style: str | None = None) -> None:
        """A line of the result."""
        self.results.print(text, style=style, markup=False)

    def raw(self, text: str) -> None:
        """A piece of the result as it comes, without the end of a line."""
        self.results.print(text, end="", markup=False)

    def table(self, title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table: columns of numbers to the right, others to the left."""
        table, cells = Table(title=title, title_justify="left"), [[shown(value) for value in row] for row in rows]
        for place, name in enumerate(columns):
            numbers = all(row[place][:1].isdigit() or row[place] == "-" for row in cells)
            table.add_column(name, justify="right" if numbers and place else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))  # not strings: a peft[cli] would be taken for a colour
        self.results.print(table)

    def json(self, value: Any) -> None:
        """The result for machines."""
        if self.as_json and self.first:
            print(json.dumps(value, indent=2, default=str), flush=True)

    def progress(self) -> Progress:
        """A progress bar, shown only on a terminal; a context."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        live = self.first and self.remarks.is_terminal
        return Progress(*columns, console=self.remarks, transient=True, disable=not live)


def shown(value: Any) -> str:
    """A value of a table as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
