"""Pictures show the numbers that they were given, and can be read on light and dark pages and by colour-blind eyes."""

from __future__ import annotations

import builtins
import itertools
import math

import numpy as np
import pytest

from peft.tools import plots


pytest.importorskip("matplotlib")

# How red, green and blue light are seen by eyes that lack one of the three receptors (Machado and others, 2009).
EYES = {
    "all receptors": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
THEMES = {"light": plots.LIGHT, "dark": plots.DARK}


def linear(colour: str) -> np.ndarray:
    """Light of a "#rrggbb" colour, each channel from 0 to 1."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """CIELAB coordinates, in which distances are those that eyes see."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ light.clip(1e-4, 1) / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    """The ratio of luminances of WCAG 2."""
    a, b = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) for colour in (one, other))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_series_stand_out_from_the_page(theme):
    colours = THEMES[theme]
    assert contrast(colours["ink"], colours["page"]) > 7
    for colour in colours["series"]:
        assert contrast(colour, colours["page"]) >= 3, colour


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("theme", THEMES)
def test_series_are_told_apart_by_all_eyes(theme, eyes):
    seen = [lab(EYES[eyes] @ linear(colour)) for colour in THEMES[theme]["series"]]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


def test_series_that_share_a_colour_differ_otherwise():
    styles = [plots._style(place, plots.LIGHT) for place in range(24)]
    assert len(set(styles)) == 24


def test_loss_curves_show_steps_and_losses(tmp_path):
    log = [
        {"step": 10, "loss": 2.0},
        {"step": 10, "eval_loss": 1.9},
        {"step": 20, "loss": 1.0},
        {"train_runtime": 3.0},
    ]
    figure = plots.loss_curves({"a": log, "b": [3.0, 2.5]}, tmp_path / "loss.svg")
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert lines == {"a": [[10, 2], [20, 1]], "a, held out": [[10, 1.9]], "b": [[1, 3], [2, 2.5]]}
    assert "nats" in figure.axes[0].get_ylabel()


def test_long_loss_curves_are_smoothed_without_a_shift():
    losses = [float(i) for i in range(400)]
    _, smooth = plots.loss_curves({"a": losses}).axes[0].get_lines()
    assert smooth.get_ydata()[200] == pytest.approx(200)


def test_the_map_has_a_row_for_each_layer_and_a_column_for_each_module():
    updates = {f"model.layers.{i}.{name}": float(10 * i + j) for i in (0, 1, 10) for j, name in enumerate(("q", "v"))}
    figure = plots.update_map({**updates, "lm_head": math.nan})
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "10", "–"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "v", "lm_head"]
    shown = np.ma.filled(axes.images[0].get_array(), -1.0)
    assert shown.tolist() == [[0, 1, -1], [10, 11, -1], [100, 101, -1], [-1, -1, -1]]
    assert [text.get_text() for text in axes.texts].count("×") == 1


def test_the_map_tells_stacks_of_layers_apart():
    figure = plots.update_map({"encoder.layer.0.q": 1.0, "decoder.layer.0.q": 2.0, "decoder.layer.0.cross": 3.0})
    columns = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert columns == ["encoder.layer.*.q", "decoder.layer.*.q", "cross"]


@pytest.mark.parametrize("count", [3, 12])
def test_spectra_are_sorted_and_drawn_on_a_logarithmic_scale(count):
    figure = plots.spectra({f"layers.{i}": [0.1, 2.0 + i, 0.0] for i in range(count)})
    axes = figure.axes[0]
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[2.0 + i, 0.1] for i in range(count)]
    assert axes.get_yscale() == "log"
    assert (axes.get_legend() is not None) == (count == 3)
    assert len({line.get_color() for line in axes.get_lines()}) == count


def test_memory_bars_stack_their_parts_in_one_unit():
    settings = {"LoRA": {"weights": 14e9, "activations": 5e9}, "QLoRA": {"weights": 4e9, "activations": 5e9}}
    figure = plots.memory_bars(settings, limit=16e9)
    axes = figure.axes[0]
    ends = [round(bar.get_x() + bar.get_width(), 6) for bars in axes.containers for bar in bars]
    assert ends == [14, 4, 19, 9]
    assert {text.get_text() for text in axes.texts} == {"19 GB", "9 GB"}
    assert "GB" in axes.get_xlabel()


def test_a_comparison_has_a_panel_for_each_known_cost():
    runs = [
        {"name": "LoRA", "quality": 88.2, "parameters": 460_800, "seconds": 124.0, "bytes": 2.2e9},
        {"name": "IA3", "quality": 87.5, "parameters": 57_600, "seconds": None},
        {"name": "failed", "quality": None, "parameters": 1},
    ]
    figure = plots.comparison(runs)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "trained parameters",
        "training time (s)",
        "peak memory (GB)",
    ]
    points = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert points == {"LoRA": [[460_800, 88.2]], "IA3": [[57_600, 87.5]]}
    assert figure.axes[2].get_lines()[0].get_xdata().tolist() == [2.2]


CALLS = {
    "loss_curves": {"a": [2.0, 1.0]},
    "update_map": {"layers.0.q": 0.1},
    "spectra": {"q": [1.0, 0.5]},
    "memory_bars": {"LoRA": {"weights": 1e6}},
    "comparison": [{"name": "LoRA", "quality": 1.0, "parameters": 8}],
}


@pytest.mark.parametrize("name", CALLS)
def test_pictures_are_opaque_files_that_the_data_determine(name, tmp_path):
    from matplotlib import image

    draw, data = getattr(plots, name), CALLS[name]
    files = [tmp_path / each for each in ("one.svg", "two.svg")]
    for file in files:
        draw(data, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    draw(data, tmp_path / "dark.png", dark=True)
    corner = image.imread(tmp_path / "dark.png")[0, 0]
    assert corner.tolist() == pytest.approx([0x15 / 255, 0x18 / 255, 0x1E / 255, 1.0])


@pytest.mark.parametrize("name", CALLS)
def test_nothing_to_draw_is_an_error(name):
    with pytest.raises(ValueError, match="draw|compare"):
        getattr(plots, name)(type(CALLS[name])())


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'peft\[plots\]'"):
        plots.loss_curves({"a": [1.0]})
