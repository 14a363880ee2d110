"""Boots Slicer's real MRML from slicer-core: where the module is found, and a scene with Slicer's logics on it."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

for folder in (HERE.parents[1] / "InvResSegment", HERE, HERE / "standins"):
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")
if importlib.util.find_spec("slicer.i18n") is None and "slicer.i18n" not in sys.modules:
    # slicer-core has no slicer.i18n; Slicer's returns the text itself where there is no translation.
    slicer.i18n = types.ModuleType("slicer.i18n")
    slicer.i18n.tr = lambda text: text
    slicer.i18n.translate = lambda context, text: text
    sys.modules["slicer.i18n"] = slicer.i18n


@contextlib.contextmanager
def emptyScene():
    """An empty scene with Slicer's logics on it; it is `slicer.mrmlScene` meanwhile."""
    scene = slicer.vtkMRMLScene()
    before = slicer.__dict__.get("mrmlScene")
    slicer.mrmlScene = scene
    application = slicer.vtkSlicerApplicationLogic()
    application.SetMRMLScene(scene)
    logics = [application]
    for name, kind in (
        ("Colors", slicer.vtkSlicerColorLogic),
        ("Volumes", slicer.vtkSlicerVolumesLogic),
        ("Segmentations", slicer.vtkSlicerSegmentationsModuleLogic),
        ("SubjectHierarchy", slicer.vtkSlicerSubjectHierarchyModuleLogic),
        ("Markups", slicer.vtkSlicerMarkupsLogic),
        ("Tables", slicer.vtkSlicerTablesLogic),
        ("Sequences", slicer.vtkSlicerSequencesLogic),
    ):
        logic = kind()
        logic.SetMRMLApplicationLogic(application)
        application.SetModuleLogic(name, logic)
        logic.SetMRMLScene(scene)
        logics.append(logic)
    slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)  # makes it where there is none
    yield scene
    scene.Clear(True)
    for logic in reversed(logics):
        logic.SetMRMLScene(None)
    slicer.mrmlScene = before
