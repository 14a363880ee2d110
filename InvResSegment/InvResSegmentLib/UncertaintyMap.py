"""Where a model is unsure, as a volume of the scene that belongs to a segmentation: colours, place, slice views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import slicer
from slicer.i18n import tr as _

from . import NodeConversion, SegmentationResult
from .VolumeDescription import IMAGE_CLASS, UNCERTAINTY

__all__ = ["UNCERTAINTY_ROLE", "hideUncertainty", "showUncertainty"]

UNCERTAINTY_ROLE = "InvResSegment.Uncertainty"
"""Node reference of a segmentation to the map that its last run made."""

# A slice view keeps in these what lay over the image before a map did; they are saved with the scene.
_BEFORE_ROLE = "InvResSegment.ForegroundBefore"
_OPACITY_BEFORE = "InvResSegment.ForegroundOpacityBefore"
SHOWN_FROM = 0.1  # what is surer is transparent: nearly all of an image
YELLOW_FROM = 0.5  # of two answers, each is as likely as the other
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
        node.SetAttribute(UNCERTAINTY, node.GetName())
        node.CreateDefaultDisplayNodes()
        if display := node.GetDisplayNode():
            change.created.append(display.GetID())
            _colour(display)
        segmentationNode.SetNodeReferenceID(UNCERTAINTY_ROLE, node.GetID())
    else:
        change.restore.append(_wayBack(node))
        # Not where a person has called it otherwise.
        if node.GetName() == node.GetAttribute(UNCERTAINTY) and not node.GetName().startswith(name):
            node.SetName(scene.GenerateUniqueName(name))
            node.SetAttribute(UNCERTAINTY, node.GetName())
    node.CopyOrientation(inputNode)
    node.SetAndObserveImageData(image)
    node.SetAndObserveTransformNodeID(inputNode.GetTransformNodeID())
    SegmentationResult.placeBeside(node, inputNode)
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        if composite.GetForegroundVolumeID() == node.GetID():
            continue
        layer = _layerOf(composite)
        if not _showsMap(composite):
            layer = _Layer(node.GetID(), OPACITY, layer.volumeId, layer.opacity)
        _setLayer(composite, replace(layer, volumeId=node.GetID()), change)
    return node


def hideUncertainty(change: SegmentationResult.SceneChange) -> None:
    """Takes maps of earlier runs out of the slice views: they say nothing of the segments that are there now.

    Each view gets the foreground that it had before the first of them, where that is still there.
    """
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        if _showsMap(composite):
            layer = _layerOf(composite)
            opacity = layer.opacity if layer.opacityBefore is None else layer.opacityBefore
            _setLayer(composite, _Layer(layer.before, opacity), change)


def _colour(display: slicer.vtkMRMLScalarVolumeDisplayNode) -> None:
    """From red to yellow (Slicer's table Iron) by how unsure the model is, and transparent where it is not."""
    colours = slicer.vtkMRMLColorLogic.GetColorTableNodeID(slicer.vtkMRMLColorTableNode.Iron)
    display.SetAndObserveColorNodeID(colours)
    display.SetAutoWindowLevel(False)
    display.SetWindowLevelMinMax(0.0, YELLOW_FROM)
    display.SetAutoThreshold(False)
    display.SetThreshold(SHOWN_FROM, 1.0)
    display.SetApplyThreshold(True)


def _wayBack(node: slicer.vtkMRMLScalarVolumeNode) -> Callable[[], None]:
    """Gives the map of an earlier run its values, place and name again."""
    name, given = node.GetName(), node.GetAttribute(UNCERTAINTY)
    image, transform = node.GetImageData(), node.GetTransformNodeID()
    place = slicer.vtkMRMLScalarVolumeNode()
    place.CopyOrientation(node)

    def restore() -> None:
        if node.GetScene() is not None:
            node.SetName(name)
            node.SetAttribute(UNCERTAINTY, given)
            node.CopyOrientation(place)
            node.SetAndObserveImageData(image)
            node.SetAndObserveTransformNodeID(transform)

    return restore


@dataclass(frozen=True)
class _Layer:
    """The foreground of a slice view, and what it was before a map took its place. Volumes by their ids."""

    volumeId: str | None
    opacity: float
    before: str | None = None
    opacityBefore: float | None = None


def _showsMap(composite) -> bool:
    shown = composite.GetScene().GetNodeByID(composite.GetForegroundVolumeID() or "")
    return shown is not None and bool(shown.GetAttribute(UNCERTAINTY))


def _layerOf(composite) -> _Layer:
    opacity = composite.GetAttribute(_OPACITY_BEFORE)
    return _Layer(
        composite.GetForegroundVolumeID(),
        composite.GetForegroundOpacity(),
        composite.GetNodeReferenceID(_BEFORE_ROLE),
        float(opacity) if opacity else None,
    )


def _setLayer(composite, layer: _Layer, change: SegmentationResult.SceneChange) -> None:
    before = _layerOf(composite)

    def restore() -> None:
        # Unless somebody has chosen something else since.
        if composite.GetScene() is not None and composite.GetForegroundVolumeID() == layer.volumeId:
            _write(composite, before)

    change.restore.append(restore)
    _write(composite, layer)


def _write(composite, layer: _Layer) -> None:
    """A volume that has been deleted meanwhile leaves its place empty."""
    there = composite.GetScene().GetNodeByID(layer.volumeId or "")
    composite.SetForegroundVolumeID(None if there is None else layer.volumeId)
    composite.SetForegroundOpacity(layer.opacity)
    composite.SetNodeReferenceID(_BEFORE_ROLE, layer.before)
    composite.SetAttribute(_OPACITY_BEFORE, None if layer.opacityBefore is None else str(layer.opacityBefore))
