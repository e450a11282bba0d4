"""Data of a training: files or data sets of the hub, and rows in the columns that trainers know."""

from __future__ import annotations

import os
import string
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.cli.command import need
from peft.cli.recipe import DataOptions, near_file
from peft.errors import ConfigError, nearest


READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Ending of a file -> the reader of `datasets`."""

_FORMS = {
    "sft": ({"messages"}, {"prompt", "completion"}, {"text"}),
    "dpo": ({"prompt", "chosen", "rejected"}, {"chosen", "rejected"}),
}
"""Task -> sets of columns, one of which the data must have; the first that is there is taken."""


@dataclass(frozen=True)
class Data:
    """What a training has: ``train`` and ``eval`` are data sets of `datasets`; ``labels`` the names of the classes."""

    train: Any
    eval: Any | None
    labels: list[str] | None = None


def load(options: DataOptions, task: str) -> Data:
    """Read the data of a recipe, in the columns of the task.

    Raises:
        ConfigError: a file is missing or of an unknown kind, or has not the columns; those that it has are named.
    """
    if options.train is None:
        raise ConfigError("data.train is missing: say it in the recipe, or with --data FILE.")
    train = read(options.train, options.split)
    held = read(options.eval, options.eval_split) if options.eval else None
    if options.held_out and held is None:
        if options.held_out >= len(train):
            raise ConfigError(f"data.held_out={options.held_out} leaves nothing to train on: {len(train)} rows.")
        cut = len(train) - options.held_out
        train, held = train.select(range(cut)), train.select(range(cut, len(train)))
    if options.rows is not None:
        train = train.select(range(min(options.rows, len(train))))
    if not len(train):
        raise ConfigError(f"{options.train} has no rows.")
    if task == "classify":
        return _classes(train, held, options)
    return Data(_columns(train, options, task), None if held is None else _columns(held, options, task))


def read(name: str, split: str = "train") -> Any:
    """A file, or a split of a data set on the hub.

    Raises:
        ConfigError: there is no such file, or it is of no known kind.
    """
    need("train", "datasets")
    import datasets

    datasets.disable_progress_bars()
    kind = READERS.get(os.path.splitext(name)[1].lower())
    if os.path.isfile(name):
        if kind is None:
            raise ConfigError(f"{name!r} is of no known kind; there are {', '.join(READERS)}.")
        try:
            return datasets.load_dataset(kind, data_files=name, split="train")
        except Exception as error:
            cause = error.__cause__ or error
            raise ConfigError(f"{name!r} cannot be read as {kind}: {str(cause).splitlines()[0]}") from error
    if kind is not None or os.path.isdir(name):
        missing = f"there is no file {name!r}.{near_file(name)}"
        raise ConfigError(missing if kind else f"{name!r} is a folder; name a file in it.")
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:
        raise ConfigError(f"{name!r} is no file here, and not to be had from the hub: {error}") from error


def fill(template: str, row: dict[str, Any], where: str, replace: Mapping[Any, Any] | None = None) -> str:
    """A template with a row's values in place of the columns in braces, or what stands for them in ``replace``.

    Raises:
        ConfigError: it names a column that the row has not.
    """
    try:
        return template.format(
            **{name: (replace or {}).get(v, v) if isinstance(v, Hashable) else v for name, v in row.items()}
        )
    except (KeyError, IndexError, ValueError) as error:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        missing = next((name for name in names if name not in row), str(error))
        raise ConfigError(
            f"{where}={template!r} names {missing!r}, which the data have not.{nearest(missing, row)} "
            f"Columns: {', '.join(row)}."
        ) from None


def _columns(data: Any, options: DataOptions, task: str) -> Any:
    """The rows with the columns of the task, and no others: what a trainer makes of others is anybody's guess."""
    if options.prompt is not None and task == "sft":
        prompt, completion = options.prompt, str(options.completion)
        return data.map(
            lambda row: {
                "prompt": fill(prompt, row, "data.prompt", options.replace),
                "completion": fill(completion, row, "data.completion", options.replace),
            },
            remove_columns=data.column_names,
        )
    if options.text is not None and task == "sft":
        return data.map(lambda row: {"text": _text(row, options.text)}, remove_columns=data.column_names)
    for names in _FORMS[task]:
        if names <= set(data.column_names):
            return data.select_columns(sorted(names))
    forms = "; or ".join(", ".join(sorted(names)) for names in _FORMS[task])
    more = ", or templates for data.prompt and data.completion" if task == "sft" else ""
    raise ConfigError(
        f"the task {task} needs the columns {forms}{more}; the data have {', '.join(data.column_names)}."
    )


def _text(row: dict[str, Any], source: str | None) -> str:
    source = source or "text"
    if "{" in source:
        return fill(source, row, "data.text")
    if source not in row:
        raise ConfigError(f"data.text={source!r} is no column.{nearest(source, row)} Columns: {', '.join(row)}.")
    return str(row[source])


def _classes(train: Any, held: Any | None, options: DataOptions) -> Data:
    """Columns ``text`` and ``label``, with classes as numbers in the order of their names."""
    name = options.label
    if name not in train.column_names:
        raise ConfigError(f"data.label={name!r} is no column.{nearest(name, train.column_names)}")
    feature = train.features[name]
    names: Sequence[Any] = getattr(feature, "names", None) or sorted(set(train[name]))
    known = {value: place for place, value in enumerate(names)}
    # A ClassLabel column holds numbers.
    known.update({place: place for place in range(len(names)) if hasattr(feature, "names")})

    def row(values: dict[str, Any]) -> dict[str, Any]:
        if values[name] not in known:
            raise ConfigError(
                f"the class {values[name]!r} is in the data to evaluate on, and not in those to train on."
            )
        return {"text": _text(values, options.text), "labels": known[values[name]]}

    train, held = (None if d is None else d.map(row, remove_columns=d.column_names) for d in (train, held))
    return Data(train, held, [str(value) for value in names])
