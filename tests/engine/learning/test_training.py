"""The record of a run: text, plain values, a picture, and progress."""

import json
import math
import subprocess
import sys

import pytest

import engine.learning
from engine.learning import Training, fit

QUICK = {"simulations": 300, "epochs": 3}


@pytest.fixture
def training():
    return Training(
        status="unfinished",
        reason="still falling",
        losses=(2.0, 1.5),
        validation_losses=(1.9, math.nan),
        initial_loss=2.5,
        best_epoch=1,
        simulations=1000,
        excluded=3,
        held_out=100,
        constant_features=tuple(range(12)),
        seconds={"simulate": 1.25, "train": 60.0},
        unit="bits",
    )


def test_the_text_says_what_a_person_would_ask(training):
    lines = str(training).splitlines()
    assert lines[0] == "unfinished — still falling"
    text = "\n".join(lines)
    for words in ("1.9000 bits after 1 of 2 epochs, from 2.5000", "2.0000 bits in that epoch", "1000, 3 of them left out",
                  "100 held out", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …", "simulate 1.2, train 60.0"):  # fmt: skip
        assert words in text
    assert max(map(len, lines)) <= 110


def test_plain_values_are_json_without_nan(training):
    found = json.loads(json.dumps(training.to_dict(), allow_nan=False))
    assert found["validation_losses"] == [1.9, None]
    assert found["losses"] == [2.0, 1.5]
    assert (found["status"], found["converged"], found["epochs"], found["best_loss"]) == ("unfinished", False, 2, 1.9)


def test_the_package_loads_what_is_asked_for_and_no_more():
    code = "import sys, engine, engine.learning; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    assert set(engine.learning.__all__) <= set(dir(engine.learning))
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = engine.learning.train


def test_seconds_do_not_tell_two_runs_apart(training):
    assert training == Training(**{**vars(training), "seconds": {"simulate": 0.0, "train": 1.0}})


def test_the_picture_has_both_curves_units_and_the_weights_that_were_kept(training, tmp_path):
    figure = training.figure(tmp_path / "curve.png")
    (axes,) = figure.axes
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert axes.get_xlabel() == "epoch"
    assert axes.get_ylabel() == "loss (bits)"
    losses, validation, kept = axes.lines
    assert list(losses.get_ydata()) == [2.0, 1.5]
    assert list(validation.get_xdata()) == [0, 1, 2]
    assert validation.get_ydata()[0] == 2.5
    assert (list(kept.get_xdata()), list(kept.get_ydata())) == ([1], [1.9])
    assert losses.get_linestyle() != validation.get_linestyle()  # told apart without colour


def test_a_picture_of_a_run_that_failed_at_once_can_be_drawn(training):
    failed = Training(
        **{**vars(training), "losses": (), "validation_losses": (), "best_epoch": 0, "initial_loss": math.inf}
    )
    assert failed.figure().axes[0].get_title() == "unfinished"


def test_without_matplotlib_the_error_says_what_to_install(training, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"scalar-evidence\[figures\]"):
        training.figure()


def test_progress_is_silent_unless_stderr_is_a_terminal_or_it_is_asked_for(straight, simulate, prior, capfd):
    for progress in (None, False):
        fit(straight(), prior=prior, simulate=simulate, progress=progress, **QUICK)
        assert capfd.readouterr() == ("", "")
    fit(straight(), prior=prior, simulate=simulate, progress=True, **QUICK)
    out, err = capfd.readouterr()
    assert out == ""
    for words in ("simulating", "300/300", "training", "3/3", "validation", "best"):
        assert words in err


def test_a_terminal_shows_epochs_losses_and_the_time_left(straight, simulate, prior, monkeypatch):
    class Terminal:
        encoding = "utf-8"

        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text
            return len(text)

        def flush(self):
            pass

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    fit(straight(), prior=prior, simulate=simulate, **QUICK)
    for words in ("training", "3/3", "validation", "best", "0:00:0"):
        assert words in terminal.text
