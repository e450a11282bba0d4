"""Pictures of trainings and adapters: loss curves, updates by layer, spectra, memory, methods side by side.

Needs matplotlib: ``pip install 'peft[plots]'``. Each function takes plain data, returns the figure, and writes it to
the files that it is given; their endings say the format (``.png``, ``.svg``, ``.pdf``). The background is opaque, so a
picture can be read on any page; ``dark=True`` is for dark ones. Series differ by line style or marker, not by colour
alone, and the colours stay apart for colour-blind readers and have at least three times the background's contrast.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure

File = str | os.PathLike

LIGHT = {
    "page": "#ffffff",
    "ink": "#24292f",
    "grid": "#d8dee4",
    "depth": (0.0, 0.85),
    "series": ("#0f82e0", "#dc5200", "#1f6b4f", "#9a5aa8", "#150f38", "#5c3700"),
}
DARK = {
    "page": "#15181e",
    "ink": "#e6e9ee",
    "grid": "#343a44",
    "depth": (0.3, 1.0),
    "series": ("#3b8cff", "#d5702a", "#39e08a", "#b56fb8", "#d8f4ff", "#eedd00"),
}
"""Colours of the two themes. The series were searched for the largest least distance, seen with any two receptors."""

_LINES = ("-", (0, (6, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = ("", "///", "...", "\\\\\\", "xx", "++")
_FEW = 8  # series that a legend can name
_BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@contextmanager
def _drawing(dark: bool, files: Iterable[File], size: tuple[float, float]) -> Any:
    """(figure, colours): an empty figure in a theme, written to the files at the end."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'peft[plots]'.") from error
    colours: dict[str, Any] = DARK if dark else LIGHT
    style: Any = {
        "font.size": 10,
        "svg.hashsalt": "peft",  # the same data give the same file
        "text.color": colours["ink"],
        "axes.labelcolor": colours["ink"],
        "axes.edgecolor": colours["ink"],
        "axes.facecolor": colours["page"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": colours["grid"],
        "xtick.color": colours["ink"],
        "ytick.color": colours["ink"],
        "legend.frameon": False,
        "figure.facecolor": colours["page"],
        "hatch.color": colours["page"],
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, colours
        for file in files:
            metadata = {"Date": None} if os.fspath(file).endswith(".svg") else None
            figure.savefig(file, dpi=150, metadata=metadata)


def loss_curves(
    runs: Mapping[str, Sequence[Any]], *files: File, label: str = "loss (nats)", dark: bool = False
) -> Figure:
    """Losses over steps, of one run or of several.

    Long curves are drawn twice, as they are and smoothed. Losses on held-out data are the points with a dashed line.

    Args:
        runs: name -> the ``log_history`` of a trainer, whose entries have "step" and "loss" or "eval_loss"; or the
            losses of step 1, 2, ...
        files: where to write it.
        label: what the losses are, with their unit.
        dark: for a dark page.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no run has a loss.

    Examples:
        >>> figure = loss_curves({"rank 8": [2.3, 1.1, 0.7, 0.6], "rank 2": [2.3, 1.4, 1.0, 0.9]})
    """
    curves = {name: (_points(history, "loss"), _points(history, "eval_loss")) for name, history in runs.items()}
    if not any(trained or held for trained, held in curves.values()):
        raise ValueError(f"no losses to draw: the runs {list(runs)} have no entry with 'loss' or 'eval_loss'.")
    with _drawing(dark, files, (7, 4.2)) as (figure, colours):
        axes = figure.subplots()
        for place, (name, (trained, held)) in enumerate(curves.items()):
            colour, line, marker = _style(place, colours)
            if trained:
                steps, losses = zip(*trained)
                smooth = _smoothed(losses)
                if smooth != losses:
                    axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(steps, smooth, color=colour, linestyle=line, linewidth=1.8, label=name)
            if held:
                style = {"linestyle": "--", "marker": marker, "linewidth": 1, "markersize": 5}
                axes.plot(*zip(*held), color=colour, label=f"{name}, held out", **style)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure


def update_map(
    updates: Mapping[str, float], *files: File, label: str = "|update| / |weight|", dark: bool = False
) -> Figure:
    """A heat map of what an adapter changed: layers from top to bottom, modules from left to right.

    Args:
        updates: module name -> size of its update; the first number in the name is the layer, what stands behind it
            the module. Values that are no finite numbers are marked by a cross.
        files, dark: see :func:`loss_curves`.
        label: what the values are.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there are no updates.

    Examples:
        >>> figure = update_map({"layers.0.attn.q": 0.02, "layers.0.attn.v": 0.05, "layers.1.attn.q": 0.03})
    """
    if not updates:
        raise ValueError("no updates to draw: the mapping is empty.")
    table, rows, columns = _grid(updates)
    finite = [value for value in updates.values() if math.isfinite(value)]
    with _drawing(dark, files, (3 + 0.55 * len(columns), max(3.6, 2.2 + 0.26 * len(rows)))) as (figure, colours):
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm, Normalize

        low, high = min(finite, default=0.0), max(finite, default=1.0)
        wide = 0 < low < high / 50  # a linear scale would show the largest alone
        axes = figure.subplots()
        values = [[table.get((row, column), math.nan) for column in columns] for row in rows]
        scale = LogNorm(low, high) if wide else Normalize(min(0.0, low), high or 1.0)
        shown = colormaps["cividis"].with_extremes(bad=colours["page"])
        drawn = axes.imshow(values, cmap=shown, norm=scale, aspect="auto", interpolation="nearest")
        for place in itertools.product(range(len(columns)), range(len(rows))):
            value = values[place[1]][place[0]]
            if not math.isfinite(value):
                mark = "×" if (rows[place[1]], columns[place[0]]) in table else "–"
                axes.text(*place, mark, ha="center", va="center", color=colours["ink"])
        axes.grid(False)
        every = max(1, len(rows) // 32)
        axes.set_yticks(range(0, len(rows), every), rows[::every])
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
        axes.set(ylabel="layer")
        figure.colorbar(drawn, label=label)
    return figure


def spectra(
    values: Mapping[str, Sequence[float]],
    *files: File,
    label: str = "singular value of the update",
    dark: bool = False,
) -> Figure:
    """The singular values of updates, from the largest, on a logarithmic scale.

    Args:
        values: module name -> its singular values; of more than eight modules the colour says how deep each stands.
        files, dark: see :func:`loss_curves`.
        label: what the values are.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no value is above zero.

    Examples:
        >>> figure = spectra({"layers.0.q_proj": [1.2, 0.4, 0.05], "layers.1.q_proj": [0.9, 0.8, 0.3]})
    """
    sorted_values = {name: sorted((float(v) for v in each if v > 0), reverse=True) for name, each in values.items()}
    drawn = {name: each for name, each in sorted_values.items() if each}
    if not drawn:
        raise ValueError(f"no spectrum to draw: no singular value of {list(values)} is above zero.")
    with _drawing(dark, files, (7, 4.2)) as (figure, colours):
        axes = figure.subplots()
        scale = _depth(len(drawn), colours)
        for place, (name, each) in enumerate(drawn.items()):
            indices = range(1, len(each) + 1)
            if len(drawn) <= _FEW:
                colour, line, marker = _style(place, colours)
                axes.plot(indices, each, color=colour, linestyle=line, marker=marker, markersize=4, label=name)
            else:
                axes.plot(indices, each, color=scale.to_rgba(place), linewidth=1)
        axes.set(xlabel="index, from the largest", ylabel=label, yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(drawn) <= _FEW:
            axes.legend()
        else:
            bar = figure.colorbar(scale, ax=axes, label="place in the model", ticks=[0, len(drawn) - 1])
            bar.ax.set_yticklabels(["first", "last"])
    return figure


def memory_bars(
    settings: Mapping[str, Mapping[str, float]], *files: File, limit: float | None = None, dark: bool = False
) -> Figure:
    """The memory of several settings, one bar each, divided into its parts.

    Args:
        settings: name -> part -> bytes, such as the ``weights``, ``gradients``, ``optimizer`` and ``activations`` of
            :class:`~peft.MemoryEstimate`.
        files, dark: see :func:`loss_curves`.
        limit: bytes that there are, drawn as a line.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there are no settings.

    Examples:
        >>> parts = {"weights": 14e9, "gradients": 1e7, "optimizer": 2e7, "activations": 5e9}
        >>> figure = memory_bars({"LoRA": parts, "QLoRA": {**parts, "weights": 4e9}}, limit=16e9)
    """
    if not settings:
        raise ValueError("no memory to draw: the mapping is empty.")
    totals = {name: sum(parts.values()) for name, parts in settings.items()}
    unit = _unit([*totals.values(), limit or 0])
    names = list(settings)
    kinds = list(dict.fromkeys(part for parts in settings.values() for part in parts))
    with _drawing(dark, files, (7, 1.6 + 0.5 * len(names))) as (figure, colours):
        axes = figure.subplots()
        left = dict.fromkeys(names, 0.0)
        for place, part in enumerate(kinds):
            widths = [settings[name].get(part, 0) / _BYTES[unit] for name in names]
            look = {"color": _style(place, colours)[0], "hatch": _HATCHES[place % len(_HATCHES)]}
            axes.barh(names, widths, left=list(left.values()), height=0.62, label=part, linewidth=0, **look)
            left = {name: left[name] + width for name, width in zip(names, widths)}
        for name, end in left.items():
            box = {"facecolor": colours["page"], "edgecolor": "none", "pad": 1}
            beside: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "bbox": box}
            axes.annotate(f"{end:.3g} {unit}", (end, name), **beside)
        if limit is not None:
            there = limit / _BYTES[unit]
            axes.axvline(there, color=colours["ink"], linestyle="--", label=f"limit, {there:.3g} {unit}", zorder=1.5)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.grid(False, axis="y")
        axes.set(xlabel=f"memory ({unit})")
        figure.legend(loc="outside upper center", ncols=_columns(figure, [*kinds, "limit, 24.0 GB"]))
    return figure


def comparison(
    runs: Sequence[Mapping[str, Any]], *files: File, quality: str = "accuracy (%)", dark: bool = False
) -> Figure:
    """Methods side by side: quality over trained parameters, over training time and over memory.

    Args:
        runs: one mapping each, with "name" and "quality", and of "parameters", "seconds" and "bytes" what is known;
            a panel is drawn for each of the three that some run has.
        files, dark: see :func:`loss_curves`.
        quality: what the quality is, with its unit.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no run has a quality and one of the three costs.

    Examples:
        >>> lora = {"name": "LoRA", "quality": 88.2, "parameters": 460_800, "seconds": 124, "bytes": 2.2e9}
        >>> ia3 = {"name": "IA3", "quality": 87.5, "parameters": 57_600, "seconds": 71, "bytes": 2.1e9}
        >>> figure = comparison([lora, ia3])
    """
    known = [run for run in runs if run.get("quality") is not None]
    panels = [key for key in ("parameters", "seconds", "bytes") if any(run.get(key) for run in known)]
    if not panels:
        raise ValueError("nothing to compare: no run has 'quality' and one of 'parameters', 'seconds' and 'bytes'.")
    unit = _unit([run.get("bytes") or 0 for run in known])
    labels = {"parameters": "trained parameters", "seconds": "training time (s)", "bytes": f"peak memory ({unit})"}
    with _drawing(dark, files, (max(5.0, 3.2 * len(panels)), 4)) as (figure, colours):
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, key in zip(axes, panels):
            for place, run in enumerate(known):
                if run.get(key):
                    x = run[key] / (_BYTES[unit] if key == "bytes" else 1)
                    look = {"color": _style(place, colours)[0], "marker": _MARKERS[place % len(_MARKERS)]}
                    panel.plot([x], [run["quality"]], linestyle="", markersize=8, alpha=0.9, label=run["name"], **look)
            panel.set(xlabel=labels[key])
            panel.margins(0.12)
            if key == "parameters":
                panel.set_xscale("log")
        axes[0].set(ylabel=quality)
        handles = {text: handle for each in axes for handle, text in zip(*each.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=_columns(figure, handles))
    return figure


def _points(history: Sequence[Any], key: str) -> list[tuple[float, float]]:
    """(step, loss) of a log, or of a list of losses."""
    if history and not isinstance(history[0], Mapping):
        return [(step, float(loss)) for step, loss in enumerate(history, 1)] if key == "loss" else []
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def _smoothed(losses: tuple[float, ...]) -> tuple[float, ...]:
    """Centred means over a twentieth of a long curve; a short one as it is."""
    half = len(losses) // 40
    windows = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
    return tuple(sum(window) / len(window) for window in windows) if half else losses


def _style(place: int, colours: Mapping[str, Any]) -> tuple[str, Any, str]:
    """Colour, line and marker of the series at a place; they repeat after different counts."""
    series = colours["series"]
    turn = place + place // len(series)  # a colour comes again with another line
    return series[place % len(series)], _LINES[turn % len(_LINES)], _MARKERS[place % len(_MARKERS)]


def _grid(updates: Mapping[str, float]) -> tuple[dict[tuple[str, str], float], list[str], list[str]]:
    """(row, column) -> value, the rows, the columns: names cut at their first number."""
    cut: dict[str, tuple[str, str, str]] = {}
    for name in updates:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        cut[name] = ("", "–", name) if at is None else (".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :]))
    stacks: dict[str, set[str]] = {}
    for stack, _, module in cut.values():
        stacks.setdefault(module, set()).add(stack)
    # Encoder and decoder have modules of one name: there, what stands before the number is needed to tell them apart.
    placed = {
        name: (row, module if len(stacks[module]) == 1 else f"{stack}.*.{module}")
        for name, (stack, row, module) in cut.items()
    }
    table = {place: float(updates[name]) for name, place in placed.items()}
    rows = sorted({row for row, _ in table}, key=lambda row: (row == "–", 0 if row == "–" else int(row)))
    return table, rows, list(dict.fromkeys(column for _, column in table))


def _depth(count: int, colours: Mapping[str, Any]) -> Any:
    """Colours of a row of modules, from the first to the last, without those that the page would swallow."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    low, high = colours["depth"]
    part = [colormaps["viridis"](low + (high - low) * i / 255) for i in range(256)]
    return ScalarMappable(Normalize(0, max(1, count - 1)), ListedColormap(part))


def _columns(figure: Figure, names: Iterable[str]) -> int:
    """How many entries of a legend stand beside each other, by the length of the longest."""
    longest = max(map(len, names))
    return max(1, int(figure.get_figwidth() / (0.7 + 0.08 * longest)))


def _unit(sizes: Iterable[float]) -> str:
    """The unit in which the largest of these numbers of bytes is shown."""
    largest = max(sizes, default=0)
    return next((unit for unit, size in reversed(_BYTES.items()) if largest >= size), "B")
