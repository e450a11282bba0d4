"""Writing and reading adapters: what a killed or failing save leaves, and what readers see of it."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from peft.core.files.io import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, locate, locate_weights, replacing


CALLS = ("replace", "rename", "mkdir", "rmdir", "unlink", "fsync", "chmod")


def write_pair(folder, mark, stale=""):
    """Save config and weights that are marked with a number, as an adapter is saved, letter by letter."""
    weights = WEIGHTS_NAME if stale == SAFETENSORS_WEIGHTS_NAME else SAFETENSORS_WEIGHTS_NAME
    with replacing(folder, *filter(None, [stale])) as path:
        for name, text in ((weights, str(mark)), (CONFIG_NAME, json.dumps({"mark": mark}))):
            with open(path(name), "w") as file:
                for letter in text:
                    file.write(letter)
                    file.flush()
                    os.fsync(file.fileno())


def dies_at(end, function, *args):
    """Run a function in a process that dies at its n-th call that changes the file system; whether it lived."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == end:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    try:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        function(*args)
    except BaseException:
        os._exit(1)
    os._exit(0)


def read(folder):
    """The marks in config and weights, as this package finds them."""
    with open(locate(folder, CONFIG_NAME)) as config, open(*locate_weights(folder)) as weights:
        return json.load(config)["mark"], int(weights.read())


def read_plainly(folder):
    """The same as a tool that knows of the two files only; None where there is no config."""
    if not (folder / CONFIG_NAME).exists():
        return None
    weights = next(folder / n for n in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / n).exists())
    return json.loads((folder / CONFIG_NAME).read_text())["mark"], int(weights.read_text())


def fill(folder, mark, weights=SAFETENSORS_WEIGHTS_NAME):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps({"mark": mark}))
    (folder / weights).write_text(str(mark))


CASES = {
    "both differ": (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME),
    "from a pickle to safetensors": (WEIGHTS_NAME, WEIGHTS_NAME),
    "from safetensors to a pickle": (SAFETENSORS_WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME),
}


@pytest.mark.parametrize("case", CASES)
def test_a_save_killed_at_any_step_leaves_the_old_pair_or_the_new_one(tmp_path, case):
    before, stale = CASES[case]
    points, seen = 0, set()
    while True:
        points += 1
        folder = tmp_path / str(points)
        fill(folder, 1, before)
        lived = dies_at(points, write_pair, folder, 2, stale)
        assert read_plainly(folder) in ((1, 1), (2, 2), None)  # never one of each, for a tool that knows nothing
        seen.add(read(folder))
        assert read(folder) in ((1, 1), (2, 2))
        assert read_plainly(folder) == read(folder)  # what reads it has finished what was interrupted
        write_pair(folder, 3, stale)
        assert read(folder) == read_plainly(folder) == (3, 3)
        assert len(os.listdir(folder)) == 2  # nothing is left of the interrupted save
        if lived:
            break
    assert points > 10 and seen == {(1, 1), (2, 2)}


def test_a_save_under_the_same_config_is_one_step(tmp_path):
    """Then a tool that reads the two files alone finds a pair at every moment, and the old or the new weights."""
    for point in range(1, 40):
        folder = tmp_path / str(point)
        fill(folder, 1)
        (folder / CONFIG_NAME).write_text('{"mark": 2}')
        lived = dies_at(point, write_pair, folder, 2)
        assert read_plainly(folder) in ((2, 1), (2, 2))
        if lived:
            break
    assert lived and point > 10


def test_saves_killed_at_random(tmp_path):
    generator = random.Random(0)
    for _ in range(25):
        fill(tmp_path, 1)
        if not (child := os.fork()):
            for mark in range(2, 1000):
                write_pair(tmp_path, mark)
            os._exit(0)
        time.sleep(generator.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        config, weights = read(tmp_path)
        assert config == weights
    write_pair(tmp_path, 7)
    assert read(tmp_path) == (7, 7) and len(os.listdir(tmp_path)) == 2


class Failing:
    """Lets the n-th call of several functions fail."""

    def __init__(self, end):
        self.count, self.end = 0, end

    def wrap(self, function):
        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.end:
                raise OSError("no space left")
            return function(*args, **kwargs)

        return call


def test_a_save_that_fails_at_any_step_leaves_the_old_pair(tmp_path, monkeypatch):
    for point in range(1, 60):
        folder = tmp_path / str(point)
        fill(folder, 1, WEIGHTS_NAME)
        failing = Failing(point)
        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "mkdir", "fsync", "chmod"):
                patch.setattr(os, name, failing.wrap(getattr(os, name)))
            try:
                write_pair(folder, 2, WEIGHTS_NAME)
                failed = False
            except OSError:
                failed = True
        assert read(folder) == read_plainly(folder) == ((1, 1) if failed else (2, 2))
        assert len(os.listdir(folder)) == 2
        if failing.count < point:
            break
    assert failing.count < point and point > 10


def test_a_folder_that_cannot_be_written_is_read_as_it_was_meant(tmp_path, monkeypatch):
    """Where a killed save cannot be finished, what was committed is read from where it lies."""
    for point in range(1, 60):
        folder = tmp_path / str(point)
        fill(folder, 1)
        lived = dies_at(point, write_pair, folder, 2, WEIGHTS_NAME)
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, lambda *a, **k: (_ for _ in ()).throw(PermissionError("read-only")))
            assert read(folder) in ((1, 1), (2, 2))
        if lived:
            break
    assert lived and point > 10


def test_a_save_that_is_under_way_is_left_alone(tmp_path):
    fill(tmp_path, 1)
    with replacing(tmp_path) as path:
        with open(path(SAFETENSORS_WEIGHTS_NAME), "w") as file:
            file.write("2")
        assert read(tmp_path) == (1, 1)
        write_pair(tmp_path, 3)  # of another thread or process
        with open(path(CONFIG_NAME), "w") as file:
            file.write('{"mark": 2}')
    assert read(tmp_path) == (2, 2) and len(os.listdir(tmp_path)) == 2


def test_what_another_tool_writes_after_a_killed_save_stays(tmp_path):
    for point in range(1, 60):
        folder = tmp_path / str(point)
        fill(folder, 1)
        dies_at(point, write_pair, folder, 2)
        if read_plainly(folder) is None:
            fill(folder, 9)
            assert read(folder) == read_plainly(folder) == (9, 9)
            return
    raise AssertionError("no point without a config was met")
