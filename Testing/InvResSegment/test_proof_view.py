"""The proof of a real fine-tuning: verdict, tables, a case in the slice views, promote, discard, roll back."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("PySide6") is None:  # asked for without importing it: `standins` has to come first
    pytest.skip("PySide6 is not installed", allow_module_level=True)

import qt
import SimpleITK as sitk
import slicer
from InvResSegmentLib import ProofView as proof_module
from InvResSegmentLib.CaseOverlay import COLOURS
from InvResSegmentLib.ModelCard import cardText
from InvResSegmentLib.Models import ModelCatalogue
from InvResSegmentLib.ModelsTab import ModelsTab
from InvResSegmentLib.NodeConversion import segmentMask
from InvResSegmentLib.RunRecord import DISCARDED, PROMOTED, ROLLED_BACK, RunRecord
from InvResSegmentLib.RunView import RunView
from small_models import add_volume
from standins import pythonqt, waitUntil


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, as if it had not been decided upon."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def catalogue(backend, one_channel_package, tmp_path):
    """A folder of models in which only the base model is."""
    models = tmp_path / "models"
    shutil.copytree(one_channel_package.path, models / "balls")
    return ModelCatalogue(backend, models)


@pytest.fixture
def view(scene, catalogue):
    for layout in ("Red", "Green"):
        slice_node = scene.AddNewNodeByClass("vtkMRMLSliceNode", layout)
        slice_node.SetLayoutName(layout)
        scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode", layout).SetLayoutName(layout)
    window = qt.QWidget()
    qt.QVBoxLayout(window)
    window.show()
    pythonqt.slotErrors.clear()
    view = RunView(window, catalogue)
    view.decided = []
    view.onDecided = lambda: view.decided.append(RunRecord(view.record.folder).decision["decision"])
    yield view
    view.cleanup()
    window.hide()
    assert not pythonqt.slotErrors


def cells(table):
    return [[table.item(row, column).text() for column in range(table.columnCount)] for row in range(table.rowCount)]


def changed(run, **fields):
    """Writes another verdict into a run."""
    path = run / "comparison.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(fields)
    path.write_text(json.dumps(content), encoding="utf-8")


def names_of(catalogue):
    found = []
    catalogue.refresh(lambda models, error: found.append((models, error)))
    waitUntil(lambda: found, 60)
    models, error = found[0]
    assert not error
    return {model.version: model for model in models if model.name == "balls"}


# ---------------------------------------------------------------- words and figures


def test_the_verdict_comes_first_and_in_words(view, run):
    view.show(run)
    said = f"{view.ui.verdictNoticeText.text} {view.ui.verdictText.text}"
    sentence = json.loads((run / "comparison.json").read_text(encoding="utf-8"))["sentence"]
    assert said.startswith("There is not enough data to tell") and sentence in said
    assert "held out once" in said, "the model itself has seen all cases"
    changed(run, of="model and trainings of the same kind on other cases")
    view.show(run)
    assert "one of these trainings" in view.ui.verdictText.text and "all of them" not in view.ui.verdictText.text
    for verdict, words in (("better", "is better."), ("worse", "got worse."), ("as good", "is as good as before.")):
        changed(run, verdict=verdict, base_check={"verdict": "worse", "sentence": "forgotten."})
        view.show(run)
        assert words in view.ui.verdictNoticeText.text and "forgotten." in view.ui.verdictText.text


def test_the_table_has_the_figures_of_the_comparison(view, run):
    view.show(run)
    content = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    rows = cells(view.ui.proofTable)
    assert [row[:2] for row in rows] == [["ball", "Dice"], ["", "HD95 [mm]"], ["", "Volume error [mL]"]]
    dice = content["labels"]["ball"]["Dice"]
    low, high = dice["difference"]["ci95"]
    assert rows[0][2:4] == [f"{dice['base']['mean']:.3f}", f"{dice['tuned']['mean']:.3f}"]
    assert rows[0][4] == f"{dice['difference']['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
    assert [row[0] for row in cells(view.ui.casesTable)] == [case["case"] for case in content["cases"]]
    differences = [float(row[3]) for row in cells(view.ui.casesTable)]
    assert differences == sorted(differences), "worst first"


def test_an_interval_is_judged_by_what_its_metric_wants(view, run):
    content = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    labels = content["labels"]
    labels["ball"]["Dice"]["difference"]["ci95"] = [0.01, 0.02]
    labels["ball"]["HD95_mm"]["difference"]["ci95"] = [0.5, 1.5]
    changed(run, labels=labels)
    view.show(run)
    tips = [view.ui.proofTable.item(row, 4).toolTip() for row in range(3)]
    assert "better beyond chance" in tips[0] and "worse beyond chance" in tips[1] and "no difference" in tips[2]


def test_a_segment_that_the_base_model_lacks_is_no_zero(view, run):
    content = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    for values in content["labels"]["ball"].values():
        nothing = {"mean": None, "sd": None, "median": None, "n": 0}
        values.update(base=nothing, difference={**nothing, "ci95": None})
    changed(run, labels=content["labels"], verdict="nothing to compare")
    view.show(run)
    assert cells(view.ui.proofTable)[0][2] == cells(view.ui.proofTable)[0][4] == "–"


@pytest.mark.parametrize(("value", "shown"), [(-0.04, "+0.0"), (0.04, "+0.0"), (-0.06, "-0.1"), (None, "–")])
def test_a_difference_of_nothing_has_no_minus(value, shown):
    assert proof_module._number(value, 1, "+") == shown


# ---------------------------------------------------------------- a case in the views


def test_a_case_is_shown_at_its_worst_place_and_leaves_no_trace(view, scene, run):
    own = add_volume(scene, np.zeros((4, 4, 4), np.float32), name="my volume")
    mine = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    mine.CreateDefaultDisplayNodes()
    composite = scene.GetFirstNodeByClass("vtkMRMLSliceCompositeNode")
    composite.SetBackgroundVolumeID(own.GetID())
    before = nodes_of(scene)
    red = scene.GetFirstNodeByClass("vtkMRMLSliceNode")
    place = [red.GetSliceToRAS().GetElement(row, 3) for row in range(3)]
    view.show(run)
    first = {node for node in nodes_of(scene) if "Segmentation" in node or "ScalarVolume" in node}
    view.ui.casesTable.selectRow(0)
    case = json.loads((run / "comparison.json").read_text(encoding="utf-8"))["cases"][0]
    shown = [node for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode") if node is not mine]
    assert [node.GetName() for node in shown] == [
        f"{case['case']} {which}" for which in ("reference", "base model", "tuned model")
    ]
    for node, which in zip(shown, ("reference", "base", "tuned"), strict=True):
        segment = node.GetSegmentation().GetNthSegment(0)
        assert segment.GetName() == "ball" and segment.GetColor() == pytest.approx(COLOURS[which], abs=0.01)
        assert node.GetHideFromEditors() and not node.GetSaveWithScene()
        assert node.GetDisplayNode().GetVisibility2DOutline() and not node.GetDisplayNode().GetVisibility2DFill()
        file = sitk.ReadImage(case["files"][which])
        mask, matrix = segmentMask(node, node.GetSegmentation().GetNthSegmentID(0))
        assert np.count_nonzero(mask) == np.count_nonzero(sitk.GetArrayFromImage(file)) > 0
        centre = matrix @ [*(np.argwhere(mask).mean(axis=0)[::-1]), 1]
        assert centre[:3] == pytest.approx(centre_of(file), abs=1e-3), f"{which} lies elsewhere"
    image = scene.GetNodeByID(composite.GetBackgroundVolumeID())
    assert image.GetName() == case["case"] and image.GetHideFromEditors()
    for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
        middle = [node.GetSliceToRAS().GetElement(row, 3) for row in range(3)]
        assert middle == pytest.approx(case["worst_point_mm"])
    assert not mine.GetDisplayNode().GetVisibility(), "it would hide the outlines"
    assert not view.ui.legendRow.isHidden() and "tuned model" in view.ui.legendText.text
    view.ui.casesTable.selectRow(1)
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 4, "one case at a time"
    view.ui.hideCaseButton.click()
    assert first == {node for node in nodes_of(scene) if "Segmentation" in node or "ScalarVolume" in node}
    assert composite.GetBackgroundVolumeID() == own.GetID() and mine.GetDisplayNode().GetVisibility()
    assert [red.GetSliceToRAS().GetElement(row, 3) for row in range(3)] == place
    view.clear()
    assert nodes_of(scene) == before


def test_a_case_goes_when_nobody_looks(view, scene, run):
    view.show(run)
    view.ui.casesTable.selectRow(0)
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    view.widget.window().hide()
    waitUntil(lambda: not slicer.util.getNodesByClass("vtkMRMLSegmentationNode"), 5)
    assert not slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")


def test_closing_the_scene_under_a_case_is_no_error(view, scene, run):
    view.show(run)
    view.ui.casesTable.selectRow(0)
    scene.Clear(False)
    view.clear()
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode")


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(view, run):
    content = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    case = content["cases"][0]
    case["files"]["images"] = [str(run / "moved.nii.gz")]
    broken = run / "comparison" / "broken.seg.nrrd"
    broken.write_bytes((run / "comparison" / "case0_base.seg.nrrd").read_bytes()[:-30])
    case["files"]["base"] = str(broken)
    changed(run, cases=content["cases"])
    view.show(run)
    view.ui.casesTable.selectRow(0)
    said = view.ui.overlayNoticeText.text
    assert "moved.nii.gz is not there" in said and "broken.seg.nrrd could not be read" in said
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 2


# ---------------------------------------------------------------- decisions


def test_a_model_that_did_not_get_better_is_promoted_only_when_asked_twice(view, run, catalogue):
    told = []
    catalogue.changed.append(told.append)
    view.show(run)
    assert not (run / "model").exists(), "the proof did not speak for it"
    view.ui.promoteButton.click()
    assert (
        "Promote all the same" in view.ui.promoteButton.text and "does not speak for" in view.ui.decisionNoticeText.text
    )
    assert not told and RunRecord(run).decision == {}
    view.ui.promoteButton.click()
    waitUntil(lambda: view.decided, 60)
    assert view.decided == [PROMOTED]
    models = names_of(catalogue)
    assert sorted(models) == ["1.0.0", "1.1.0"] and models["1.1.0"].active and not models["1.0.0"].active
    assert told == [models["1.1.0"].path], "it is the one to be chosen"
    assert view.ui.rollbackButton.enabled and not view.ui.promoteButton.enabled and not view.ui.discardButton.enabled
    view.ui.rollbackButton.click()
    waitUntil(lambda: len(view.decided) == 2, 60)
    models = names_of(catalogue)
    assert view.decided[-1] == ROLLED_BACK and models["1.0.0"].active
    assert told[-1] == models["1.0.0"].path
    view.ui.promoteButton.click()
    view.ui.promoteButton.click()
    waitUntil(lambda: len(view.decided) == 3, 60)
    assert names_of(catalogue)["1.1.0"].active


def test_a_decided_run_keeps_its_proof_and_its_model_and_nothing_that_only_training_needed(view, run, scene):
    content = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    for case in content["cases"]:
        place = run / "data" / case["case"]
        place.mkdir(parents=True)
        for name, source in (("0000", case["files"]["images"][0]), ("label", case["files"]["reference"])):
            shutil.copyfile(source, place / f"{name}.nii.gz")
        (place / "0001.nii.gz").write_bytes(b"another channel")
        files = {"images": [str(place / f"{name}.nii.gz") for name in ("0000", "0001")]}
        case["files"] |= files | {"reference": str(place / "label.nii.gz")}
    (run / "data" / "learned from").mkdir()
    (run / "data" / "learned from" / "0000.nrrd").write_bytes(b"an image")
    changed(run, cases=content["cases"])
    view.show(run)
    view.ui.promoteButton.click()
    view.ui.promoteButton.click()
    waitUntil(lambda: view.decided, 60)
    assert not (run / "prepared").exists() and not list(run.glob("*/checkpoint.pt"))
    left = {path.name for path in (run / "data").rglob("*") if path.is_file()}
    assert left == {"0000.nii.gz", "label.nii.gz"} and not list((run / "data" / "learned from").iterdir())
    waitUntil(lambda: not list(run.parent.glob(".gone-*")), 10)
    assert (run / "candidate").is_dir(), "after a roll back it can be promoted again"
    view.ui.casesTable.selectRow(0)
    assert view.ui.overlayNotice.isHidden() and len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 3


def test_a_promotion_goes_through_while_something_else_is_shown(view, run, catalogue, caplog):
    told = []
    catalogue.changed.append(told.append)
    view.show(run)
    view.onDecided = lambda: None
    view.ui.promoteButton.click()
    view.ui.promoteButton.click()
    view.clear()
    waitUntil(lambda: told, 60)
    assert RunRecord(run).decision["decision"] == PROMOTED and not caplog.records
    view.show(run)
    assert view.ui.rollbackButton.enabled
    view.ui.rollbackButton.click()
    view.clear()
    shutil.rmtree(catalogue.modelsFolder)
    waitUntil(lambda: not catalogue._backend.busy, 60)
    assert not caplog.records


def test_a_better_model_that_lost_some_labels_is_promoted_only_when_asked_twice(view, run):
    events = run / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    lines[-1] |= {"verdict": "better", "promoted": True}
    lines[-1]["transfer"]["labels"]["dropped"] = ["left kidney", "spleen"]
    events.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    changed(run, verdict="better", worse_labels=["liver"])
    view.show(run)
    view.ui.promoteButton.click()
    said = view.ui.decisionNoticeText.text
    assert "got worse: liver" in said and "any more: left kidney, spleen" in said
    assert "does not speak for" not in said and view.ui.promoteButton.text == "Promote all the same"
    for verdict in ("not enough data to tell", "nothing to compare"):
        lines[-1] |= {"verdict": verdict, "promoted": False}
        events.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        content = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
        content["labels"]["ball"]["Dice"]["tuned"]["mean"] = 0.4
        for mean, whole in ((0.01, False), (-0.01, verdict.startswith("not enough"))):
            changed(run, verdict=verdict, difference={"mean": mean}, held_out=True, labels=content["labels"])
            view.clear()
            view.show(run)
            view.ui.promoteButton.click()
            assert ("does not speak for" in view.ui.decisionNoticeText.text) == whole, (verdict, mean)
    lines[-1] |= {"base_check": {"verdict": "better", "worse_labels": ["pancreas"]}, "promoted": False}
    events.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    view.clear()
    view.show(run)
    view.ui.promoteButton.click()
    assert "forgotten some" in view.ui.decisionNoticeText.text and "liver" in view.ui.decisionNoticeText.text


def test_a_promotion_that_fails_can_be_tried_again(view, run):
    (run / "candidate" / "model.safetensors").write_bytes(b"damaged")
    view.show(run)
    view.ui.promoteButton.click()
    view.ui.promoteButton.click()
    waitUntil(lambda: view.ui.promoteButton.enabled, 60)
    assert view.decided == [] and view.ui.decisionNoticeText.text and RunRecord(run).decision == {}


def test_discarding_asks_once_and_keeps_what_was_proved(view, run, catalogue):
    view.show(run)
    view.ui.discardButton.click()
    assert (run / "candidate").is_dir() and view.decided == []
    view.ui.discardButton.click()
    assert view.decided == [DISCARDED] and not (run / "candidate").exists() and not (run / "prepared").exists()
    assert not list(run.glob("*/checkpoint.pt")) and (run / "comparison.json").is_file()
    assert not any(b.enabled for b in (view.ui.promoteButton, view.ui.discardButton, view.ui.rollbackButton))
    assert list(names_of(catalogue)) == ["1.0.0"]


def nodes_of(scene) -> list[str]:
    return sorted(scene.GetNthNode(index).GetID() for index in range(scene.GetNumberOfNodes()))


def centre_of(image) -> list[float]:
    """RAS mm of the middle of what is not background."""
    index = np.argwhere(sitk.GetArrayFromImage(image)).mean(axis=0)[::-1]
    x, y, z = image.TransformContinuousIndexToPhysicalPoint(index.tolist())
    return [-x, -y, z]


def test_a_tuned_model_can_be_rolled_back_from_the_list_of_models(scene, run, catalogue):
    resources = Path(proof_module.__file__).parents[1] / "Resources"
    told, done = [], []
    catalogue.changed.append(told.append)
    catalogue.importModel(run / "candidate", done.append)
    waitUntil(lambda: done, 60)
    services = SimpleNamespace(
        resourcePath=lambda name: str(resources / name), catalogue=catalogue, refreshModels=lambda: None
    )
    tab = ModelsTab(services)
    tab.setModels(list(names_of(catalogue).values()), "")
    rows = {row[1]: index for index, row in enumerate(cells(tab.ui.modelsTable))}
    assert set(rows) == {"1.0.0", "1.1.0, tuned, in use"}
    tab.ui.modelsTable.selectRow(rows["1.0.0"])
    assert not tab.ui.rollbackButton.enabled and "not tuned from another" in tab.ui.rollbackButton.toolTip
    tab.ui.modelsTable.selectRow(rows["1.1.0, tuned, in use"])
    tab.ui.rollbackButton.click()
    waitUntil(lambda: told, 60)
    models = names_of(catalogue)
    assert told == [models["1.0.0"].path] and models["1.0.0"].active
    tab.setModels(list(models.values()), "")
    assert {row[1] for row in cells(tab.ui.modelsTable)} == {"1.0.0, in use", "1.1.0, tuned"}
    assert not tab.ui.rollbackButton.enabled, "its name stands for the other one already"
    assert "1.1.0, fine-tuned" in cardText(models["1.1.0"])
