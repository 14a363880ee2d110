"""Finds training cases among the nodes of the scene: each segmentation with the images that it was made on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import slicer

from . import ChannelMatching, GeometryDoctor, NodeConversion, SegmentationResult
from .VolumeDescription import IMAGE_CLASS, choosableImages

__all__ = ["caseOf", "casesOfScene", "patientOf"]


def casesOfScene(scene: slicer.vtkMRMLScene, channels: Sequence[Any]) -> list[tuple[str, dict, Any]]:
    """(name, channel name -> volume, segmentation) for every segmentation with segments that belongs to an image.

    channels: of the model. A channel for which no volume can be told is missing in the dictionary.
    """
    found = []
    for index in range(scene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode")):
        node = scene.GetNthNodeByClass(index, "vtkMRMLSegmentationNode")
        if node.GetHideFromEditors() or not node.GetSegmentation().GetNumberOfSegments():
            continue
        if (case := caseOf(node, channels)) is not None:
            found.append(case)
    return found


def caseOf(segmentationNode, channels: Sequence[Any]) -> tuple[str, dict, Any] | None:
    """The images of a segmentation; None where nothing says which image it belongs to."""
    stated = _ofProvenance(segmentationNode, channels)
    reference = segmentationNode.GetNodeReference(segmentationNode.GetReferenceImageGeometryReferenceRole())
    reference = reference or next(iter(stated.values()), None) or _ofName(segmentationNode)
    if reference is None:
        return None
    left = [channel for channel in channels if channel.name not in stated]
    if len(channels) == 1 and left:
        stated = {channels[0].name: reference}
    elif left:
        taken = {volume.GetID() for volume in stated.values()}
        volumes = [volume for volume in _companions(reference) if volume.GetID() not in taken]
        described = [ChannelMatching.describeVolume(volume) for volume in volumes]
        for match in ChannelMatching.match(left, described):
            if match.volume is not None:
                stated[match.channel] = reference.GetScene().GetNodeByID(match.volume.key)
    ordered = {channel.name: stated[channel.name] for channel in channels if channel.name in stated}
    return reference.GetName(), ordered, segmentationNode


def patientOf(volumeNode) -> str:
    """What tells patients apart, for the split: the patient in the subject hierarchy, else the volume itself."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(volumeNode.GetScene())
    if hierarchy is not None:
        item = hierarchy.GetItemByDataNode(volumeNode)
        if item != hierarchy.GetInvalidItemID():
            level = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMLevelPatient()
            patient = hierarchy.GetItemAncestorAtLevel(item, level)
            if patient != hierarchy.GetInvalidItemID():
                return f"item {patient}"
    return volumeNode.GetID()


def _ofProvenance(segmentationNode, channels: Sequence[Any]) -> dict:
    """The volumes that a run of a model was made on, as far as they are still there, for these channels."""
    runs = SegmentationResult.readProvenance(segmentationNode)
    if not runs:
        return {}
    scene, names = segmentationNode.GetScene(), {channel.name for channel in channels}
    found = {}
    for record in runs[-1].inputs:
        node = scene.GetNodeByID(record.nodeId)
        # After a scene was loaded into another one, the id may be that of some other node.
        if record.channel in names and node is not None and node.GetName() == record.name and node.IsA(IMAGE_CLASS):
            found[record.channel] = node
    return found


def _ofName(segmentationNode):
    """The image with the longest name that the segmentation's name begins with."""
    name = segmentationNode.GetName() or ""
    volumes = [volume for volume in choosableImages(segmentationNode.GetScene()) if name.startswith(volume.GetName())]
    return max(volumes, key=lambda volume: len(volume.GetName()), default=None)


def _companions(reference) -> list:
    """The images of the same study or folder on the same grid, and the reference itself."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(reference.GetScene())

    def parent(node) -> int:
        return hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)) if hierarchy is not None else 0

    if NodeConversion.exportProblem(reference):
        return []
    place, geometry = parent(reference), GeometryDoctor.describeGeometry(reference)
    found = [reference]
    for volume in choosableImages(reference.GetScene()):
        if volume is reference or parent(volume) != place or NodeConversion.exportProblem(volume):
            continue
        if GeometryDoctor.sameGrid(geometry, GeometryDoctor.describeGeometry(volume)):
            found.append(volume)
    return found
