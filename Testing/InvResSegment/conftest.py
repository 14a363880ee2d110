"""Boots Slicer's real MRML from slicer-core for every test of the panel: scene, logics, subject hierarchy."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[2]
STANDINS = Path(__file__).with_name("standins")

for folder in (REPOSITORY / "InvResSegment", Path(__file__).parent, STANDINS):
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")
if importlib.util.find_spec("slicer.i18n") is None and "slicer.i18n" not in sys.modules:
    # slicer-core has no slicer.i18n; Slicer's returns the text itself where there is no translation.
    slicer.i18n = types.ModuleType("slicer.i18n")
    slicer.i18n.tr = lambda text: text
    slicer.i18n.translate = lambda context, text: text
    sys.modules["slicer.i18n"] = slicer.i18n


@pytest.fixture
def scene():
    """An empty scene with Slicer's logics on it; it is `slicer.mrmlScene` during the test."""
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


@pytest.fixture(scope="session")
def one_channel_package(tmp_path_factory):
    """A model with the channel T1 that finds a bright ball, trained in seconds."""
    from small_models import ONE, trained_package

    return trained_package(tmp_path_factory.mktemp("models") / "balls", ("T1",), ONE)


@pytest.fixture(scope="session")
def two_channel_package(tmp_path_factory):
    """A model with the channels T1 and FLAIR and two labels."""
    from small_models import TWO, trained_package

    return trained_package(tmp_path_factory.mktemp("models") / "two balls", ("T1", "FLAIR"), TWO)


@pytest.fixture
def small_model(one_channel_package):
    """What the panel knows of the one-channel model."""
    from small_models import model_info

    return model_info(one_channel_package)


@pytest.fixture(scope="session")
def finished_run(one_channel_package, tmp_path_factory):
    """The folder of a fine-tuning on three cases, beside it `base` and `data`; made once, so copy it to change it."""
    from tiny_run import tuned

    return tuned(one_channel_package, tmp_path_factory.mktemp("fine-tuning"))


@pytest.fixture(scope="session")
def backend():
    """The real backend behind the real BackendProcess, one worker for all tests."""
    from backends import RecordingBackend

    backend = RecordingBackend()
    yield backend
    backend.stop()
