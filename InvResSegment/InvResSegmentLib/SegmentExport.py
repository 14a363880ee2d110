"""The segments of a case as one label map on the grid of its image: the way from a correction back to training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import slicer
from slicer.i18n import tr as _

from . import NodeConversion
from .NrrdFile import writeNrrd

__all__ = ["labelArray", "paint", "segmentNames", "segmentationProblem", "writeLabels"]

ALIGNED = 1e-3  # voxels by which a grid may be off before its labels are looked up anew


def segmentNames(segmentationNode: slicer.vtkMRMLSegmentationNode) -> dict[str, str]:
    """Segment id -> name, in the order of the segmentation."""
    segmentation = segmentationNode.GetSegmentation()
    ids = [segmentation.GetNthSegmentID(index) for index in range(segmentation.GetNumberOfSegments())]
    return {segmentId: segmentation.GetSegment(segmentId).GetName() for segmentId in ids}


def segmentationProblem(
    segmentationNode: slicer.vtkMRMLSegmentationNode, volumeNode: slicer.vtkMRMLScalarVolumeNode
) -> str:
    """Why the segments cannot be learned on this image, as a plain sentence; "" where they can."""
    name, segmentation = segmentationNode.GetName(), segmentationNode.GetSegmentation()
    if segmentation.GetNumberOfSegments() == 0:
        return _("{name} has no segments.").format(name=name)
    if not segmentation.ContainsRepresentation(NodeConversion.BINARY_LABELMAP):
        return _("{name} is made of surfaces; make its binary labelmap in the module Segmentations.").format(name=name)
    if NodeConversion.linearTransformBetween(segmentationNode, volumeNode) is None:
        return _("{name} and {volume} are under different non-linear transforms; harden them in Transforms.").format(
            name=name, volume=volumeNode.GetName()
        )
    return ""


def labelArray(
    segmentationNode: slicer.vtkMRMLSegmentationNode,
    volumeNode: slicer.vtkMRMLScalarVolumeNode,
    values: Mapping[str, int],
) -> np.ndarray:
    """Labels (K, J, I) on the volume's grid. values: segment id -> label value; later ones overwrite earlier ones.

    Segments on another grid are taken by their nearest voxel. Raises NodeConversion.ConversionError where
    `segmentationProblem` says why.
    """
    if problem := segmentationProblem(segmentationNode, volumeNode):
        raise NodeConversion.ConversionError(problem)
    size = volumeNode.GetImageData().GetDimensions()
    dtype = np.uint8 if max(values.values(), default=0) < 256 else np.uint16
    labels = np.zeros(size[::-1], dtype)
    between = NodeConversion.linearTransformBetween(segmentationNode, volumeNode)
    toVoxels = np.linalg.inv(NodeConversion.volumeMatrix(volumeNode)) @ between
    for segmentId, value in values.items():
        mask, toFrame = NodeConversion.segmentMask(segmentationNode, segmentId)
        if mask.size and mask.any():
            paint(labels, mask, toVoxels @ toFrame, value)
    return labels


def writeLabels(path: str | Path, labels: np.ndarray, volumeNode: slicer.vtkMRMLScalarVolumeNode) -> None:
    """Writes a label map as an NRRD on the volume's own grid. Raises OSError where the disk does not take it."""
    writeNrrd(path, labels, NodeConversion.volumeMatrix(volumeNode))


def paint(labels: np.ndarray, mask: np.ndarray, toLabels: np.ndarray, value: int) -> None:
    """Puts a mask (K, J, I) into a label map, taken by its nearest voxel and cut at the border.

    toLabels: 4x4, (i, j, k, 1) of the mask -> of the labels.
    """
    shift = np.rint(toLabels[:3, 3])
    corner = np.array(mask.shape[::-1])
    plain = np.eye(4)
    plain[:3, 3] = shift
    if np.abs((toLabels - plain)[:3, :3] @ corner).max() < ALIGNED and np.abs(toLabels[:3, 3] - shift).max() < ALIGNED:
        theirs, ours = [], []
        for axis in range(3):
            offset, length, limit = int(shift[2 - axis]), mask.shape[axis], labels.shape[axis]
            first, last = max(0, offset), min(limit, offset + length)
            if first >= last:
                return
            ours.append(slice(first, last))
            theirs.append(slice(first - offset, last - offset))
        labels[tuple(ours)][mask[tuple(theirs)]] = value
        return
    toMask = np.linalg.inv(toLabels)
    height, width = labels.shape[1:]
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height), indexing="xy"))  # i, j of (J, I)
    flat = np.tensordot(toMask[:3, :2], grid, 1) + toMask[:3, 3].reshape(3, 1, 1)
    limits = np.array(mask.shape[::-1]).reshape(3, 1, 1)
    for slab in range(labels.shape[0]):  # a slice at a time: places of a whole volume would be many times its size
        places = np.floor(flat + toMask[:3, 2].reshape(3, 1, 1) * slab + 0.5).astype(np.int64)
        inside = ((places >= 0) & (places < limits)).all(axis=0)
        i, j, k = places[:, inside]
        found = np.zeros(inside.shape, bool)
        found[inside] = mask[k, j, i]
        labels[slab][found] = value
