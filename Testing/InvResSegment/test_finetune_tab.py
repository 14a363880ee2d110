"""The Fine-tune tab as a user meets it: real .ui files, real scene, real backend on the CPU; see panel_driver.py."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

if importlib.util.find_spec("PySide6") is None:  # asked for without importing it: `standins` has to come first
    pytest.skip("PySide6 is not installed", allow_module_level=True)

import qt
import slicer
from InvResSegmentLib.CaseFiles import CaseFiles, ImageFile
from InvResSegmentLib.LabelDialog import LabelDialog
from InvResSegmentLib.RunHolder import isHeld
from panel_driver import addSegmentation, addVolume, loadedPanel, tunedManifest, waitUntil
from small_models import ONE, TWO, example, trained_package
from standins import qtclasses

pytestmark = pytest.mark.slow
SOLID = np.ones((20, 22, 24))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of two models: "one" for T1, "two" for T1 and FLAIR; neither has learned anything."""
    folder = tmp_path_factory.mktemp("models")
    trained_package(folder / "one", ("T1",), ONE, iterations=1)
    tunedManifest(folder / "one", name="one", version="1.0.0")
    trained_package(folder / "two", ("T1", "FLAIR"), TWO, iterations=1)
    tunedManifest(folder / "two", name="two")
    return folder


@pytest.fixture
def settings(tmp_path):
    return {"InvResSegment/RunsFolder": str(tmp_path / "runs"), "InvResSegment/Device": "cpu"}


@pytest.fixture
def panel(scene, models, settings):
    with loadedPanel(models, settings=settings) as module:
        yield opened(module)


def opened(module):
    """The panel with the model "one" chosen. The tab is not in front: then it would ask for the memory, with torch."""
    panel = module.enter().panel
    waitUntil(lambda: not panel.setup.checking and len(panel.segmentTab.models) == 2, 300)
    tab = panel.fineTuneTab
    tab.ui.baseBox.currentIndex = [tab.ui.baseBox.itemText(i) for i in range(2)].index("one 1.0.0")
    settled(tab)
    return panel


def inFront(panel):
    """The tab, shown: a run is followed only while somebody looks."""
    panel.ui.tabs.setCurrentWidget(panel.fineTuneTab.widget)
    return panel.fineTuneTab


def settled(tab):
    waitUntil(lambda: not tab.working and not tab._timer.active, 200)


def addCase(name, seed, masks=None, channels=1):
    """A ball in noise, and its segmentation."""
    images, classes = example(np.random.default_rng(seed), (20, 22, 24), channels)
    volume = addVolume(name, voxels=images[-1])
    return volume, addSegmentation(volume, masks or {"ball": classes > 0})


def said(tab, name):
    """What the notice says, and nothing when it is hidden."""
    return "" if getattr(tab.ui, name).isHidden() else getattr(tab.ui, name + "Text").text


def cells(tab, row):
    table = tab.ui.casesTable
    return [table.item(row, column).text() for column in range(table.columnCount)]


def test_the_labels_of_many_segments_fit_on_a_screen_and_can_be_left_as_they_are(scene):
    names, chosen = [f"structure {number}" for number in range(60)], []
    dialog = LabelDialog(None, names, names[:30], {}, chosen.append)
    assert dialog.dialog.minimumSizeHint.height() < 400
    assert list(dialog._boxes)[:30] == names[30:], "those to be decided come first"
    dialog.buttons.button(qt.QDialogButtonBox.Cancel).click()
    assert not dialog.dialog.visible and not chosen


def test_start_says_what_is_missing_until_it_can_work(panel, monkeypatch):
    tab, looked = panel.fineTuneTab, []
    assert "Add at least one case" in tab.ui.startButton.toolTip and not tab.ui.startButton.enabled
    addCase("T1 a", 1)
    volume, _segmentation = addCase("T1 b", 2, {"Segment_1": np.ones((20, 22, 24))})
    tab.ui.addSceneButton.click()
    settled(tab)
    assert [cells(tab, row)[:3] for row in range(2)] == [["T1 a\ncase01", "1", "ball"], ["T1 b\ncase02", "1", "?"]]
    assert "Segment_1" in tab.ui.startButton.toolTip and "T1 b" in said(tab, "casesNotice")
    tab.ui.casesTable.selectRow(1)
    assert "Segment_1" in said(tab, "caseNotice") and "Labels" in said(tab, "caseNotice")

    # What a segment stands for is said once, in the small window.
    tab.ui.labelsButton.click()
    box = tab.labelDialog.box("Segment_1")
    assert [box.itemText(index) for index in range(box.count)] == [
        "(choose)",
        "ball",
        "a new label: Segment_1",
        "leave it out: learned as background",
        "not known: takes no part",
    ]
    box.currentIndex = 2
    tab.labelDialog.buttons.button(qt.QDialogButtonBox.Ok).click()
    settled(tab)
    assert tab.ui.startButton.enabled and "New to it: Segment_1" in said(tab, "casesNotice")
    assert "3 trainings share the time" in said(tab, "proofNotice")
    tab.labelDialog = None

    # Roles, options, and a node that goes.
    tab.ui.casesTable.cellWidget(0, 3).currentIndex = 1
    settled(tab)
    assert "Held out for the proof: 1" in said(tab, "proofNotice") and tab.ui.startButton.enabled
    tab.ui.rateEdit.text = "much"
    settled(tab)
    assert "learning rate" in tab.ui.startButton.toolTip
    tab.ui.rateEdit.text = ""
    slicer.mrmlScene.RemoveNode(volume)
    settled(tab)
    assert "No volume is chosen for the channel T1" in tab.ui.startButton.toolTip
    tab.ui.removeButton.click()
    tab.ui.casesTable.cellWidget(0, 3).currentIndex = 0
    settled(tab)
    assert tab.ui.casesTable.rowCount == 1 and tab.ui.startButton.enabled
    inFront(panel)
    waitUntil(lambda: "A training step needs about" in said(tab, "memoryNotice"), 200)
    monkeypatch.setattr("InvResSegmentLib.OptionsForm.secondsPerStep", lambda *_arguments: looked.append(1))
    tab.ui.nameEdit.text = "another name"
    settled(tab)
    tab.ui.memorySlider.value = 2
    waitUntil(lambda: "changes nothing" in said(tab, "memoryNotice"), 200)  # it is no reversible network
    waitUntil(lambda: looked, 200)
    tab.ui.nameEdit.text = ""
    settled(tab)
    assert len(looked) == 1, "the records of all runs are read once for a plan, not at each change"


def test_images_of_a_case_are_chosen_in_its_pickers_and_another_model_asks_for_others(panel):
    tab = panel.fineTuneTab
    addCase("T1", 1, {"core": SOLID})
    tab.ui.addSceneButton.click()
    tab.ui.baseBox.currentIndex = 1 - tab.ui.baseBox.currentIndex
    addVolume("scan 7", shape=(20, 22, 24), seed=5)
    settled(tab)
    tab._table.select(tab.cases.rows[0])
    settled(tab)
    # A channel that no case has is left out of the tuned model; one that some case has is wanted of all.
    assert tab.ui.startButton.enabled
    pickers = {p.objectName: p for p in tab.ui.casePickers.findChildren(slicer.qMRMLNodeComboBox) if not p.isHidden()}
    flair = slicer.util.getNode("scan 7")
    pickers["channelPicker_FLAIR"].setCurrentNode(flair)
    settled(tab)
    assert tab.cases.rows[0].channels["FLAIR"] is flair and cells(tab, 0)[1] == "2"
    flair.SetOrigin(5, 0, 0)
    volume = tab.cases.rows[0].channels["T1"]
    added = tab.cases.add("of a batch", {"t1w": volume, "flair": flair}, addSegmentation(volume, {"core": SOLID}))
    tab.enter()  # a person comes back to it
    settled(tab)
    assert added.channels == {"T1": volume, "FLAIR": flair}
    unit = tuple(tuple(row) for row in np.eye(4).tolist())
    image = ImageFile("/nowhere/a.nii", (2, 2, 2), unit)
    label = "/nowhere/a.seg.nrrd"
    stored = tab.cases.addFiles("accepted", CaseFiles({"t1w": image, "FLAIR": image}, label, ("core", "what")))
    settled(tab)
    assert cells(tab, 2)[:3] == ["accepted\ncase03", "2", "core, ?"] and "what" in tab.ui.startButton.toolTip
    tab._table.select(stored)
    settled(tab)
    assert tab.ui.casePickers.isHidden() and label in tab.ui.casesTable.item(2, 0).toolTip()
    tab.cases.remove([added, stored])
    settled(tab)
    assert "Align it in the tab Segment" in tab.ui.startButton.toolTip


def test_a_model_that_shall_do_without_channels_takes_cases_that_lack_some(panel):
    tab = panel.fineTuneTab
    for name, seed in (("T1 a", 1), ("T1 b", 2)):
        addCase(name, seed, {"core": SOLID})
    tab.ui.addSceneButton.click()
    tab.ui.dropoutBox.checked = True
    settled(tab)
    assert "single channel" in tab.ui.startButton.toolTip
    tab.ui.baseBox.currentIndex = 1 - tab.ui.baseBox.currentIndex
    settled(tab)
    row = tab.cases.rows[0]
    tab.cases.setChannels(row, {**row.channels, "FLAIR": addVolume("FLAIR a", shape=(20, 22, 24), seed=5)})
    settled(tab)
    assert tab.ui.startButton.enabled and cells(tab, 1)[4] == "note"
    tab._table.select(tab.cases.rows[1])
    assert "It has no FLAIR; the model learns to do without" in said(tab, "caseNotice")
    tab.ui.checkButton.click()
    settled(tab)
    assert tab.ui.startButton.enabled and cells(tab, 1)[4] == "note", "the doctor does not refuse it either"
    tab.ui.patienceBox.value = 3
    assert (tab._form.options.patience, tab._form.options.channelDropout) == (3, 0.25)
    tab.ui.dropoutBox.checked = False
    settled(tab)
    assert "No volume is chosen for the channel FLAIR" in tab.ui.startButton.toolTip


def test_the_doctor_looks_at_cases_of_the_scene_and_what_changed_is_looked_at_again(panel):
    tab = panel.fineTuneTab
    addCase("T1 a", 1)
    volume, segmentation = addCase("T1 b", 2, {"ball": np.zeros((20, 22, 24))})
    tab.ui.addSceneButton.click()
    settled(tab)
    assert cells(tab, 0)[4] == "not checked"
    tab.ui.checkButton.click()
    assert not tab.ui.workRow.isHidden() and not tab.ui.startButton.enabled
    settled(tab)
    assert [cells(tab, row)[4] for row in range(2)] == ["good", "look at it"]
    tab._table.select(tab.cases.rows[1])
    assert "The label of T1 b is empty" in said(tab, "caseNotice")
    image = segmentation.GetSegmentation().GetNthSegment(0).GetRepresentation("Binary labelmap")
    image.GetPointData().GetScalars().Fill(1)
    image.Modified()
    tab.enter()
    settled(tab)
    assert cells(tab, 1)[4] == "not checked"
    volume.GetImageData().GetPointData().GetScalars().Fill(3)
    volume.GetImageData().Modified()
    tab.ui.startButton.click()
    settled(tab)
    assert "was not started, because of T1 b" in said(tab, "messageNotice") and tab.run.shown is None
    assert "every voxel is 3" in tab.ui.startButton.toolTip
    tab.cases.setRole(tab.cases.rows[1], "left out")
    settled(tab)
    assert tab.ui.startButton.enabled


def test_all_cases_are_looked_through_no_more_often_when_there_are_more_of_them(panel, monkeypatch):
    tab, walks = panel.fineTuneTab, []
    kind = type(tab.cases)
    used = kind.used.fget
    monkeypatch.setattr(kind, "used", property(lambda cases: walks.append(cases) or used(cases)))
    counts = []
    for seed in range(4):
        addCase(f"T1 {seed}", seed)
        if seed % 2:
            tab.ui.addSceneButton.click()
            settled(tab)
            tab.ui.checkButton.click()
            settled(tab)
            assert [cells(tab, row)[4] for row in range(seed + 1)] == ["good"] * (seed + 1)
            walks.clear()
            tab._update()
            counts.append(len(walks))
            assert all(row.examined is not None for row in tab.cases.rows)
    assert counts[0] == counts[1], "not once for each case"


def test_a_case_that_lacks_a_segment_says_in_the_table_what_that_teaches_and_what_can_be_done(panel):
    tab = panel.fineTuneTab
    for number, names in enumerate((("ball", "cube"), ("ball",), ("ball", "rest"))):
        masks = {name: np.zeros((20, 22, 24)) for name in names}
        for place, mask in enumerate(masks.values()):
            mask[4 * place : 4 * place + 3] = 1
        addCase(f"T1 {number}", number, masks)
    tab.ui.addSceneButton.click()
    tab.cases.choose({"cube": "cube", "rest": "ignore"})
    settled(tab)
    assert [cells(tab, row)[2] for row in range(3)] == ["ball, cube", "ball, no cube", "ball, no cube, some not known"]
    assert "it is learned that there is none" in tab.ui.casesTable.item(1, 2).toolTip()
    for told in ("it teaches that there is none anywhere", "its voxels are learned as background"):
        tab._table.select(tab.cases.rows[1])
        assert told in said(tab, "caseNotice") and "say under Labels" in said(tab, "caseNotice")
        assert "`ignore`" not in said(tab, "caseNotice"), "nobody can give voxels of a segment a value"
        assert [cells(tab, row)[4] for row in (1, 2)] == ["look at it", "note"]
        if not tab.cases.rows[1].findings:
            tab.ui.checkButton.click()
            settled(tab)
    assert tab.cases.rows[1].findings, "the second time the doctor has looked"


def test_a_data_set_on_disk_is_added_with_its_findings(panel, tmp_path):
    from tiny_datasets import write_dataset

    tab = panel.fineTuneTab
    labels = {"background": 0, "ball": 1, "lower": 2, "core": 3}
    folder = write_dataset(tmp_path / "set", cases=3, channels=("T1",), labels=labels, empty=(1,))
    broken = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / broken["dataset"]["patient02"]["images"][0]).unlink()
    qtclasses.answers.append(str(folder / "dataset.json"))
    tab.ui.addJsonButton.click()
    settled(tab)
    assert [row.name for row in tab.cases.rows] == ["patient00", "patient01", "patient02"]
    assert "lower, core: not among the model's labels" in tab.ui.startButton.toolTip
    tab.cases.choose({"lower": "", "core": "core"})
    settled(tab)
    words = [cells(tab, row)[4] for row in range(3)]
    assert words[1] != "good" and words[2] == "problem"
    assert "patient02" in tab.ui.startButton.toolTip
    tab.cases.setRole(tab.cases.rows[2], "left out")
    settled(tab)
    assert tab.ui.startButton.enabled
    (tmp_path / "nothing").mkdir()
    qtclasses.answers.append(str(tmp_path / "nothing"))
    tab.ui.addFolderButton.click()
    settled(tab)
    assert "No data set format was recognised" in said(tab, "workNotice") and len(tab.cases.rows) == 3


def test_a_run_goes_on_without_the_panel_is_found_again_paused_resumed_and_deleted(scene, models, settings, tmp_path):
    with loadedPanel(models, settings=settings) as module:
        tab = inFront(opened(module))
        for seed in (1, 2):
            addCase(f"T1 {seed}", seed)
        tab.ui.addSceneButton.click()
        tab.ui.minutesBox.value, tab.ui.epochsBox.value = 0, 4000
        settled(tab)
        tab.ui.startButton.click()
        settled(tab)
        assert "goes on while you work" in said(tab, "messageNotice")
        assert "under way" in tab.ui.startButton.toolTip and not tab.ui.startButton.enabled
        folder = tab.run.shown.folder
        waitUntil(lambda: tab.run.state == "running", 300)
    assert isHeld(folder), "the module is closed, and the training goes on"
    assert "T1" not in (folder / "data" / "dataset.json").read_text(encoding="utf-8").replace('"0": "T1"', "")
    with loadedPanel(models, settings=settings) as module:
        tab = inFront(opened(module))
        waitUntil(lambda: tab.run.state == "running", 20)
        assert tab.run.shown.folder == folder
        tab.ui.pauseButton.click()
        waitUntil(lambda: tab.run.state == "paused", 200)
        settled(tab)
        assert tab.ui.pauseButton.text == "Resume" and "under way" not in tab.ui.startButton.toolTip
        before = len((folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
        tab.ui.pauseButton.click()
        waitUntil(lambda: tab.run.state == "running", 300)
        events = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(events[before])["event"] == "started" and not (folder / "stop").exists()
        tab.ui.deleteRunButton.click()
        assert folder.is_dir(), "the first press asks"
        tab.ui.deleteRunButton.click()
        assert not folder.exists() and tab.run.shown is None and tab.ui.runButton.isHidden()
        assert qt.QSettings().value("InvResSegment/RunsFolder") == str(tmp_path / "runs")


def test_stop_and_keep_best_ends_the_training_and_proves_what_there_is(panel):
    tab = inFront(panel)
    for seed in (1, 2):
        addCase(f"T1 {seed}", seed)
    tab.ui.addSceneButton.click()
    tab.ui.minutesBox.value, tab.ui.epochsBox.value = 0, 4000
    settled(tab)
    tab.ui.startButton.click()
    settled(tab)
    record = tab.run.view.record
    waitUntil(lambda: record.epochs.get(1), 300)
    tab.ui.keepButton.click()
    waitUntil(lambda: tab.run.state == "finished", 300)
    comparison, result = record.comparison, record.result
    assert result["training"]["iterations"] >= 25, "an epoch at the least was kept"
    assert comparison["n_cases"] == 1 and comparison["verdict"] == "not enough data to tell"
    folder = tab.run.shown.folder
    assert not (folder / "stop").exists() and not isHeld(folder), "nothing keeps it from going on"
    assert not tab.run.view.ui.proofBox.isHidden()
    assert (folder / ("model" if result["promoted"] else "candidate") / "manifest.json").is_file()
    settled(tab)
    assert tab.ui.startButton.enabled


def test_a_run_that_cannot_begin_says_why(panel, models, tmp_path):
    tab = panel.fineTuneTab
    addCase("T1", 1)
    tab.ui.addSceneButton.click()
    settled(tab)
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    tab.ui.startButton.click()
    settled(tab)
    assert "could not be started" in said(tab, "messageNotice") and tab.run.shown is None
    assert tab.ui.startButton.enabled
