"""One compared case in the slice views: its image and three outlines, jumped to the worst place; all of it passing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
import vtk
from slicer.i18n import tr as _

from . import NodeFiles
from .NodeConversion import ConversionError

__all__ = ["COLOURS", "CaseOverlay", "titles"]

COLOURS = {"reference": (0.00, 0.80, 0.45), "base": (0.95, 0.62, 0.00), "tuned": (0.34, 0.71, 0.95)}
"""Of the outlines: told apart on grey images, and by people who do not see all colours (Okabe and Ito)."""
THICKNESS = 2  # pixels


def titles() -> dict[str, str]:
    """What each outline is, in words."""
    return {"reference": _("reference"), "base": _("base model"), "tuned": _("tuned model")}


class CaseOverlay:
    """Shows one case at a time; `clear` takes everything out of the scene and puts the views back as they were."""

    def __init__(self) -> None:
        self._nodes: list[slicer.vtkMRMLNode] = []
        self._undo: list[Callable[[], None]] = []

    @property
    def shown(self) -> bool:
        """Whether a case is in the views."""
        return bool(self._nodes)

    def show(self, case: dict[str, Any]) -> list[str]:
        """Shows an entry of `cases` in comparison.json. Returns a sentence for each thing that could not be shown."""
        self.clear()
        files, problems = case.get("files") or {}, []
        name = str(case.get("case") or "")
        image = self._load(problems, lambda: self._image(files, name))
        if image is not None:
            self._showBackground(image)
        self._hideOtherSegmentations()
        for source, title in titles().items():
            if files.get(source):
                self._load(problems, lambda source=source, title=title: self._outline(case, source, f"{name} {title}"))
        if self._nodes and case.get("worst_point_mm"):
            self._jump(case["worst_point_mm"])
        if not self._nodes:
            self._restore()
        return problems

    def clear(self) -> None:
        """Leaves the scene and the views as they were before."""
        nodes, self._nodes = self._nodes, []
        self._restore()
        for node in reversed(nodes):
            # Whoever closed the scene has taken them along.
            if node.GetScene() is not None:
                node.GetScene().RemoveNode(node)

    def _restore(self) -> None:
        undo, self._undo = self._undo, []
        for step in reversed(undo):
            step()

    # ---------------------------------------------------------------- nodes

    @staticmethod
    def _load(problems: list[str], load: Callable[[], Any]) -> Any:
        try:
            return load()
        except ConversionError as error:
            problems.append(f"{error.message} {error.hint}".strip())
            return None

    def _image(self, files: dict[str, Any], name: str):
        images = files.get("images") or []
        if not images:
            raise ConversionError(_("The image of {name} is not known.").format(name=name))
        return self._keep(NodeFiles.loadVolume(Path(images[0]), name, passing=True))

    def _outline(self, case: dict[str, Any], source: str, name: str):
        found = NodeFiles.readLabels(Path(case["files"][source]), case.get("reference_values"))
        node = self._keep(NodeFiles.newSegmentation(found, name, COLOURS[source], passing=True))
        display = node.GetDisplayNode()
        display.SetVisibility2DFill(False)
        display.SetVisibility2DOutline(True)
        display.SetVisibility3D(False)
        display.SetSliceIntersectionThickness(THICKNESS)
        return node

    def _keep(self, node):
        self._nodes += [one for one in (node, node.GetDisplayNode()) if one is not None]
        return node

    # ---------------------------------------------------------------- views

    def _hideOtherSegmentations(self) -> None:
        for display in slicer.util.getNodesByClass("vtkMRMLSegmentationDisplayNode"):
            if display.GetVisibility():
                display.SetVisibility(False)
                self._undo.append(lambda display=display: display.SetVisibility(True))

    def _showBackground(self, image) -> None:
        for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
            before = (
                composite.GetBackgroundVolumeID(),
                composite.GetForegroundVolumeID(),
                composite.GetLabelVolumeID(),
            )
            self._undo.append(lambda composite=composite, before=before: _setLayers(composite, *before))
            _setLayers(composite, image.GetID(), None, None)
        for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
            matrix = vtk.vtkMatrix4x4()
            matrix.DeepCopy(node.GetSliceToRAS())
            view = tuple(node.GetFieldOfView())
            self._undo.append(lambda node=node, matrix=matrix, view=view: _setSlice(node, matrix, view))
        layout = slicer.app.layoutManager()
        for name in layout.sliceViewNames() if layout is not None else ():
            layout.sliceWidget(name).fitSliceToBackground()

    @staticmethod
    def _jump(point: list[float]) -> None:
        for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
            node.JumpSliceByCentering(*point)


def _setLayers(composite, background: str | None, foreground: str | None, label: str | None) -> None:
    composite.SetBackgroundVolumeID(background)
    composite.SetForegroundVolumeID(foreground)
    composite.SetLabelVolumeID(label)


def _setSlice(node, matrix: vtk.vtkMatrix4x4, view: tuple[float, ...]) -> None:
    node.GetSliceToRAS().DeepCopy(matrix)
    node.UpdateMatrices()
    node.SetFieldOfView(*view)
