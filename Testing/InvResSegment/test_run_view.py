"""The view of a run on real run folders: while a process works, after a stop, a fault and the end; the plot's nodes."""

from __future__ import annotations

import importlib.util
import json
import time

import pytest

if importlib.util.find_spec("PySide6") is None:  # asked for without importing it: `standins` has to come first
    pytest.skip("PySide6 is not installed", allow_module_level=True)

import qt
import slicer
import standins
from InvResSegmentLib.Models import ModelCatalogue
from InvResSegmentLib.RunView import RunView
from standins import pythonqt, waitUntil
from standins.plotview import curves
from tiny_run import at_work

PART = {"part": 2, "parts": 4}


@pytest.fixture
def window():
    """A window that is shown, with a layout for the view."""
    window = qt.QWidget()
    qt.QVBoxLayout(window)
    window.show()
    pythonqt.slotErrors.clear()
    yield window
    window.hide()
    assert not pythonqt.slotErrors


@pytest.fixture
def view(scene, window, backend, tmp_path):
    view = RunView(window, ModelCatalogue(backend, tmp_path / "models"))
    view.states = []
    view.onStateChanged = view.states.append
    yield view
    view.cleanup()
    assert added(scene) == []


def added(scene) -> list[str]:
    """What the view has put into the scene."""
    nodes = [scene.GetNthNode(index) for index in range(scene.GetNumberOfNodes())]
    return [node.GetID() for node in nodes if "Plot" in node.GetClassName() or node.IsA("vtkMRMLTableNode")]


def say(folder, *events):
    with open(folder / "events.jsonl", "a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(event) + "\n" for event in events)


def progress(done, total, eta_s, **more):
    return {"event": "progress", "stage": "train", "done": done, "total": total, "eta_s": eta_s, **(more or PART)}


def epoch(number, loss, **dice):
    return {"event": "epoch", "epoch": number, "loss": loss, "dice": {**dice, "mean": 0.5}, **PART}


def test_a_run_is_followed_without_being_asked(view, tmp_path):
    run = tmp_path / "run"
    process = at_work(run)
    try:
        view.show(run)
        assert view.states == ["starting"] and "Starting" in view.ui.stageText.text
        assert view.ui.runProgress.maximum == 0, "no end in sight yet"
        say(run, progress(3, 9, 80.0), {"event": "warning", "message": "case7 is left out."})
        say(run, {"event": "memory", "measured_bytes": 3 * 1024**2}, epoch(1, 0.9, ball=0.4), epoch(2, 0.7, ball=0.6))
        waitUntil(lambda: view.state == "running", 10)
        assert "Training 2 of 4" in view.ui.stageText.text
        assert "left" in view.ui.detailsText.text and "3.0 MiB" in view.ui.detailsText.text
        assert 250 < view.ui.runProgress.value < 500
        assert "case7 is left out." in view.ui.runWarningsText.text and not view.ui.runWarnings.isHidden()
        assert view.ui.proofBox.isHidden()
        assert "of training left" in view.ui.detailsText.text
        say(run, {"event": "progress", "stage": "finetune.parts", "done": 4, "total": 4, "eta_s": None})
        waitUntil(lambda: view.state == "finishing", 10)
        assert "Saving the tuned model" in view.ui.stageText.text and view.ui.runProgress.maximum > 0
        say(run, {"event": "progress", "stage": "finetune.compare", "done": 1, "total": 2, "eta_s": 70.0})
        waitUntil(lambda: "Comparing with the base model" in view.ui.stageText.text, 10)
        assert "left" in view.ui.detailsText.text and "of training" not in view.ui.detailsText.text
        (run / "stop").write_text("stop", encoding="utf-8")
        waitUntil(lambda: view.state == "stopping", 10)
        assert "left" not in view.ui.detailsText.text, "what it would have taken"
        (run / "stop").unlink()
        say(run, {"event": "error", "code": "cancelled", "message": "Stopped.", "hint": ""})
        process.kill()
        waitUntil(lambda: view.state == "paused", 10)
        assert view.ui.progressBox.isHidden() and "Resume" in view.ui.runNoticeText.text
        assert view.states == ["starting", "running", "finishing", "stopping", "paused"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_curves_are_a_plot_of_the_scene(view, scene, tmp_path):
    say(tmp_path, {"event": "started"}, epoch(1, 0.9, ball=0.4, core=0.1), epoch(2, 0.7, ball=0.6, core=0.2))
    view.show(tmp_path)
    drawn = curves(view._chart.view)
    assert [point[0] for point in drawn["Loss"]] == [1, 2]
    assert [point[1] for point in drawn["Dice ball"]] == pytest.approx([0.4, 0.6])
    assert set(drawn) == {"Loss", "Dice ball", "Dice core"}
    nodes = [scene.GetNodeByID(identity) for identity in added(scene)]
    assert nodes and not any(node.GetSaveWithScene() for node in nodes) and all(n.GetHideFromEditors() for n in nodes)
    say(tmp_path, epoch(3, None))
    view.poll()
    assert [point[0] for point in curves(view._chart.view)["Loss"]] == [1, 2], "a loss that was not finite is a gap"
    assert len(added(scene)) == len(nodes), "the same nodes take the new points"


def test_the_plot_comes_back_after_the_scene_was_closed(view, scene, tmp_path):
    say(tmp_path, {"event": "started"}, epoch(1, 0.9, ball=0.4))
    view.show(tmp_path)
    scene.Clear(False)
    view.poll()
    assert len(curves(view._chart.view)["Loss"]) == 1


def test_segments_of_another_run_leave_no_curve(view, scene, tmp_path):
    for name, segment in (("one", "ball"), ("two", "liver")):
        (tmp_path / name).mkdir()
        say(tmp_path / name, {"event": "started"}, epoch(1, 0.9, **{segment: 0.4}))
        view.show(tmp_path / name)
    assert set(curves(view._chart.view)) == {"Loss", "Dice liver"}


def test_nothing_is_read_while_nobody_looks(view, window, tmp_path):
    say(tmp_path, {"event": "started"})
    view.show(tmp_path)
    window.hide()
    say(tmp_path, {"event": "warning", "message": "unseen"})
    standins.pump(1.3)
    assert "unseen" not in view.ui.runWarningsText.text
    window.show()
    waitUntil(lambda: "unseen" in view.ui.runWarningsText.text, 5)


def test_a_failure_is_told_with_the_next_step(view, tmp_path):
    error = {
        "event": "error",
        "code": "out_of_memory",
        "message": "There is not enough memory.",
        "hint": "Close others.",
    }
    say(tmp_path, {"event": "started"}, error)
    view.show(tmp_path)
    assert view.states == ["failed"]
    assert "There is not enough memory." in view.ui.runNoticeText.text
    assert "Close others." in view.ui.runNoticeText.text


def test_a_finished_run_is_cheap_to_look_at(view, finished_run):
    view.show(finished_run)
    assert view.states == ["finished"] and not view.ui.proofBox.isHidden()
    begun = time.perf_counter()
    for _again in range(50):
        view.poll()
    assert (time.perf_counter() - begun) / 50 < 0.02
    view.clear()
    assert view.state == "" and view.widget.isHidden() and slicer.mrmlScene is not None
