"""The picture of a training: drawn while it runs, in its share of the time, or told why it is not."""

from __future__ import annotations

import json
import math
import sys
import time

import numpy as np
import pytest
from tiny_datasets import tiny_recipe

from invres import Cancelled, curves
from invres.cases import read_dataset
from invres.events import Recorder
from invres.training import train
from invres.trainingrun import TrainOptions, WithCurves


@pytest.fixture
def undrawn():
    """Drawn they are, here."""


@pytest.mark.parametrize("there", [True, False], ids=["matplotlib", "without"])
def test_curves_are_drawn_or_it_is_said_once_how_to_get_them(phantoms, tmp_path, monkeypatch, there):
    if there:
        pytest.importorskip("matplotlib")
    else:
        for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
            monkeypatch.setitem(sys.modules, name, None)
    report = Recorder()
    train(read_dataset(phantoms), tiny_recipe(epochs=3, iterations_per_epoch=1), tmp_path, TrainOptions("cpu"), report)
    told = [event["message"] for event in report.events if "curves.png" in event.get("message", "")]
    assert (tmp_path / "curves.png").is_file() == there and len(told) == (not there)
    assert all("`pip install matplotlib`" in message for message in told)


@pytest.mark.parametrize(("share", "drawn"), [(math.inf, [1, 2, 3]), (1e-9, [1, 3])], ids=["quick", "slow"])
def test_drawing_takes_its_share_of_the_time_and_shows_all_in_the_end(phantoms, tmp_path, monkeypatch, share, drawn):
    epochs = []

    def drawing(folder):
        time.sleep(0.02)
        epochs.append(len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
        return folder

    monkeypatch.setattr(curves, "SHARE", share)
    monkeypatch.setattr(curves, "draw_curves", drawing)
    train(read_dataset(phantoms), tiny_recipe(epochs=3, iterations_per_epoch=1), tmp_path, TrainOptions("cpu"))
    assert epochs == drawn


def test_what_fails_in_drawing_hides_nothing(tmp_path, monkeypatch):
    def broken(folder):
        raise ValueError("no such font")

    monkeypatch.setattr(curves, "draw_curves", broken)
    report = Recorder()
    with pytest.raises(Cancelled), WithCurves(report, tmp_path) as reporter:
        reporter.emit({"event": "epoch"})
        reporter.emit({"event": "epoch"})
        raise Cancelled
    assert {event["message"] for event in report.events if event["event"] == "warning"} == {
        "The curves could not be drawn (no such font)."
    }


@pytest.mark.parametrize("count", [3, 9], ids=["few labels", "many, whose names stand beside"])
def test_every_line_and_name_is_inside_the_picture(tmp_path, monkeypatch, count):
    figure = pytest.importorskip("matplotlib.figure")
    names = [f"a structure with a long name {number}" for number in range(count)]
    lines = [
        {"epoch": epoch, "loss": 1e-4 / epoch, "dice": {**dict.fromkeys(names, 0.5), "mean": 0.5}} for epoch in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path)))
    assert curves.draw_curves(tmp_path).stat().st_size > 0
    (picture,) = drawn
    assert {text.get_text() for axes in picture.axes for text in axes.get_legend().get_texts()} >= {*names, "mean"}
    left, bottom, right, top = picture.get_tightbbox().extents / np.tile(picture.get_size_inches(), 2)
    assert min(left, bottom) >= 0 and max(right, top) <= 1
