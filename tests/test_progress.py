"""Progress: bars where somebody looks on, plain lines elsewhere."""

import io
import itertools
import sys
import time

import jax
import pytest
from conftest import apply, init

import dtrak_jax as dtrak
from dtrak_jax import progress
from dtrak_jax.progress import counted


@pytest.fixture
def clock(monkeypatch):
    """A clock that only stands still or is set: clock[0] seconds."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def test_a_line_says_what_is_done_and_how_long_the_rest_takes(clock, capsys):
    """The first step, which compiles, counts for nothing in the rate."""
    with progress.progress(total=100, desc="train", unit="step", initial=20) as bar:
        for seconds in [40] + 79 * [0.5]:
            if bar.n in (20, 21, 81):
                bar.tell()
            clock[0] += seconds
            bar.update()
            bar.set_postfix(loss="0.5")
    assert capsys.readouterr().err.splitlines() == [
        "train: 20/100 steps",
        "train: 21/100 steps, loss=0.5",
        "train: 81/100 steps, 2.0 steps/s, 00:09 left, loss=0.5",
        "train: 100/100 steps, took 01:19, loss=0.5",
    ]


def test_slow_steps_of_an_unknown_number(clock, capsys):
    """An error ends them with what was done."""
    with (
        pytest.raises(KeyError),
        progress.progress(desc="wait", unit="step") as bar,
    ):
        for _ in range(2):
            clock[0] += 45
            bar.update()
        bar.tell()
        raise KeyError
    assert capsys.readouterr().err.splitlines() == [
        "wait: 2 steps, 45.0 s/step",
        "wait: 2 steps, took 01:30",
    ]


def test_a_log_file_has_nothing_of_what_takes_seconds(clock, capsys):
    for _ in progress.progress(range(29), "measure"):
        clock[0] += 1
    assert capsys.readouterr() == ("", "")


def test_a_log_file_has_a_line_now_and_then_however_long_a_step_takes(
    monkeypatch, capsys
):
    """Nothing is told any more once it is done."""
    monkeypatch.setattr(progress, "EVERY", 0.01)
    told, until = "", time.monotonic() + 60
    for _ in progress.progress(range(1), "compile", unit="program"):
        while told.count("compile: 0/1 program\n") < 2:
            assert time.monotonic() < until
            told += capsys.readouterr().err
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("compile: 1/1 program, took")
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_only_the_main_process_of_several_shows_any(clock, capsys, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for index, lines in ((0, 1), (1, 0)):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        for _ in progress.progress([1], "merge"):
            clock[0] += 40
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_terminal_has_bars_of_which_the_inner_ones_go(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in progress.progress(range(2), "regenerate", unit="model"):
        for _ in progress.progress(range(3), "sample"):
            pass
    shown = terminal.getvalue().splitlines()[-1]
    assert "regenerate: 100%" in shown
    assert "sample" not in shown.split("\r")[-1]


def test_features_are_counted_as_the_devices_get_them(one_device, images, monkeypatch):
    """A chunk of a store may take an hour: images are counted within it, each once."""
    steps = []
    monkeypatch.setattr(progress.Lines, "update", lambda bar, n: steps.append(n))
    task = dtrak.Task(apply, dtrak.linear_schedule(), timesteps=3)
    params = init(jax.random.key(0))
    dtrak.featurize(task, params, images, dtrak.Projection(dim=4), batch_size=5)
    assert list(itertools.accumulate(steps)) == [1, 3, 5, 6, 8, 10, 11, 12]


def test_one_thing_has_no_plural():
    assert [counted(n, "query") for n in (1, 2000)] == ["1 query", "2,000 queries"]
    assert [counted(n, "image") for n in (0, 1)] == ["0 images", "1 image"]
