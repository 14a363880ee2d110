"""Where a model is unsure, as a volume of the scene that belongs to a segmentation: colours, place, slice views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import slicer
from slicer.i18n import tr as _

from . import NodeConversion, SegmentationResult
from .VolumeDescription import IMAGE_CLASS, UNCERTAINTY

__all__ = ["UNCERTAINTY_ROLE", "hideUncertainty", "showUncertainty"]

UNCERTAINTY_ROLE = "InvResSegment.Uncertainty"
"""Node reference of a segmentation to the map that its last run made."""

SHOWN_FROM = 0.1  # what is surer is transparent: nearly all of an image
BRIGHTEST = 0.5  # of two answers, each is as likely as the other
OPACITY = 0.6


def showUncertainty(
    path: Path,
    inputNode: slicer.vtkMRMLScalarVolumeNode,
    segmentationNode: slicer.vtkMRMLSegmentationNode,
    change: SegmentationResult.SceneChange,
) -> slicer.vtkMRMLScalarVolumeNode:
    """Puts the map that the backend wrote for `inputNode` over the images in the slice views.

    It lies under the transform of the input and beside it in the subject hierarchy. A segmentation has one: that of an
    earlier run gets the new values. Raises ConversionError for a file that cannot be read or lies on another grid.
    """
    image = NodeConversion.readMap(path, inputNode)
    scene, node = segmentationNode.GetScene(), segmentationNode.GetNodeReference(UNCERTAINTY_ROLE)
    name = _("{name} uncertainty").format(name=inputNode.GetName())
    if node is None:
        node = scene.AddNewNodeByClass(IMAGE_CLASS, scene.GenerateUniqueName(name))
        change.created.append(node.GetID())
        node.SetAttribute(UNCERTAINTY, "1")
        node.CreateDefaultDisplayNodes()
        if display := node.GetDisplayNode():
            change.created.append(display.GetID())
            _colour(display)
        segmentationNode.SetNodeReferenceID(UNCERTAINTY_ROLE, node.GetID())
    else:
        change.restore.append(_wayBack(node))
        if not node.GetName().startswith(name):
            node.SetName(scene.GenerateUniqueName(name))
    node.CopyOrientation(inputNode)
    node.SetAndObserveImageData(image)
    node.SetAndObserveTransformNodeID(inputNode.GetTransformNodeID())
    SegmentationResult.placeBeside(node, inputNode)
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        if composite.GetForegroundVolumeID() != node.GetID():
            _setForeground(composite, node.GetID(), OPACITY, change)
    return node


def hideUncertainty(segmentationNode: slicer.vtkMRMLSegmentationNode, change: SegmentationResult.SceneChange) -> None:
    """Takes the map of an earlier run out of the slice views: it says nothing of the segments that are there now."""
    nodeId = segmentationNode.GetNodeReferenceID(UNCERTAINTY_ROLE)
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        if nodeId and composite.GetForegroundVolumeID() == nodeId:
            _setForeground(composite, None, composite.GetForegroundOpacity(), change)


def _colour(display: slicer.vtkMRMLScalarVolumeDisplayNode) -> None:
    """From dark to white by how unsure the model is, and transparent where it is not."""
    colours = slicer.vtkMRMLColorLogic.GetColorTableNodeID(slicer.vtkMRMLColorTableNode.Iron)
    display.SetAndObserveColorNodeID(colours)
    display.SetAutoWindowLevel(False)
    display.SetWindowLevelMinMax(0.0, BRIGHTEST)
    display.SetAutoThreshold(False)
    display.SetThreshold(SHOWN_FROM, 1.0)
    display.SetApplyThreshold(True)


def _wayBack(node: slicer.vtkMRMLScalarVolumeNode) -> Callable[[], None]:
    """Gives the map of an earlier run its values, place and name again."""
    name, image, transform = node.GetName(), node.GetImageData(), node.GetTransformNodeID()
    place = slicer.vtkMRMLScalarVolumeNode()
    place.CopyOrientation(node)

    def restore() -> None:
        if node.GetScene() is not None:
            node.SetName(name)
            node.CopyOrientation(place)
            node.SetAndObserveImageData(image)
            node.SetAndObserveTransformNodeID(transform)

    return restore


def _setForeground(composite, nodeId: str | None, opacity: float, change: SegmentationResult.SceneChange) -> None:
    before = composite.GetForegroundVolumeID(), composite.GetForegroundOpacity()

    def restore() -> None:
        # Unless somebody has chosen something else since.
        if composite.GetScene() is not None and composite.GetForegroundVolumeID() == nodeId:
            composite.SetForegroundVolumeID(before[0])
            composite.SetForegroundOpacity(before[1])

    change.restore.append(restore)
    composite.SetForegroundVolumeID(nodeId)
    composite.SetForegroundOpacity(opacity)
