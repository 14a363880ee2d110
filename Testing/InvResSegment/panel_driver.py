"""The whole panel on the stand-ins, with the real backend on this Python: for tests and screenshots."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import standins
import warm_python

standins.install()

import qt  # noqa: E402
import slicer  # noqa: E402
import vtk  # noqa: E402
from standins import moduleloader, pythonqt, qtclasses  # noqa: E402
from vtk.util.numpy_support import numpy_to_vtk  # noqa: E402

__all__ = ["addSegmentation", "addVolume", "loadedPanel", "picture", "waitUntil"]

MODULE = Path(__file__).resolve().parents[2] / "InvResSegment" / "InvResSegment.py"
WIDTH = 420  # pixels: Slicer's module panel on a common screen
waitUntil = standins.waitUntil


@contextlib.contextmanager
def loadedPanel(
    modelsFolder: Path,
    python: str = "",
    settings: dict | None = None,
    bundled: bool = False,
):
    """The loaded module, shown; in the end it is unloaded and no exception may have been lost in a slot.

    modelsFolder: the folder of own models. python: the Python of the backend; else it is that of `warm_python`, which
    is examined only for the first panel of this session. bundled: list the bundled models, too.
    """
    qt.QSettings().clear()
    for key, value in {
        "InvResSegment/PythonExecutable": python or warm_python.program(),
        "InvResSegment/ModelsFolder": str(modelsFolder),
        "InvResSegment/RunsFolder": str(Path(modelsFolder) / "no runs"),
        **(settings or {}),
    }.items():
        qt.QSettings().setValue(key, value)
    pythonqt.slotErrors.clear()
    qtclasses.answers.clear()
    module = moduleloader.ScriptedModule(MODULE)
    try:
        panel = module.widgetRepresentation().self().panel
        if not python:
            _shortenExamination(panel.dependencies)
        if not bundled:
            _hideBundled(panel.services.catalogue)
        yield module
    finally:
        backend = module.widgetRepresentation().self().panel.backend
        module.unload()
        standins.pump(0.05)
        assert not backend.running
    assert not pythonqt.slotErrors, pythonqt.slotErrors
    assert not qtclasses.answers, "a dialog that was expected did not open"


def _hideBundled(catalogue) -> None:
    refresh = catalogue.refresh

    def refreshed(onDone):
        return refresh(lambda models, error: onDone([model for model in models if not model.bundled], error))

    catalogue.refresh = refreshed


_examined: list = []


def _shortenExamination(dependencies) -> None:
    check = dependencies.check

    def remembering(onDone):
        if _examined:
            dependencies.preflight = _examined[0]
            qt.QTimer.singleShot(0, lambda: onDone(_examined[0]))
        else:
            check(lambda found: (_examined.append(found), onDone(found)))

    dependencies.check = remembering


def addVolume(name: str, shape=(20, 22, 24), seed: int = 0, origin=(0.0, 0.0, 0.0), voxels=None):
    """A volume of noise, or of the voxels (K, J, I), in the scene."""
    if voxels is None:
        voxels = np.random.default_rng(seed).normal(100, 10, shape)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    slicer.util.updateVolumeFromArray(node, np.ascontiguousarray(voxels, dtype=np.float32))
    node.SetOrigin(*origin)
    node.CreateDefaultDisplayNodes()
    return node


def addSegmentation(volume, masks: dict, name: str = ""):
    """A segmentation of the volume. masks: segment name -> voxels (K, J, I), not 0 where it is."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name or f"{volume.GetName()} segmentation")
    node.CreateDefaultDisplayNodes()
    node.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    matrix = vtk.vtkMatrix4x4()
    volume.GetIJKToRASMatrix(matrix)
    for index, (segmentName, mask) in enumerate(masks.items()):
        image = slicer.vtkOrientedImageData()
        image.SetDimensions(*mask.shape[::-1])
        voxels = np.ascontiguousarray(np.asarray(mask) != 0, dtype=np.uint8)
        image.GetPointData().SetScalars(numpy_to_vtk(voxels.ravel(), deep=True))
        image.SetGeometryFromImageToWorldMatrix(matrix)
        segment = slicer.vtkSegment()
        segment.SetName(segmentName)
        segment.SetLabelValue(1)
        segment.AddRepresentation("Binary labelmap", image)
        node.GetSegmentation().AddSegment(segment, f"Segment_{index}")
    return node


def tunedManifest(folder: Path, **changes) -> None:
    """Change what the manifest of a package says of itself."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest.update(changes)
    path.write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def picture(widget, path: Path, width: int = WIDTH) -> Path:
    """Write the widget, as high as it wants to be, to a PNG file."""
    widget = widget.window()
    widget.show()
    for _again in range(3):  # heights follow from widths, row heights from columns
        layout = widget.layout()
        height = max(layout.totalHeightForWidth(width), layout.totalMinimumSize().height())
        widget.resize(width, height)
        standins.pump(0.05)
    widget.grab().save(str(path))
    return path
