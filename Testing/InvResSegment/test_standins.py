"""Calibration: the stand-ins and the check of names notice the mistakes that a real Slicer would punish."""

from __future__ import annotations

import shutil

import pytest
import standins

standins.install()

import ctk  # noqa: E402
import qt  # noqa: E402
import slicer  # noqa: E402
import test_names  # noqa: E402
from standins import pythonqt, qtclasses  # noqa: E402
from used_names import MODULE, usedNames  # noqa: E402


def test_a_property_is_no_method():
    with pytest.raises(TypeError, match="not callable"):
        qt.QPushButton("Apply").text()


def test_a_method_is_no_property():
    with pytest.raises(AttributeError, match="not a property"):
        qt.QTimer().start = 5


def test_a_misspelt_property_cannot_be_set():
    with pytest.raises(AttributeError, match="not a property"):
        qt.QLabel().tooltip = "text"


def test_a_misspelt_signal_cannot_be_connected():
    with pytest.raises(ValueError, match="no signal"):
        qt.QPushButton().connect("clickd()", print)
    with pytest.raises(ValueError, match="no signal"):
        slicer.qMRMLNodeComboBox().connect("currentNodeChanged(vtkMRMLVolumeNode*)", print)


def test_a_setter_that_is_no_slot_cannot_be_called():
    with pytest.raises(AttributeError, match="Python can reach"):
        slicer.qMRMLNodeComboBox().setNodeTypes(["vtkMRMLScalarVolumeNode"])
    with pytest.raises(AttributeError, match="Python can reach"):
        ctk.ctkCollapsibleButton().setCollapsed(True)


def test_a_selector_goes_on_to_the_neighbour_of_a_node_that_is_removed(scene):
    selector = slicer.qMRMLNodeComboBox()
    selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    selector.noneEnabled = True
    selector.setMRMLScene(scene)
    first, second = (scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name) for name in ("first", "second"))
    selector.setCurrentNode(first)
    scene.RemoveNode(first)
    assert selector.currentNode() is second
    scene.RemoveNode(second)
    assert selector.currentNode() is None
    selector.setMRMLScene(None)


def test_a_slot_gets_no_more_arguments_than_it_takes_and_its_exceptions_are_kept():
    button, seen = qt.QPushButton(), []
    button.setCheckable(True)
    button.connect("toggled(bool)", lambda: seen.append("none"))
    button.connect("toggled(bool)", lambda on: seen.append(on))
    button.connect("toggled(bool)", lambda on, second: None)
    pythonqt.slotErrors.clear()
    button.click()
    assert seen == ["none", True] and len(pythonqt.slotErrors) == 1
    pythonqt.slotErrors.clear()


def test_a_name_that_slicer_app_lacks_raises():
    with pytest.raises(AttributeError, match="has no"):
        slicer.app.mainWindow()


def test_a_dialog_that_nobody_expects_fails_the_test():
    with pytest.raises(qtclasses.UnexpectedDialog):
        qt.QFileDialog.getOpenFileName(None, "", "", "")
    with pytest.raises(qtclasses.UnexpectedDialog):
        slicer.util.confirmYesNoDisplay("Really?")


UI_DEFECTS = {
    "class": ('class="ctkSearchBox" name="searchBox"', 'class="ctkSearchField" name="searchBox"'),
    "property": ('name="noneDisplay"', 'name="noneText"'),
    "signal": ("mrmlSceneChanged(vtkMRMLScene*)", "sceneChanged(vtkMRMLScene*)"),
    "slot": ("setMRMLScene(vtkMRMLScene*)", "setScene(vtkMRMLScene*)"),
    "receiver": ("<receiver>roiSelector</receiver>", "<receiver>regionSelector</receiver>"),
}


@pytest.mark.parametrize("what", UI_DEFECTS)
def test_a_defect_in_a_ui_file_is_noticed(what, tmp_path):
    right, wrong = UI_DEFECTS[what]
    text = (MODULE / "Resources" / "UI" / "SegmentTab.ui").read_text(encoding="utf-8")
    assert right in text
    path = tmp_path / "SegmentTab.ui"
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises((RuntimeError, AttributeError, ValueError)):
        slicer.util.loadUI(str(path))


CODE_DEFECTS = {
    "a MRML method": ("ResultView.py", "GetNumberOfRows()", "GetRowCount()"),
    "a function of slicer.util": ("SegmentTab.py", "slicer.util.loadUI", "slicer.util.loadUi"),
    "a class of Qt": ("SegmentTab.py", "qt.QTimer()", "qt.QTimers()"),
    "a class of Slicer": ("ChannelPickers.py", "slicer.qMRMLNodeComboBox()", "slicer.qMRMLNodeSelector()"),
    "an enum": ("Notice.py", "SP_MessageBoxWarning", "SP_MessageBoxWarn"),
    "a signal": ("SegmentTab.py", '"timeout()"', '"timedOut()"'),
    "a slot": ("ResultView.py", "setSegmentationNode", "setSegmentation"),
    "an event": ("SegmentTab.py", "TransformModifiedEvent", "TransformChangedEvent"),
}


@pytest.mark.parametrize("what", CODE_DEFECTS)
def test_a_misspelt_name_in_the_code_is_noticed(what, tmp_path):
    file, right, wrong = CODE_DEFECTS[what]
    shutil.copytree(MODULE, tmp_path / "module", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "module" / "InvResSegmentLib" / file
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    used = usedNames(tmp_path / "module")
    with pytest.raises(AssertionError):
        test_names.test_every_name_of_a_module_exists(used, "5.12")
        test_names.test_every_signal_exists(used, "5.12")
        test_names.test_every_member_is_slicers_or_the_modules_own_or_pythons(used, "5.12")
