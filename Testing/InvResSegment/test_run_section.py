"""The section with the run: what can be pressed when, a process that dies at once, and runs that are decided on."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("PySide6") is None:  # asked for without importing it: `standins` has to come first
    pytest.skip("PySide6 is not installed", allow_module_level=True)

import qt
import slicer
from InvResSegmentLib import RunSection as module
from InvResSegmentLib.FineTuneRun import FineTuneRun
from InvResSegmentLib.Models import ModelCatalogue
from InvResSegmentLib.RunRecord import DISCARDED, PROMOTED, decide
from InvResSegmentLib.RunSection import RunSection
from standins import pythonqt, waitUntil
from tiny_run import at_work

UI = Path(module.__file__).parents[1] / "Resources" / "UI" / "FineTuneTab.ui"


@pytest.fixture
def section(scene, backend, tmp_path):
    """The section on an empty folder of runs, shown."""
    pythonqt.slotErrors.clear()
    (tmp_path / "runs").mkdir()
    qt.QSettings().setValue("InvResSegment/RunsFolder", str(tmp_path / "runs"))
    widget = slicer.util.loadUI(str(UI))
    services = SimpleNamespace(catalogue=ModelCatalogue(backend, tmp_path / "models"), problem=lambda: "")
    section = RunSection(slicer.util.childWidgetVariables(widget), services, lambda: None)
    widget.show()
    yield section
    section.cleanup()
    widget.hide()
    assert not pythonqt.slotErrors


def begun(folder: Path) -> FineTuneRun:
    folder.mkdir(parents=True, exist_ok=True)
    return FineTuneRun.begin(folder, {"arguments": ["finetune"], "model": "balls"})


def test_nothing_stops_a_process_that_would_not_heed_it_yet(section, tmp_path):
    folder = tmp_path / "runs" / "one"
    process = at_work(folder)
    ui = section._ui
    try:
        section.show(begun(folder), launched=True)
        assert section.state == "starting" and not ui.pauseButton.enabled and not ui.keepButton.enabled
        assert "once the first training has begun" in ui.pauseButton.toolTip
        assert ui.keepButton.toolTip == ui.pauseButton.toolTip and ui.deleteRunButton.enabled
        event = {"event": "progress", "stage": "train", "done": 1, "total": 9, "eta_s": 3, "part": 1, "parts": 2}
        with open(folder / "events.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")
        waitUntil(lambda: section.state == "running", 10)
        assert ui.pauseButton.enabled and ui.keepButton.enabled and "Resume goes on later" in ui.pauseButton.toolTip
        assert "Ends the training now" in ui.keepButton.toolTip
        ui.pauseButton.click()
        assert (folder / "stop").read_text(encoding="utf-8") == "stop"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("before", [[], [{"event": "started"}, {"event": "error", "code": "cancelled"}]])
def test_a_process_that_dies_at_once_is_told_at_once_with_its_last_words(section, tmp_path, before):
    run = begun(tmp_path / "runs" / "one")
    lines = "".join(json.dumps({"time": "2026-01-01T10:00:00.000+00:00", **event}) + "\n" for event in before)
    (run.folder / "events.jsonl").write_text(lines, encoding="utf-8")
    program = "import sys; sys.stderr.write('ImportError: no torch here\\n'); raise SystemExit(1)"
    run.launch([sys.executable, "-c", program], dict(os.environ), resume=bool(before))
    section.show(run, launched=True)
    waitUntil(lambda: section.state == "failed", 10)
    ui = section._ui
    assert "no torch here" in ui.runMessageText.text and not ui.runMessage.isHidden()
    assert "ended before it began" in section.view.ui.runNoticeText.text
    assert ui.pauseButton.text == "Resume" and ui.pauseButton.enabled


def test_while_the_models_are_compared_it_can_be_paused_unless_that_would_train_on(section, tmp_path):
    folder, ui = tmp_path / "runs" / "one", section._ui
    trained = {"event": "progress", "stage": "finetune.parts", "done": 2, "total": 2, "eta_s": 0}
    process = at_work(folder, trained)
    try:
        section.show(begun(folder), launched=True)
        assert section.state == "finishing" and section.active
        assert ui.pauseButton.enabled and not ui.keepButton.enabled
        (folder / "stop").write_text("keep-best", encoding="utf-8")
        section.view.poll()
        section._update()
        assert section.state == "finishing" and not ui.pauseButton.enabled and "compared" in ui.pauseButton.toolTip
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_decided_runs_stay_on_the_list_and_are_shown_when_they_are_chosen(section, tmp_path):
    ui, folder = section._ui, tmp_path / "runs" / "one"
    begun(folder)
    lines = [{"event": "started"}, {"event": "result", "verdict": "better", "promoted": True}]
    (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    decide(folder, DISCARDED)
    section.find()
    assert section.shown is None and not ui.runButton.isHidden() and not ui.runRow.isHidden()
    assert ui.runBox.currentIndex == -1 and ui.runButtons.isHidden() and not section.active
    assert ui.runBox.itemText(0).startswith("balls, ") and ui.runBox.itemText(0).endswith("(discarded)")
    ui.runBox.currentIndex = 0
    assert section.shown.folder == folder and section.state == "finished"
    assert not section.view.ui.proofBox.isHidden()
    ui.deleteRunButton.click()
    ui.deleteRunButton.click()
    assert not folder.exists() and section.shown is None and ui.runButton.isHidden()


def test_a_process_that_is_still_ending_after_its_last_word_blocks_no_other_run(section, tmp_path):
    run = begun(tmp_path / "runs" / "one")
    lines = [{"event": "started"}, {"event": "result", "verdict": "better", "promoted": True}]
    (run.folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    process = at_work(run.folder)
    try:
        with open(run.folder / "events.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(lines[-1]) + "\n")
        section.show(run)
        assert section.state == "finished" and run.active and not section.active
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_run_that_cannot_be_deleted_stays_and_says_why(section, tmp_path, monkeypatch):
    run, ui = begun(tmp_path / "runs" / "one"), section._ui
    (run.folder / "events.jsonl").write_text('{"event": "started"}\n', encoding="utf-8")
    section.show(run)

    def refuse(_self):
        raise OSError(16, "a process is still at work in it")

    monkeypatch.setattr(FineTuneRun, "discard", refuse)
    ui.deleteRunButton.click()
    ui.deleteRunButton.click()
    assert section.shown is run and section.state == "failed" and ui.deleteRunButton.text == "Delete"
    assert "still at work" in ui.runMessageText.text and "once it has stopped" in ui.runMessageText.text


def test_a_run_that_is_decided_on_can_be_deleted(section, finished_run, tmp_path):
    run, ui = shutil.copytree(finished_run, tmp_path / "runs" / "one"), section._ui
    section.show(begun(run))
    assert section.state == "finished" and ui.runButtons.isHidden(), "what becomes of it is asked below its proof"
    decide(run, PROMOTED, model="/models/one")
    section.view.onDecided()
    assert not ui.runButtons.isHidden() and ui.pauseButton.isHidden() and ui.keepButton.isHidden()
    ui.deleteRunButton.click()
    assert run.is_dir() and "your models and your cases stay" in ui.runMessageText.text
    ui.deleteRunButton.click()
    assert not run.exists() and section.shown is None
    waitUntil(lambda: not list((tmp_path / "runs").iterdir()), 10)
