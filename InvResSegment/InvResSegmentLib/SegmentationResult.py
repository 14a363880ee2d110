"""A finished segmentation in the scene: place in the subject hierarchy, display, volumes, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from . import NodeConversion

__all__ = [
    "PROVENANCE_ATTRIBUTE",
    "TABLE_ROLE",
    "InputRecord",
    "Provenance",
    "SceneChange",
    "SegmentVolume",
    "createSegmentationNode",
    "fillVolumesTable",
    "measureVolumes",
    "placeBeside",
    "readProvenance",
    "seriesUidOf",
    "showInSlices",
    "showSurfaces",
    "storeProvenance",
    "volumesTableOf",
]

PROVENANCE_ATTRIBUTE = "InvResSegment.Provenance"
TABLE_ROLE = "InvResSegment.VolumesTable"
"""Node reference of a segmentation to the table of its volumes."""

_KEPT_RUNS = 20
CLOSED_SURFACE = "Closed surface"


@dataclass(frozen=True)
class InputRecord:
    """A volume that was segmented."""

    channel: str
    name: str
    nodeId: str
    seriesInstanceUid: str = ""


@dataclass(frozen=True)
class Provenance:
    """How a segmentation came about. settings: what was chosen, as JSON knows it; versions: program -> version.

    date: UTC, ISO 8601. measuredPeakBytes: 0 if it was not measured.
    """

    model: str
    modelSha256: str
    inputs: tuple[InputRecord, ...]
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    seconds: float = 0.0
    measuredPeakBytes: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SegmentVolume:
    """The size of a segment. millilitres: in the world, that is with a parent transform that scales."""

    segmentId: str
    name: str
    voxels: int
    millilitres: float


@dataclass
class SceneChange:
    """What a run did to the scene, so that it can be taken back as one step.

    target: id of the segmentation that the run wrote into. created: ids of the nodes that it added.
    segments: what it did to the segments. before: of a target that was there before, what else it changed.
    restore: what else is to be called to take it back, the last one first.
    """

    target: str = ""
    created: list[str] = field(default_factory=list)
    segments: NodeConversion.ImportedSegments = field(default_factory=NodeConversion.ImportedSegments)
    before: dict[str, str | None] = field(default_factory=dict)
    restore: list[Callable[[], None]] = field(default_factory=list)

    def keep(self, segmentationNode: slicer.vtkMRMLSegmentationNode) -> None:
        """Notes how a segmentation is before the run writes into it."""
        self.before = {
            "provenance": segmentationNode.GetAttribute(PROVENANCE_ATTRIBUTE),
            "transform": segmentationNode.GetTransformNodeID(),
            "reference": segmentationNode.GetNodeReferenceID(_geometryRole(segmentationNode)),
            "geometry": segmentationNode.GetSegmentation().GetConversionParameter(_geometryParameter()),
        }

    def revert(self, scene: slicer.vtkMRMLScene) -> None:
        """Removes the nodes that the run added, and its segments from a segmentation that was there before."""
        while self.restore:
            self.restore.pop()()
        for nodeId in reversed(self.created):
            if node := scene.GetNodeByID(nodeId):
                scene.RemoveNode(node)
        node = scene.GetNodeByID(self.target) if self.target else None
        if node is None:
            return
        self.segments.revert(node)
        node.SetAttribute(PROVENANCE_ATTRIBUTE, self.before.get("provenance"))
        if node.GetSegmentation().GetNumberOfSegments() == 0:
            node.SetAndObserveTransformNodeID(self.before.get("transform"))
            node.SetNodeReferenceID(_geometryRole(node), self.before.get("reference"))
            node.GetSegmentation().SetConversionParameter(_geometryParameter(), self.before.get("geometry") or "")
        if table := node.GetNodeReference(TABLE_ROLE):
            fillVolumesTable(table, measureVolumes(node, _idsOf(node)))


# ---------------------------------------------------------------- nodes


def createSegmentationNode(
    scene: slicer.vtkMRMLScene, inputNode: slicer.vtkMRMLVolumeNode, change: SceneChange
) -> slicer.vtkMRMLSegmentationNode:
    """An empty segmentation named after the volume, with a display node."""
    name = scene.GenerateUniqueName(_("{name} segmentation").format(name=inputNode.GetName()))
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
    change.created.append(node.GetID())
    node.CreateDefaultDisplayNodes()
    if display := node.GetDisplayNode():
        change.created.append(display.GetID())
    return node


def placeBeside(node: slicer.vtkMRMLNode, inputNode: slicer.vtkMRMLVolumeNode) -> None:
    """Puts a node under the study or folder of the volume in the subject hierarchy."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(node.GetScene())
    if hierarchy is None:
        return
    invalid, top = hierarchy.GetInvalidItemID(), hierarchy.GetSceneItemID()
    inputItem = hierarchy.GetItemByDataNode(inputNode)
    parent = hierarchy.GetItemParent(inputItem) if inputItem != invalid else top
    item = hierarchy.GetItemByDataNode(node)
    if item == invalid:
        # Slicer's plugins make the item when the node is added; a scene without them has none yet.
        hierarchy.CreateItem(parent if parent != invalid else top, node)
    elif parent != invalid:
        hierarchy.SetItemParent(item, parent)


def showInSlices(segmentationNode: slicer.vtkMRMLSegmentationNode) -> None:
    """Shows the segments as filled outlines in the slice views."""
    segmentationNode.CreateDefaultDisplayNodes()
    display = segmentationNode.GetDisplayNode()
    display.SetVisibility(True)
    display.SetVisibility2D(True)
    display.SetPreferredDisplayRepresentationName2D(NodeConversion.BINARY_LABELMAP)


def showSurfaces(segmentationNode: slicer.vtkMRMLSegmentationNode, shown: bool = True) -> bool:
    """Makes closed surfaces and shows them in 3D, or takes them away again. Returns whether they are shown."""
    segmentation, display = segmentationNode.GetSegmentation(), segmentationNode.GetDisplayNode()
    if not shown:
        if display is not None:
            display.SetVisibility3D(False)
        if segmentation.GetSourceRepresentationName() != CLOSED_SURFACE:
            segmentationNode.RemoveClosedSurfaceRepresentation()
        return False
    if not segmentationNode.CreateClosedSurfaceRepresentation():
        return False
    segmentationNode.CreateDefaultDisplayNodes()
    display = segmentationNode.GetDisplayNode()
    display.SetVisibility(True)
    display.SetVisibility3D(True)
    display.SetPreferredDisplayRepresentationName3D(CLOSED_SURFACE)
    return True


# ---------------------------------------------------------------- volumes


def measureVolumes(segmentationNode: slicer.vtkMRMLSegmentationNode, segmentIds: Sequence[str]) -> list[SegmentVolume]:
    """Voxels of each segment and the space that they take in the world.

    Under a non-linear transform there is no one scale; the size before the transform is given.
    """
    toWorld = NodeConversion.linearTransformBetween(segmentationNode, None)
    scale = abs(np.linalg.det(toWorld[:3, :3])) if toWorld is not None else 1.0
    measured = []
    for segmentId in segmentIds:
        mask, matrix = NodeConversion.segmentMask(segmentationNode, segmentId)
        count = int(np.count_nonzero(mask))
        millilitres = count * abs(np.linalg.det(matrix[:3, :3])) * scale / 1000
        name = segmentationNode.GetSegmentation().GetSegment(segmentId).GetName()
        measured.append(SegmentVolume(segmentId, name, count, float(millilitres)))
    return measured


def fillVolumesTable(tableNode: slicer.vtkMRMLTableNode, volumes: Sequence[SegmentVolume]) -> None:
    """Writes one row per segment: its name, its volume in mL and its voxels. What was in the table is gone."""
    names, millilitres, voxels = vtk.vtkStringArray(), vtk.vtkDoubleArray(), vtk.vtkIntArray()
    names.SetName(_("Segment"))
    millilitres.SetName(_("Volume [mL]"))
    voxels.SetName(_("Voxels"))
    for volume in volumes:
        names.InsertNextValue(volume.name)
        millilitres.InsertNextValue(round(volume.millilitres, 6))
        voxels.InsertNextValue(volume.voxels)
    table = vtk.vtkTable()
    for column in (names, millilitres, voxels):
        table.AddColumn(column)
    tableNode.SetAndObserveTable(table)
    tableNode.SetUseColumnTitleAsColumnHeader(True)
    tableNode.SetLocked(True)


def volumesTableOf(
    segmentationNode: slicer.vtkMRMLSegmentationNode, inputNode: slicer.vtkMRMLVolumeNode, change: SceneChange
) -> slicer.vtkMRMLTableNode:
    """The table of this segmentation; made and placed beside it if there is none yet."""
    tableNode = segmentationNode.GetNodeReference(TABLE_ROLE)
    if tableNode is None:
        scene = segmentationNode.GetScene()
        name = scene.GenerateUniqueName(_("{name} volumes").format(name=segmentationNode.GetName()))
        tableNode = scene.AddNewNodeByClass("vtkMRMLTableNode", name)
        change.created.append(tableNode.GetID())
        segmentationNode.SetNodeReferenceID(TABLE_ROLE, tableNode.GetID())
        placeBeside(tableNode, inputNode)
    fillVolumesTable(tableNode, measureVolumes(segmentationNode, _idsOf(segmentationNode)))
    return tableNode


def _geometryRole(segmentationNode: slicer.vtkMRMLSegmentationNode) -> str:
    return segmentationNode.GetReferenceImageGeometryReferenceRole()


def _geometryParameter() -> str:
    return slicer.vtkSegmentationConverter.GetReferenceImageGeometryParameterName()


def _idsOf(segmentationNode: slicer.vtkMRMLSegmentationNode) -> list[str]:
    segmentation = segmentationNode.GetSegmentation()
    return [segmentation.GetNthSegmentID(index) for index in range(segmentation.GetNumberOfSegments())]


# ---------------------------------------------------------------- where it came from


def seriesUidOf(volumeNode: slicer.vtkMRMLVolumeNode) -> str:
    """The DICOM series instance UID that the subject hierarchy knows of the volume; "" if none."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(volumeNode.GetScene())
    if hierarchy is None:
        return ""
    item = hierarchy.GetItemByDataNode(volumeNode)
    if item == hierarchy.GetInvalidItemID():
        return ""
    return hierarchy.GetItemUID(item, slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMUIDName()) or ""


def storeProvenance(segmentationNode: slicer.vtkMRMLSegmentationNode, provenance: Provenance) -> None:
    """Adds the record of a run to those that the node has; the newest 20 are kept, and saved with the scene."""
    runs = [asdict(run) for run in readProvenance(segmentationNode)]
    runs = [*runs, asdict(provenance)][-_KEPT_RUNS:]
    text = json.dumps({"format": 1, "runs": runs}, ensure_ascii=True, default=str)
    segmentationNode.SetAttribute(PROVENANCE_ATTRIBUTE, text)


def readProvenance(segmentationNode: slicer.vtkMRMLSegmentationNode) -> list[Provenance]:
    """The records of all runs that wrote into this segmentation, oldest first; what cannot be read is left out."""
    try:
        runs = json.loads(segmentationNode.GetAttribute(PROVENANCE_ATTRIBUTE) or "{}").get("runs", [])
    except (ValueError, AttributeError):
        return []
    records = []
    for run in runs:
        try:
            inputs = tuple(InputRecord(**one) for one in run.pop("inputs", ()))
            records.append(Provenance(inputs=inputs, warnings=tuple(run.pop("warnings", ())), **run))
        except (TypeError, AttributeError):
            continue
    return records
