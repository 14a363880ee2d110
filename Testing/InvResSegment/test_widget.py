"""The panel as a user meets it: real .ui files, real scene, real backend on the CPU; see panel_driver.py."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import sys
import types
import unittest
from pathlib import Path

import numpy as np
import psutil
import pytest
import vtk

if importlib.util.find_spec("PySide6") is None:  # asked for without importing it: `standins` has to come first
    pytest.skip("PySide6 is not installed", allow_module_level=True)

import qt
import slicer
import standins
import warm_python
from InvResSegmentLib import Settings
from InvResSegmentLib.BatchCase import BatchCase
from InvResSegmentLib.NrrdFile import writeNrrd
from InvResSegmentLib.SegmentationLogic import MemoryPlan, SegmentationOutcome
from InvResSegmentLib.SegmentationResult import SegmentVolume, fillVolumesTable
from InvResSegmentLib.SelfTest import SelfTest
from panel_driver import WIDTH, addVolume, loadedPanel, tunedManifest, waitUntil
from small_models import ONE, TWO, example, trained_package
from standins import pythonqt, qtclasses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of two models: "one" for T1, "two" for T1 and FLAIR."""
    folder = tmp_path_factory.mktemp("Modelle für Bälle")
    trained_package(folder / "one", ("T1",), ONE, iterations=30)
    tunedManifest(
        folder / "one", name="one", description="finds a ball", metrics={"ball": {"Dice": {"mean": 0.9, "n": 7}}}
    )
    trained_package(folder / "two", ("T1", "FLAIR"), TWO, iterations=1)
    tunedManifest(folder / "two", name="two", parent="0" * 32)
    return folder


@pytest.fixture(scope="module")
def voxels():
    """Images (2, K, J, I) of a ball with a core."""
    return example(np.random.default_rng(3), (32, 30, 34), 2)[0]


@pytest.fixture
def module(scene, models):
    with loadedPanel(models) as loaded:
        yield loaded


@pytest.fixture
def panel(module):
    """The panel, with the setup checked and the models read."""
    panel = module.enter().panel
    waitUntil(lambda: not panel.setup.checking and "Reading" not in panel.segmentTab.ui.modelCard.text, 120)
    assert panel.segmentTab.models, panel.segmentTab.ui.modelCard.text
    return panel


@pytest.fixture
def tab(panel):
    return panel.segmentTab


def choose(tab, name: str) -> None:
    names = [tab.ui.modelList.item(row).text() for row in range(tab.ui.modelList.count)]
    tab.ui.modelList.setCurrentRow(names.index(name))
    waitUntil(lambda: tab.idle, 60)


def pickers(tab) -> dict:
    """Channel name -> picker."""
    found = tab.ui.channelPickers.findChildren(slicer.qMRMLNodeComboBox)
    return {picker.objectName.removeprefix("channelPicker_"): picker for picker in found if not picker.isHidden()}


def nodesOfScene() -> list[str]:
    nodes = [slicer.mrmlScene.GetNthNode(index) for index in range(slicer.mrmlScene.GetNumberOfNodes())]
    return sorted(node.GetID() for node in nodes if not node.IsA("vtkMRMLScriptedModuleNode"))


def workers() -> set[int]:
    """The processes of backends that this one has started."""
    found = warm_python.pids()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("invres" in argument for argument in child.cmdline()):
                found.add(child.pid)
    return found


@pytest.fixture
def others():
    """The backends of other tests, which go on during this one."""
    return workers()


def test_opening_the_module_starts_nothing_before_it_is_entered(module):
    panel = module.widgetRepresentation().self().panel
    standins.pump(0.2)
    assert not panel.backend.running
    assert panel.segmentTab.ui.applyButton.enabled is False


def test_the_setup_is_closed_once_all_is_well(panel):
    assert panel.setup.problem == ""
    assert panel.ui.setupButton.collapsed
    assert not panel.ui.installButton.visible


def test_a_card_that_stays_idle_is_told_by_the_setup(panel):
    found = panel.dependencies.preflight
    idle = dataclasses.replace(found, idleCards=("NVIDIA A",), sentences=("torch computes on the CPU only.",))
    panel.dependencies.preflight = idle
    panel.setup._show(idle)
    assert panel.ui.setupButton.text == "Setup: ready, without the GPU" and panel.setup.problem == ""
    assert "on the CPU only" in panel.ui.setupNoticeText.text
    panel.dependencies.preflight = found
    panel.setup._show(found)
    assert panel.ui.setupButton.text == "Setup: ready"


def test_apply_says_what_is_missing(tab):
    assert "Choose a model." in tab.ui.applyButton.toolTip
    choose(tab, "two")
    assert not tab.ui.applyButton.enabled
    assert "channel T1" in tab.ui.applyButton.toolTip and "channel FLAIR" in tab.ui.applyButton.toolTip


def test_the_card_shows_what_the_model_says(tab):
    choose(tab, "one")
    card = tab.ui.modelCard.text
    assert all(word in card for word in ("finds a ball", "T1 (MR)", "ball", "CC0-1.0", "0.900", "(n = 7)"))
    waitUntil(lambda: "MiB" in tab.ui.modelCard.text or "GiB" in tab.ui.modelCard.text, 60)


def test_the_search_keeps_the_choice(tab):
    choose(tab, "one")
    tab.ui.searchBox.text = "flair"
    assert tab.ui.modelList.count == 1 and tab.ui.modelList.item(0).text() == "two"
    assert "finds a ball" in tab.ui.modelCard.text
    tab.ui.searchBox.text = "nothing like that"
    assert tab.ui.modelList.count == 0
    tab.ui.searchBox.text = ""
    assert tab.ui.modelList.currentItem().text() == "one"


def test_a_change_of_model_rebuilds_the_pickers_and_keeps_what_fits(tab, voxels):
    t1 = addVolume("scan", voxels=voxels[0])
    choose(tab, "one")
    assert list(pickers(tab)) == ["T1"]
    pickers(tab)["T1"].setCurrentNode(t1)
    choose(tab, "two")
    assert set(pickers(tab)) == {"T1", "FLAIR"}
    assert pickers(tab)["T1"].currentNode() is t1
    assert pickers(tab)["FLAIR"].currentNode() is None


def test_the_volume_of_a_model_with_one_channel_is_kept_by_another_one(scene, models, voxels):
    """The tutorial: a whole head that no name tells to be T1 goes from the model of any contrast to that of T1."""
    head = addVolume("MRHead", voxels=voxels[0])
    with loadedPanel(models, bundled=True) as module:
        tab = module.enter().panel.segmentTab
        waitUntil(lambda: tab.models and tab.idle, 120)
        assert pickers(tab)["MR"].currentNode() is head
        choose(tab, "hippocampus-t1")
        assert pickers(tab)["T1"].currentNode() is head
        waitUntil(lambda: tab.ui.applyButton.enabled, 120)
        assert "MRHead was kept, but it cannot be told to be T1" in tab.ui.matchNoticeText.text
        head.SetName("MPRAGE T1")
        choose(tab, "brain-any-contrast")
        choose(tab, "hippocampus-t1")
        assert pickers(tab)["T1"].currentNode() is head and tab.ui.matchNotice.isHidden()
        other = addVolume("another", voxels=voxels[1])
        choose(tab, "brain-any-contrast")
        pickers(tab)["MR"].setCurrentNode(other)
        choose(tab, "hippocampus-t1")
        assert pickers(tab)["T1"].currentNode() is other and not tab.ui.matchNotice.isHidden()
        pickers(tab)["T1"].setCurrentNode(head)
        waitUntil(lambda: tab.ui.matchNotice.isHidden() and tab.idle, 60)
        assert pickers(tab)["T1"].currentNode() is head, "what a person chooses is not doubted"


def test_notes_of_a_run_are_shown_as_information_and_kept_in_the_log(tab, panel, voxels, monkeypatch):
    addVolume("T1", voxels=voxels[0])
    choose(tab, "one")
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "found")
    table = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", "volumes")
    outcome = SegmentationOutcome("done", node, table, warnings=["Look there."], notes=["There is no T2."])
    logic = panel.services.logic
    monkeypatch.setattr(logic, "start", lambda request, onProgress, onDone: onDone(outcome))
    tab.ui.applyButton.click()
    assert tab.ui.warningsNoticeText.text == "Look there." and tab.ui.notesNoticeText.text == "There is no T2."
    log = tab.ui.logText.toPlainText()
    assert "Look there." in log and "There is no T2." in log
    tab._result.clear()
    assert tab.ui.notesNotice.isHidden()


def test_channels_are_matched_and_what_is_not_clear_stays_empty(tab, voxels):
    t1 = addVolume("MPRAGE T1", voxels=voxels[0])
    choose(tab, "two")
    assert pickers(tab)["T1"].currentNode() is t1
    assert pickers(tab)["FLAIR"].currentNode() is None
    assert "FLAIR" in tab.ui.matchNoticeText.text
    flair = addVolume("FLAIR axial", voxels=voxels[1])
    tab.ui.matchButton.click()
    assert pickers(tab)["FLAIR"].currentNode() is flair
    standins.pump(0.5)
    assert tab.ui.matchNotice.isHidden()


def test_a_volume_on_another_grid_is_aligned_with_one_click(tab, voxels):
    addVolume("T1", voxels=voxels[0])
    other = addVolume("FLAIR", voxels=voxels[1], origin=(2.5, 0, 0))
    choose(tab, "two")
    assert "FLAIR" in tab.ui.geometryNoticeText.text and tab.ui.alignRow.visible
    assert not tab.ui.applyButton.enabled
    tab.ui.alignButton.click()
    waitUntil(lambda: tab.ui.applyButton.enabled, 60)
    aligned = pickers(tab)["FLAIR"].currentNode()
    assert aligned is not other and aligned.GetName() == "FLAIR on T1"
    assert not tab.ui.alignRow.visible
    aligned.SetOrigin(9, 0, 0)  # moved by hand, in another module
    waitUntil(lambda: not tab.ui.applyButton.enabled, 10)


def test_apply_segments_and_shows_the_result(tab, panel, voxels):
    volume = addVolume("T1", voxels=voxels[0])
    choose(tab, "one")
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    assert "Needs" in tab.ui.planNoticeText.text
    seen, ticks = set(), []
    timer = qt.QTimer()
    timer.connect("timeout()", lambda: ticks.append(1))
    timer.start(20)
    tab.ui.applyButton.click()
    assert tab.ui.applyButton.text == "Cancel" and not tab.ui.channelPickers.enabled

    def ended():
        seen.add((tab.ui.progressText.text, tab.ui.progressBar.value))
        return not tab.running

    waitUntil(ended, 120)
    timer.stop()
    assert len({value for _text, value in seen}) > 3 and any("Segmenting" in text for text, _value in seen)
    assert len(ticks) > 3, "the window was blocked"
    nodes = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    assert len(nodes) == 1 and nodes[0].GetSegmentation().GetNumberOfSegments() == 1
    assert tab.ui.resultButton.visible and not tab.ui.progressBar.visible
    assert "measured peak" in tab.ui.resultSummary.text
    assert re.search(r"<br>Confidence 0\.\d\d of 1\.$", tab.ui.resultSummary.text)
    assert tab.ui.volumesTable.mrmlTableNode().GetNumberOfRows() == 1
    assert tab.ui.show3DButton.enabled
    slicer.mrmlScene.StartState(slicer.mrmlScene.BatchProcessState)  # as loading anything does
    slicer.mrmlScene.EndState(slicer.mrmlScene.BatchProcessState)
    assert tab.ui.volumesTable.mrmlTableNode() is not None
    # A second run into the same segmentation is warm: the worker is the same process.
    worker = panel.backend.pid
    tab.ui.outputSelector.setCurrentNode(nodes[0])
    tab.ui.uncertaintyBox.checked = True
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    tab.ui.applyButton.click()
    waitUntil(lambda: not tab.running, 120)
    assert panel.backend.pid == worker
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 1
    volumes = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
    assert [node.GetName() for node in volumes] == ["T1", "T1 uncertainty"]
    tab.ui.matchButton.click()
    assert list(tab._pickers.volumes().values()) == [volume]
    tab.ui.undoButton.click()
    assert not tab.ui.resultButton.visible
    assert slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode") == [volume]
    slicer.mrmlScene.RemoveNode(volume)
    waitUntil(lambda: not tab.ui.applyButton.enabled, 10)


def test_all_frames_of_a_sequence_are_segmented_on_request(tab, panel, voxels):
    sequence = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", "cine")
    frame = addVolume("frame", voxels=voxels[0])
    for value in ("0", "1", "2"):
        sequence.SetDataNodeAtValue(frame, value)
    slicer.mrmlScene.RemoveNode(frame)
    plain = addVolume("T1", voxels=voxels[0])
    choose(tab, "one")
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    assert not tab.ui.framesBox.visible and tab.ui.uncertaintyBox.enabled
    browser = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "browser")
    browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    pickers(tab)["T1"].setCurrentNode(browser.GetProxyNode(sequence))
    waitUntil(lambda: tab.ui.framesBox.visible and tab.idle, 60)
    assert tab.ui.framesBox.text == "All 3 frames of cine" and not tab.ui.framesBox.checked
    tab.ui.framesBox.checked = True
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    assert "all 3 take about" in tab.ui.planNoticeText.text and not tab.ui.uncertaintyBox.enabled
    before = nodesOfScene()
    tab.ui.applyButton.click()
    waitUntil(lambda: "Frame 2 of 3" in tab.ui.progressText.text, 60)
    assert not tab.ui.framesBox.enabled
    tab.ui.applyButton.click()
    waitUntil(lambda: not tab.running, 30)
    assert nodesOfScene() == before and "The scene is as it was." in tab.ui.messageNoticeText.text
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    tab.ui.applyButton.click()
    waitUntil(lambda: not tab.running, 120)
    assert ", 3 frames, " in tab.ui.resultSummary.text and "Least of all frames: Confid" in tab.ui.resultSummary.text
    assert tab.ui.volumesTable.mrmlTableNode().GetNumberOfRows() == 3
    assert not tab.ui.trainingButton.visible
    (node,) = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    assert browser.GetSequenceNode(node).GetNumberOfDataNodes() == 3
    tab.ui.undoButton.click()
    assert not tab.ui.resultButton.visible and nodesOfScene() == before
    pickers(tab)["T1"].setCurrentNode(plain)
    waitUntil(lambda: not tab.ui.framesBox.visible, 10)
    pickers(tab)["T1"].setCurrentNode(browser.GetProxyNode(sequence))
    waitUntil(lambda: tab.ui.framesBox.visible, 10)
    assert not tab.ui.framesBox.checked, "off until it is asked for again"


def test_a_long_table_of_volumes_needs_one_scroll_bar_and_not_two(tab, panel):
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "structures")
    table = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", "volumes")
    names = [f"{side} cerebellar white matter {index}" for side in ("left", "right") for index in range(9)]
    fillVolumesTable(table, [SegmentVolume(name, name, 281154, 281.154) for name in names])
    panel.widget.resize(WIDTH, 1400)
    panel.widget.show()
    tab._result.show(SegmentationOutcome("done", node, table), None, None)
    standins.pump(0.1)
    shown = tab.ui.volumesTable
    assert shown.verticalScrollBar().visible and not shown.horizontalScrollBar().visible
    header = shown.horizontalHeader()
    assert shown.viewport().height >= 10 * shown.rowHeight(0), "the tenth row is seen as a whole"
    assert header.sectionSize(1) >= header.sectionSizeHint(1), "the names make room, not the figures"


def test_the_segment_editor_opens_on_the_result(tab, voxels, monkeypatch):
    volume = addVolume("T1", voxels=voxels[0])
    choose(tab, "one")
    waitUntil(lambda: tab.ui.applyButton.enabled, 60)
    tab.ui.applyButton.click()
    waitUntil(lambda: not tab.running, 120)
    calls = []
    editor = types.SimpleNamespace(
        setSegmentationNode=lambda node: calls.append(node), setSourceVolumeNode=lambda node: calls.append(node)
    )
    widget = types.SimpleNamespace(self=lambda: types.SimpleNamespace(editor=editor))
    segmentEditor = types.SimpleNamespace(widgetRepresentation=lambda: widget)
    monkeypatch.setattr(slicer.modules, "segmenteditor", segmentEditor, raising=False)
    tab.ui.editorButton.click()
    assert slicer.util.mainWindow().moduleSelector().selected[-1] == "SegmentEditor"
    assert calls == [slicer.util.getNodesByClass("vtkMRMLSegmentationNode")[0], volume]


def test_cancel_leaves_the_scene_as_it_was(tab, panel):
    addVolume("T1", shape=(48, 48, 48))
    choose(tab, "one")
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    before = nodesOfScene()
    tab.ui.applyButton.click()
    waitUntil(lambda: tab.ui.progressBar.value > 50 or not tab.running, 60)
    tab.ui.applyButton.click()
    waitUntil(lambda: not tab.running, 2.5)
    assert nodesOfScene() == before
    assert "cancelled" in tab.ui.messageNoticeText.text
    assert tab.ui.applyButton.text == "Apply" and tab.ui.applyButton.enabled


def test_an_error_is_one_sentence_in_the_panel(tab, panel, models, voxels):
    addVolume("T1", voxels=voxels[0])
    choose(tab, "one")
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    weights = models / "one" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(b"damaged")
        panel.backend.stop()
        tab.ui.applyButton.click()
        waitUntil(lambda: not tab.running, 120)
    finally:
        weights.write_bytes(kept)
    assert tab.ui.messageNotice.visible and "weights" in tab.ui.messageNoticeText.text
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    assert tab.ui.applyButton.text == "Apply"


def test_what_the_error_says_is_not_said_again_by_the_plan(tab, panel, voxels, monkeypatch):
    addVolume("T1", voxels=voxels[0])
    said = {"message": "The weights are damaged.", "hint": "Copy them again."}
    logic = panel.services.logic
    monkeypatch.setattr(logic, "plan", lambda request, onDone: onDone(None, " ".join(said.values())))
    monkeypatch.setattr(
        logic, "start", lambda request, onProgress, onDone: onDone(SegmentationOutcome("failed", **said))
    )
    choose(tab, "one")
    assert not tab.ui.planNotice.isHidden()
    tab.ui.applyButton.click()
    assert not tab.ui.messageNotice.isHidden() and tab.ui.planNotice.isHidden()


def test_the_window_that_fits_is_the_one_that_is_used(tab, panel, voxels, monkeypatch):
    addVolume("T1", voxels=voxels[0])
    started, logic = [], panel.services.logic
    for fits, window in ((True, None), (False, (8, 8, 16))):
        plan = MemoryPlan(2, 1, (8, 8, 16), 1.0, fits, "It needs much.")
        monkeypatch.setattr(logic, "plan", lambda request, onDone, plan=plan: onDone(plan, ""))
        monkeypatch.setattr(logic, "start", lambda request, onProgress, onDone: started.append(request))
        choose(tab, "two")
        choose(tab, "one")
        tab.ui.applyButton.click()
        assert started[-1].window == window
        tab._setRunning(False)


def test_an_idle_backend_outlives_the_scene(tab, panel):
    """The next patient does not wait for torch."""
    waitUntil(lambda: panel.backend.pid is not None and not panel.backend.busy and tab.ui.deviceBox.count >= 2, 60)
    worker = panel.backend.pid
    slicer.mrmlScene.Clear()
    standins.pump(0.1)
    assert panel.backend.pid == worker


def test_closing_the_scene_ends_the_run(tab, panel):
    addVolume("T1", shape=(48, 48, 48))
    choose(tab, "one")
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    tab.ui.applyButton.click()
    waitUntil(lambda: panel.backend.pid is not None, 60)
    slicer.mrmlScene.Clear()
    waitUntil(lambda: not tab.running, 2.5)
    assert not panel.services.logic.running
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    assert tab.ui.messageNotice.isHidden(), "of a scene that is gone there is nothing to say"
    assert not tab.ui.applyButton.enabled
    addVolume("T1", shape=(20, 20, 20))  # and the panel goes on with the new scene
    choose(tab, "one")
    tab.ui.matchButton.click()
    waitUntil(lambda: tab.ui.applyButton.enabled, 60)


def test_a_batch_of_files_goes_on_when_the_scene_is_closed(tab, panel, voxels, tmp_path):
    for index in range(2):
        writeNrrd(tmp_path / f"{index}.nrrd", voxels[0], np.diag([-1.0, -1.0, 1.0, 1.0]))
    choose(tab, "one")
    batch = panel.batchTab
    batch.ui.modelBox.setCurrentIndex([model.name for model in batch._models].index("one"))
    batch.queue.add(BatchCase(str(index), {"T1": tmp_path / f"{index}.nrrd"}) for index in range(2))
    batch.queue.setFolder(tmp_path / "results")
    batch.ui.startButton.click()
    assert batch.onFiles
    backend = panel.backend.pid
    slicer.mrmlScene.Clear()
    assert batch.queue.running and panel.backend.pid == backend
    waitUntil(lambda: not batch.queue.running, 120)
    assert [case.state for case in batch.queue.cases] == ["done", "done"]
    addVolume("T1", shape=(20, 20, 20))
    batch.queue.cases[0].state = "waiting"
    batch.queue.start(batch.model, "cpu")
    panel.stop()
    assert not panel.backend.running, "the end of Slicer ends it, too"


def test_the_choices_come_back_with_a_saved_scene(tab, module, voxels, tmp_path):
    t1, flair = addVolume("first", voxels=voxels[0]), addVolume("second", voxels=voxels[1])
    choose(tab, "two")
    pickers(tab)["T1"].setCurrentNode(t1)
    pickers(tab)["FLAIR"].setCurrentNode(flair)
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    tab.ui.roiSelector.setCurrentNode(roi)
    standins.pump(0.1)
    slicer.mrmlScene.SetURL(str(tmp_path / "scene.mrml"))
    assert slicer.mrmlScene.Commit()
    slicer.mrmlScene.Clear()
    assert tab.ui.roiSelector.currentNode() is None
    addVolume("another", shape=(4, 4, 4))  # so that the nodes get other ids than they had
    slicer.mrmlScene.SetURL(str(tmp_path / "scene.mrml"))
    assert slicer.mrmlScene.Import()
    standins.pump(0.5)
    assert tab.ui.modelList.currentItem().text() == "two"
    assert pickers(tab)["T1"].currentNode().GetName() == "first"
    assert pickers(tab)["FLAIR"].currentNode().GetName() == "second"
    assert tab.ui.roiSelector.currentNode().GetName() == "box"


def test_what_is_deleted_leaves_its_selector_empty_and_no_other_node_is_chosen(tab, voxels):
    volume = addVolume("T1", voxels=voxels[0])
    addVolume("something else", voxels=voxels[1])
    choose(tab, "one")
    assert pickers(tab)["T1"].currentNode() is volume
    for kind, selector in (
        ("vtkMRMLMarkupsROINode", tab.ui.roiSelector),
        ("vtkMRMLSegmentationNode", tab.ui.outputSelector),
    ):
        chosen, _other = (slicer.mrmlScene.AddNewNodeByClass(kind) for _ in range(2))
        selector.setCurrentNode(chosen)
        slicer.mrmlScene.RemoveNode(chosen)
        assert selector.currentNode() is None
    slicer.mrmlScene.RemoveNode(volume)
    standins.pump(0.4)
    assert pickers(tab)["T1"].currentNode() is None and not tab.ui.applyButton.enabled


def test_the_plan_follows_the_region(tab, voxels):
    addVolume("T1", voxels=voxels[0])
    choose(tab, "one")
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    roi.SetCenter(15, 15, 15)
    roi.SetSize(20, 20, 20)
    tab.ui.roiSelector.setCurrentNode(roi)
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    roi.SetCenter(1000, 0, 0)
    waitUntil(lambda: "does not touch" in tab.ui.applyButton.toolTip, 10)


def test_frames_of_reference_are_compared_as_slicers_dicom_database_knows_them(tab, voxels, monkeypatch):
    uids = {"1.1": "2.1", "1.2": "2.2"}
    database = types.SimpleNamespace(
        instanceValue=lambda instance, tag: uids[instance] if tag == "0020,0052" else "",
    )
    monkeypatch.setattr(slicer, "dicomDatabase", database, raising=False)
    for name, instance, image in (("T1", "1.1", voxels[0]), ("FLAIR", "1.2", voxels[1])):
        addVolume(name, voxels=image).SetAttribute("DICOM.instanceUIDs", instance)
    choose(tab, "two")
    assert "different examinations" in tab.ui.geometryNoticeText.text


def test_a_card_is_shown_with_its_number(tab):
    cards = [{"name": f"cuda:{index}", "title": "NVIDIA X", "free_bytes": 2**30} for index in range(2)]
    tab.setDevices([*cards, {"name": "cpu", "title": "CPU"}], "cuda:1")
    entries = [tab.ui.deviceBox.itemText(index) for index in range(tab.ui.deviceBox.count)]
    assert entries == [
        "Automatic (GPU 1: NVIDIA X)",
        "GPU 0: NVIDIA X, 1.0 GiB free",
        "GPU 1: NVIDIA X, 1.0 GiB free",
        "CPU",
    ]


def test_a_card_that_is_gone_is_chosen_nowhere(tab, panel):
    waitUntil(lambda: tab.ui.deviceBox.count >= 2, 60)
    qt.QSettings().setValue("InvResSegment/Device", "cuda:0")
    tab.setDevices([], "")
    assert Settings.device() == "cuda:0", "nothing is known yet"
    tab.setDevices([{"name": "cpu", "title": "CPU"}], "cpu")
    assert tab.ui.deviceBox.currentIndex == 0 and Settings.device() == "auto"
    assert panel.fineTuneTab._form.options.device == "auto"


def test_a_sentence_shows_no_escapes(tab):
    tab._message.show("error", "scipy 1.9 does not fit; >=1.11 is needed, & soon.")
    shown = tab.ui.messageNoticeText
    assert shown.text == "scipy 1.9 does not fit; &gt;=1.11 is needed, &amp; soon."
    assert shown.textFormat == qt.Qt.RichText
    for name in ("modelCard", "progressText"):
        assert getattr(tab.ui, name).textFormat == qt.Qt.RichText


def test_entering_again_binds_the_selectors_once(module, tab, monkeypatch):
    logic = module.widgetRepresentation().self().logic
    parameters, bound = logic.getParameterNode(), []
    assert logic.getParameterNode() is parameters
    real = type(parameters).connectParametersToGui
    monkeypatch.setattr(
        type(parameters), "connectParametersToGui", lambda self, gui: bound.append(self) or real(self, gui)
    )
    for _ in range(3):
        module.exit()
        module.enter()
    assert bound == []
    slicer.mrmlScene.Clear()
    assert bound == [parameters], "the node outlives its scene"
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    tab.ui.roiSelector.setCurrentNode(roi)
    assert logic.getParameterNode().roi is roi


def test_models_stay_when_closing_a_scene_cuts_their_list_off(panel, tab):
    known = [model.name for model in tab.models]
    assert known
    panel.refreshModels()
    slicer.mrmlScene.Clear()
    assert [model.name for model in tab.models] == known
    waitUntil(lambda: panel._listed and tab.ui.deviceBox.count >= 2 and not panel.backend.busy, 60)
    assert [model.name for model in tab.models] == known


def test_a_case_of_the_proof_goes_before_its_scene_does(panel, monkeypatch):
    """Its way back is by ids, which the next scene gives to other nodes."""
    seen = []
    monkeypatch.setattr(
        panel.fineTuneTab.run.view._proof, "leave", lambda: seen.append(slicer.mrmlScene.GetNumberOfNodes())
    )
    addVolume("T1")
    before = slicer.mrmlScene.GetNumberOfNodes()
    slicer.mrmlScene.Clear()
    assert seen and seen[0] == before


def test_installing_into_slicers_python_asks_with_what_it_changes(panel, monkeypatch):
    steps, begun = ["\u2022 Remove torch 1.9", "\u2022 Install torch"], []
    monkeypatch.setattr("InvResSegmentLib.SetupSection.separatePython", lambda: "")
    monkeypatch.setattr(type(panel.dependencies), "planned", property(lambda _self: steps))
    monkeypatch.setattr(type(panel.dependencies), "advice", property(lambda _self: ["It is large."]))
    monkeypatch.setattr(panel.setup, "_install", lambda: begun.append(True))
    asked = []
    for answer in (False, True):
        monkeypatch.setattr(
            slicer.util, "confirmOkCancelDisplay", lambda text, title, answer=answer: asked.append(text) or answer
        )
        panel.setup._onInstall()
    assert len(asked) == 2 and all(step in asked[0] for step in [*steps, "It is large."]) and begun == [True]


def test_an_installation_that_has_come_to_its_end_is_not_begun_again(panel, monkeypatch):
    panel.dependencies.installPending = True
    begun = []
    monkeypatch.setattr(panel.setup, "_install", lambda: begun.append(True))
    panel.setup.check()
    waitUntil(lambda: not panel.setup.checking, 120)
    assert panel.setup.ready and not panel.dependencies.installPending and begun == []


def test_a_long_path_does_not_widen_the_panel(scene, tmp_path):
    long = tmp_path / "/".join(["a folder with a long name"] * 8)
    with loadedPanel(long) as module:
        panel = module.enter().panel
        panel.modelsTab.ui.folderButton.collapsed = False
        panel.ui.setupButton.collapsed = False
        waitUntil(lambda: not panel.setup.checking, 120)
        panel.ui.tabs.setCurrentWidget(panel.modelsTab.widget)
        standins.pump(0.1)
        assert panel.modelsTab.ui.modelsFolderEdit.currentPath == str(long)
        assert panel.widget.minimumSizeHint.width() < 450


def test_the_device_is_remembered(tab, panel):
    waitUntil(lambda: tab.ui.deviceBox.count >= 2 and "Automatic (" in tab.ui.deviceBox.itemText(0), 60)
    tab.ui.deviceBox.setCurrentIndex(tab.ui.deviceBox.count - 1)
    assert qt.QSettings().value("InvResSegment/Device") == "cpu"


def test_a_folder_of_models_that_cannot_be_made_is_told(panel, tmp_path):
    (tmp_path / "file").write_text("no folder")
    tab = panel.modelsTab
    tab.ui.modelsFolderEdit.currentPath = str(tmp_path / "file" / "models")
    tab.ui.openFolderButton.click()
    said = tab.ui.modelsNoticeText.text
    assert "could not be created: " in said and "Choose another folder" in said


def test_the_self_test_is_skipped_where_there_is_no_backend(panel, monkeypatch):
    monkeypatch.setattr(panel.setup, "ready", False)
    monkeypatch.setattr(type(panel.setup), "check", lambda self: None)
    with pytest.raises(unittest.SkipTest, match="There is no backend here: Install what is missing"):
        SelfTest(unittest.TestCase()).run()


def test_models_are_verified_exported_deleted_and_imported(scene, models, tmp_path):
    shutil.copytree(models, tmp_path / "own")
    with loadedPanel(tmp_path / "own") as module:
        tab = module.enter().panel.modelsTab
        table, ui = tab.ui.modelsTable, tab.ui
        waitUntil(lambda: table.rowCount == 2 and ui.modelsNotice.isHidden(), 60)

        def finished() -> bool:
            return "..." not in ui.modelsNoticeText.text and ui.refreshButton.enabled

        assert not ui.exportButton.enabled and "Select a model first." in ui.verifyButton.toolTip
        table.selectRow(0)
        assert '"name": "one"' in ui.manifestText.toPlainText()
        ui.verifyButton.click()
        waitUntil(finished, 60)
        assert "intact" in ui.modelsNoticeText.text
        exported = tmp_path / "kopie.invres"
        qtclasses.answers.append(str(exported.with_suffix("")))
        ui.exportButton.click()
        waitUntil(finished, 60)
        assert exported.is_file(), ui.modelsNoticeText.text
        qtclasses.answers.append(int(qt.QMessageBox.No))
        ui.deleteButton.click()
        assert table.rowCount == 2
        qtclasses.answers.append(int(qt.QMessageBox.Yes))
        ui.deleteButton.click()
        waitUntil(lambda: finished() and table.rowCount == 1, 60)
        qtclasses.answers.append(str(exported))
        ui.importButton.click()
        waitUntil(lambda: finished() and table.rowCount == 2, 60)
        (tmp_path / "no model.invres").write_bytes(b"nothing")
        qtclasses.answers.append(str(tmp_path / "no model.invres"))
        ui.importButton.click()
        waitUntil(finished, 60)
        assert "no model" in ui.modelsNoticeText.text and table.rowCount == 2


def test_the_bundled_model_for_brains_is_chosen_and_takes_any_volume(scene, models):
    volume = addVolume("MRHead")
    with loadedPanel(models, bundled=True) as module:
        tab = module.enter().panel.segmentTab
        waitUntil(lambda: tab.models and tab.idle, 120)
        assert tab.ui.modelList.currentItem().text() == "brain-any-contrast"
        (picker,) = pickers(tab).values()
        assert picker.currentNode() is volume
        waitUntil(lambda: tab.ui.applyButton.enabled, 120)
        assert not tab.ui.locateBox.visible
        box = tab.ui.mirrorBox
        assert box.visible and box.text == "Average over 2 mirrored images (more exact)"
        assert tab._makeRequest().ways.mirrored
        box.checked = False
        assert not tab._makeRequest().ways.mirrored
        assert tab.ui.piecesBox.visible and not tab._makeRequest().ways.keepPieces
        tab.ui.piecesBox.checked = False
        assert tab._makeRequest().ways.keepPieces
        assert tab._makeRequest().model.leastConfidence > 0.5, "as its manifest says"
        panel = module.enter().panel
        panel._onModels([], "The folder cannot be read.")
        assert panel.modelsTab.ui.modelsTable.rowCount == len(tab.models) > 2
        told = panel.modelsTab.ui.modelsNoticeText.text
        assert "The models could not be listed anew: The folder cannot be read." in told
        panel.refreshModels()
        waitUntil(lambda: "listed anew" not in panel.modelsTab.ui.modelsNoticeText.text, 60)
        table = module.enter().panel.modelsTab.ui.modelsTable
        assert table.item(0, 2).text() == "CSF, third ventricle, fourth ventricle, brain stem, and 13 more"


def test_without_models_the_panel_says_what_to_do(scene, tmp_path):
    with loadedPanel(tmp_path / "nothing") as module:
        panel = module.enter().panel
        waitUntil(lambda: "no models yet" in panel.segmentTab.ui.modelCard.text, 60)
        assert "no models yet" in panel.modelsTab.ui.modelsNoticeText.text


def test_a_python_without_packages_opens_the_setup(scene, tmp_path):
    import venv

    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
    python = next(path for path in (tmp_path / "bare").glob("*/python*") if path.is_file())
    with loadedPanel(tmp_path / "models", python=str(python)) as module:
        panel = module.enter().panel
        waitUntil(lambda: not panel.setup.checking, 120)
        assert not panel.ui.setupButton.collapsed
        assert panel.ui.setupNoticeText.text.startswith("Not installed: numpy, SimpleITK, torch, ")
        assert "Install what is missing" in panel.segmentTab.ui.applyButton.toolTip
        report = tmp_path / "report.txt"
        qtclasses.answers.append(str(report))
        panel.ui.reportButton.click()
        assert "torch" in report.read_text(encoding="utf-8")
        panel.ui.pythonPathEdit.currentPath = sys.executable
        waitUntil(lambda: panel.setup.problem == "", 120)
        assert panel.ui.setupButton.collapsed


def test_a_python_that_is_not_there_is_an_error_in_words(scene, tmp_path):
    with loadedPanel(tmp_path / "models", python=str(tmp_path / "python")) as module:
        panel = module.enter().panel
        waitUntil(lambda: not panel.setup.checking, 60)
        assert "not there" in panel.ui.setupNoticeText.text and not panel.ui.installButton.enabled


@pytest.fixture
def same_library():
    """What is reloaded is put back: other tests have imported from it."""

    def parts():
        return {name: part for name, part in sys.modules.items() if name.partition(".")[0] == "InvResSegmentLib"}

    before = parts()
    yield
    for name in parts():
        del sys.modules[name]
    sys.modules.update(before)


def test_reload_takes_the_library_anew_and_leaves_no_process(same_library, module, panel):
    before = sys.modules["InvResSegmentLib.SegmentTab"]
    old = panel.backend
    module.widgetRepresentation().self().onReload()
    fresh = module.widgetRepresentation().self().panel
    assert fresh is not panel and sys.modules["InvResSegmentLib.SegmentTab"] is not before
    assert not old.running
    # The module is shown already, so nothing enters it again.
    waitUntil(lambda: not fresh.setup.checking and fresh.segmentTab.models, 120)


def test_the_end_of_the_application_ends_the_backend(others, scene, models):
    with loadedPanel(models, python=sys.executable) as module:  # not behind a program, so that its end is certain
        panel = module.enter().panel
        waitUntil(lambda: panel.backend.pid is not None, 120)
        slicer.app.emit("aboutToQuit")
        assert not panel.backend.running and not workers() - others


def test_sample_data_are_registered_with_checksums(module, monkeypatch):
    registered = []
    logic = types.SimpleNamespace(registerCustomSampleDataSource=lambda **values: registered.append(values))
    monkeypatch.setitem(sys.modules, "SampleData", types.SimpleNamespace(SampleDataLogic=logic))
    slicer.app.emit("startupCompleted")
    assert {(entry["category"], *entry["nodeNames"]) for entry in registered} == {("InvResSegment", "MRHead")}
    icon = Path(module.path).parent / "Resources" / "Icons" / "InvResSegment.png"
    for entry in registered:
        assert len(entry["uris"]) == len(entry["fileNames"]) == len(entry["nodeNames"]) == len(entry["checksums"])
        for uri, checksum in zip(entry["uris"], entry["checksums"], strict=True):
            assert uri.startswith("https://") and uri.endswith(checksum.replace("SHA256:", "SHA256/"))
        thumbnail = Path(entry["thumbnailFileName"]).read_bytes()
        assert thumbnail != icon.read_bytes(), "a picture of the data and not of the module"
        assert (int.from_bytes(thumbnail[16:20], "big"), int.from_bytes(thumbnail[20:24], "big")) == (260, 280)


def test_the_module_describes_itself(module):
    assert module.title == "InvResSegment" and module.categories == ["Segmentation"]
    assert "not a medical device" in module.helpText and "2103.09042" in module.acknowledgementText


def test_exit_and_enter_keep_a_run(tab, module, voxels):
    addVolume("T1", voxels=voxels[0])
    choose(tab, "one")
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
    tab.ui.applyButton.click()
    module.exit()
    standins.pump(0.1)
    module.enter()
    waitUntil(lambda: not tab.running, 120)
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 1
    assert not pythonqt.slotErrors


def test_a_moved_transform_is_noticed(tab, voxels):
    addVolume("T1", voxels=voxels[0])
    flair = addVolume("FLAIR", voxels=voxels[1])
    choose(tab, "two")
    waitUntil(lambda: tab.ui.applyButton.enabled, 60)
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    flair.SetAndObserveTransformNodeID(transform.GetID())
    matrix = vtk.vtkMatrix4x4()
    matrix.SetElement(0, 3, 4.0)
    transform.SetMatrixTransformToParent(matrix)
    waitUntil(lambda: not tab.ui.applyButton.enabled, 10)
    assert tab.ui.alignRow.visible
