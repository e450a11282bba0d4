"""The command line: ``peft COMMAND``, also ``python -m peft COMMAND``.

Each command is a dataclass of options, a function that does the work and returns what it found, and one that shows
it (:mod:`peft.cli.command`). Flags come from the dataclasses by jsonargparse. It was chosen over tyro and typer as the
only one of them that does all of this: flags of any annotation with a given help text (the fields' own, so that
nothing is said twice); the same values from YAML files, checked in the same way; parsers that are put together at run
time (the fields of ``--adapter`` are those of the method asked for). tyro reads no YAML, typer knows neither
dataclasses nor nested fields. Tables and progress are rich's.

Nothing here is imported by ``import peft``, and nothing here is needed by the library.
"""

from __future__ import annotations

import importlib.util
import sys


_NEEDED = {"jsonargparse": "cli", "rich": "cli", "yaml": "cli"}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 1 (what was asked about is wrong) or 2 (asked in a wrong way).

    Args:
        argv: the arguments; those of the process by default.
    """
    if missing := [module for module in _NEEDED if importlib.util.find_spec(module) is None]:
        print(f"peft's command line needs {', '.join(missing)}: pip install 'peft[cli]'", file=sys.stderr)
        return 2
    from peft.cli.run import run

    return run(sys.argv[1:] if argv is None else argv)
