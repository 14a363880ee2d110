"""Volume nodes to files and result files to segmentations: the only place that touches the voxels of MRML nodes."""

from __future__ import annotations

import hashlib
import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from .NrrdFile import nrrdType, writeNrrd
from .ResultFile import DamagedFile, ResultFile, SegmentLabel, readImage, readResultFile

__all__ = [
    "ORIGIN_TAG",
    "ConversionError",
    "ImportedSegments",
    "SegmentLabel",
    "exportProblem",
    "exportVolume",
    "fromVtkMatrix",
    "importSegmentation",
    "labelImage",
    "linearTransformBetween",
    "onGridOf",
    "readMap",
    "readResult",
    "regionInVolume",
    "segmentMask",
    "toVtkMatrix",
    "volumeArray",
    "volumeMatrix",
    "wasEdited",
]

BINARY_LABELMAP = "Binary labelmap"
ORIGIN_TAG = "InvResSegment.Origin"
"""Tag of a segment that a model made: "sha256 of the model/label value/digest of name and voxels"."""

GRID_TOLERANCE = 0.01  # of the smallest spacing
RIGHT_ANGLE_TOLERANCE = 1e-3


class ConversionError(Exception):
    """A volume or a result that cannot be converted: one plain sentence, and in `hint` the next step."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass
class ImportedSegments:
    """What an import did to a segmentation. segmentIds: the result's, in the order of the labels.

    added: ids that are new. replaced: id -> a copy of the segment as it was. warnings: plain sentences.
    """

    segmentIds: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    replaced: dict[str, slicer.vtkSegment] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def revert(self, segmentationNode: slicer.vtkMRMLSegmentationNode) -> None:
        """Takes the import back and leaves every other segment as it is by now."""
        segmentation = segmentationNode.GetSegmentation()
        for segmentId in self.added:
            if segmentation.GetSegment(segmentId):
                segmentation.RemoveSegment(segmentId)
        for segmentId, before in self.replaced.items():
            if segment := segmentation.GetSegment(segmentId):
                segmentation.SeparateSegmentLabelmap(segmentId)
                segment.DeepCopy(before)
        _refreshRepresentations(segmentation)


# ---------------------------------------------------------------- volumes to files


def volumeArray(volumeNode: slicer.vtkMRMLScalarVolumeNode) -> np.ndarray:
    """The voxels (K, J, I), without a copy. The volume must pass `exportProblem`."""
    image = volumeNode.GetImageData()
    return vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])


def volumeMatrix(volumeNode: slicer.vtkMRMLVolumeNode) -> np.ndarray:
    """4x4, (i, j, k, 1) -> RAS mm in the volume's own frame, that is before its parent transform."""
    matrix = vtk.vtkMatrix4x4()
    volumeNode.GetIJKToRASMatrix(matrix)
    return fromVtkMatrix(matrix)


def fromVtkMatrix(matrix: vtk.vtkMatrix4x4) -> np.ndarray:
    """4x4 array of a VTK matrix."""
    return np.array([[matrix.GetElement(row, column) for column in range(4)] for row in range(4)])


def toVtkMatrix(array: np.ndarray) -> vtk.vtkMatrix4x4:
    """VTK matrix of a 4x4 array."""
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy(np.asarray(array, dtype=float).ravel().tolist())
    return matrix


def linearTransformBetween(
    fromNode: slicer.vtkMRMLTransformableNode, toNode: slicer.vtkMRMLTransformableNode | None
) -> np.ndarray | None:
    """4x4 from the frame of `fromNode` to that of `toNode` (None: world); None where no matrix says it."""
    source = fromNode.GetParentTransformNode()
    target = toNode.GetParentTransformNode() if toNode is not None else None
    if source is target:
        return np.eye(4)
    for end in (source, target):
        if end is not None and not end.IsTransformToWorldLinear():
            return None
    matrix = vtk.vtkMatrix4x4()
    if not slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(source, target, matrix):
        return None
    return fromVtkMatrix(matrix)


def exportProblem(volumeNode: slicer.vtkMRMLVolumeNode | None) -> str:
    """Why this volume cannot be segmented, as a plain sentence; "" where it can."""
    if volumeNode is None:
        return _("No volume is chosen.")
    name = volumeNode.GetName()
    if volumeNode.IsA("vtkMRMLLabelMapVolumeNode"):
        return _("{name} is a label map; choose an image.").format(name=name)
    image = volumeNode.GetImageData()
    if image is None or image.GetPointData() is None or image.GetPointData().GetScalars() is None:
        return _("{name} holds no voxels; load its image first.").format(name=name)
    if not volumeNode.IsA("vtkMRMLScalarVolumeNode") or image.GetNumberOfScalarComponents() != 1:
        return _(
            "{name} has {count} values per voxel, but one is needed; extract one in Vector to Scalar Volume."
        ).format(name=name, count=image.GetNumberOfScalarComponents())
    if min(image.GetDimensions()) < 1:
        return _("{name} holds no voxels; load its image first.").format(name=name)
    if nrrdType(vtk_to_numpy(image.GetPointData().GetScalars()).dtype) is None:
        return _("The values of {name} are of the type {type}; cast it to whole or decimal numbers first.").format(
            name=name, type=image.GetScalarTypeAsString()
        )
    matrix = volumeMatrix(volumeNode)[:3, :3]
    lengths = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(matrix).all() or lengths.min() <= 0 or abs(np.linalg.det(matrix / lengths)) < 1e-3:
        return _("The axes of {name} span no volume; load it again, or correct its geometry in Volumes.").format(
            name=name
        )
    if _skew(matrix) > RIGHT_ANGLE_TOLERANCE:
        return _(
            "The axes of {name} are not at right angles; resample it first with the module Resample Scalar/Vector/DWI "
            "Volume."
        ).format(name=name)
    return ""


def exportVolume(
    volumeNode: slicer.vtkMRMLScalarVolumeNode,
    path: str | Path,
    frameNode: slicer.vtkMRMLTransformableNode | None = None,
    placedAs: slicer.vtkMRMLTransformableNode | None = None,
) -> None:
    """Writes the volume as an uncompressed NRRD, voxel for voxel, in its own frame or in that of `frameNode`.

    The own frame is the one before the parent transform, so that a result needs no resampling on its way back.
    placedAs: the node of the scene whose parent transform it has, where it is itself in none.
    Raises ConversionError for a volume that cannot be written so, OSError where the disk does not take it.
    """
    if problem := exportProblem(volumeNode):
        raise ConversionError(problem)
    matrix = volumeMatrix(volumeNode)
    if frameNode is not None:
        between = linearTransformBetween(placedAs or volumeNode, frameNode)
        if between is None:
            message = _("{name} is under a non-linear transform that {other} is not under.").format(
                name=volumeNode.GetName(), other=frameNode.GetName()
            )
            raise ConversionError(message, _("Align it to the first volume."))
        matrix = between @ matrix
    writeNrrd(path, volumeArray(volumeNode), matrix)


def _skew(matrix: np.ndarray) -> float:
    axes = matrix / np.linalg.norm(matrix, axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


# ---------------------------------------------------------------- a region of interest


def regionInVolume(
    roiNode: slicer.vtkMRMLMarkupsROINode, volumeNode: slicer.vtkMRMLVolumeNode
) -> tuple[float, float, float, float, float, float]:
    """The smallest box around a markups ROI in the volume's own frame: RAS mm, xmin xmax ymin ymax zmin zmax."""
    half = np.array(roiNode.GetSize()) / 2
    toWorld = fromVtkMatrix(roiNode.GetObjectToWorldMatrix())
    toVolume = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(None, volumeNode.GetParentTransformNode(), toVolume)
    corners = []
    for signs in itertools.product((-1, 1), repeat=3):
        world = toWorld @ [*(half * signs), 1.0]
        corners.append(toVolume.TransformPoint(world[:3].tolist()))
    low, high = np.min(corners, axis=0).tolist(), np.max(corners, axis=0).tolist()
    return (low[0], high[0], low[1], high[1], low[2], high[2])


# ---------------------------------------------------------------- result files to segmentations


def readResult(path: str | Path, inputNode: slicer.vtkMRMLVolumeNode) -> ResultFile:
    """The segments of a .seg.nrrd that the backend wrote for `inputNode`; touches no scene.

    Raises ConversionError where the file is not whole or lies on another grid.
    """
    return _readOnGrid(readResultFile, path, inputNode)


def readMap(path: str | Path, inputNode: slicer.vtkMRMLVolumeNode) -> vtk.vtkImageData:
    """The voxels of an NRRD image that the backend wrote for `inputNode`, on whose grid they are; touches no scene.

    Not by Slicer's storage nodes, which turn a left-handed grid into another one. Raises ConversionError as
    `readResult` does.
    """
    found = _readOnGrid(readImage, path, inputNode).labels
    image = vtk.vtkImageData()
    image.SetDimensions(*found.shape[::-1])
    image.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(found).ravel(), deep=True))
    return image


def _readOnGrid(
    read: Callable[[str | Path], ResultFile], path: str | Path, inputNode: slicer.vtkMRMLVolumeNode
) -> ResultFile:
    try:
        result = read(path)
    except (DamagedFile, OSError) as error:
        raise ConversionError(
            _("The result could not be read ({reason}); nothing was changed.").format(reason=error),
            _("Save a diagnostic report and run it again."),
        ) from None
    return onGridOf(result, inputNode)


def onGridOf(result: ResultFile, inputNode: slicer.vtkMRMLVolumeNode) -> ResultFile:
    """The same segments, on the axes of the volume. Raises ConversionError where they lie on another grid.

    Slicer turns the third axis of a left-handed file when it loads it, and the backend writes on the grid of the file.
    """
    toVolume = volumeMatrix(inputNode)
    if np.linalg.det(result.matrix[:3, :3]) * np.linalg.det(toVolume[:3, :3]) < 0:
        turned = result.matrix.copy()
        turned[:3, 3] += turned[:3, 2] * (result.layers.shape[0] - 1)
        turned[:3, 2] *= -1
        result = replace(result, layers=result.layers[::-1], matrix=turned)
    if not _sameGrid(result, inputNode):
        raise ConversionError(
            _("The result does not lie on the grid of {name}; nothing was changed.").format(name=inputNode.GetName()),
            _("Leave the volume's geometry as it is during a run, and run it again."),
        )
    return result


def importSegmentation(
    result: ResultFile,
    inputNode: slicer.vtkMRMLVolumeNode,
    segmentationNode: slicer.vtkMRMLSegmentationNode,
    origin: str,
    labels: Sequence[SegmentLabel] = (),
    done: ImportedSegments | None = None,
) -> ImportedSegments:
    """Puts the segments of a result into a segmentation of the scene.

    origin: names the model (its SHA-256). labels: names, colours and terminology that win over the file's. done: filled
    as it goes, so that what an exception left half done can be reverted.
    An empty segmentation takes the input's parent transform and geometry. One with segments keeps its own, and of them
    only those change that an earlier run of the same model left and nobody edited since; a name that is taken by
    another segment is counted on ("tumour 2").
    """
    segmentation = segmentationNode.GetSegmentation()
    if segmentation.GetNumberOfSegments() == 0:
        # In this order: the geometry is converted to the segmentation's frame when it is set. Set before the
        # transform, it would be moved twice.
        segmentationNode.SetAndObserveTransformNodeID(inputNode.GetTransformNodeID())
        segmentationNode.SetReferenceImageGeometryParameterFromVolumeNode(inputNode)
        segmentation.SetSourceRepresentationName(BINARY_LABELMAP)
    elif not segmentationNode.GetNodeReferenceID(segmentationNode.GetReferenceImageGeometryReferenceRole()):
        segmentationNode.SetReferenceImageGeometryParameterFromVolumeNode(inputNode)
    done = done if done is not None else ImportedSegments()
    stated = {label.value: label for label in labels}
    # One image for all labels that exclude each other: a shared image is a fraction of the memory.
    images = [_imageIn(segmentationNode, inputNode, layer) for layer in np.moveaxis(result.layers, 3, 0)]
    for segment in result.segments:
        label = stated.get(segment.value, segment)
        if label.colour is None or not label.terminology:
            label = replace(
                label, colour=label.colour or segment.colour, terminology=label.terminology or segment.terminology
            )
        done.segmentIds.append(_put(segmentation, images[segment.layer], label, origin, done))
    _refreshRepresentations(segmentation)
    return done


def labelImage(labels: np.ndarray, matrix: np.ndarray) -> slicer.vtkOrientedImageData:
    """Labels (K, J, I) as an image that segments can share. matrix: 4x4 (i, j, k, 1) -> RAS mm of its frame."""
    image = slicer.vtkOrientedImageData()
    image.SetDimensions(*labels.shape[::-1])
    image.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(labels).ravel(), deep=True))
    image.SetGeometryFromImageToWorldMatrix(toVtkMatrix(matrix))
    return image


def segmentMask(segmentationNode: slicer.vtkMRMLSegmentationNode, segmentId: str) -> tuple[np.ndarray, np.ndarray]:
    """A segment's voxels: mask (K, J, I) and 4x4 (i, j, k, 1) -> RAS mm in the segmentation's own frame."""
    segment = segmentationNode.GetSegmentation().GetSegment(segmentId)
    image = segment.GetRepresentation(BINARY_LABELMAP) if segment else None
    if image is None:
        raise ConversionError(_("The segmentation has no voxels for {id}.").format(id=segmentId))
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    toFrame = fromVtkMatrix(matrix)
    toFrame[:3, 3] += toFrame[:3, :3] @ image.GetExtent()[::2]
    return _mask(segment), toFrame


def wasEdited(segmentationNode: slicer.vtkMRMLSegmentationNode) -> bool:
    """Whether a person has changed a segment that a model made, or added one."""
    segmentation = segmentationNode.GetSegmentation()
    for index in range(segmentation.GetNumberOfSegments()):
        segment = segmentation.GetNthSegment(index)
        if _tag(segment, ORIGIN_TAG).rpartition("/")[2] != _digest(segment):
            return True
    return False


def _mask(segment: slicer.vtkSegment) -> np.ndarray:
    image = segment.GetRepresentation(BINARY_LABELMAP)
    if image is None or image.GetPointData().GetScalars() is None:
        return np.zeros((0, 0, 0), dtype=bool)
    array = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])
    return array == segment.GetLabelValue()


def _put(
    segmentation: slicer.vtkSegmentation,
    image: slicer.vtkOrientedImageData,
    label: SegmentLabel,
    origin: str,
    done: ImportedSegments,
) -> str:
    """One segment of the result: into the one of an earlier run, or a new one. Returns its id."""
    name = label.name
    earlier = _earlierSegment(segmentation, origin, label, done)
    if earlier:
        segment = segmentation.GetSegment(earlier)
        before = slicer.vtkSegment()
        before.DeepCopy(segment)
        done.replaced[earlier] = before
        name = segment.GetName()
        segmentation.SeparateSegmentLabelmap(earlier)  # its voxels may share an image with a hand-made segment
    else:
        segment = slicer.vtkSegment()
        name = _freeName(segmentation, label.name)
        if name != label.name:
            done.warnings.append(
                _("The segment {old} was kept; the new one is called {new}.").format(old=label.name, new=name)
            )
        segment.SetName(name)
        if label.colour:
            segment.SetColor(*(part / 255 for part in label.colour))
        if label.terminology:
            segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), label.terminology)
    segment.SetLabelValue(label.value)
    segment.AddRepresentation(BINARY_LABELMAP, image)
    segment.SetTag(ORIGIN_TAG, f"{origin}/{label.value}/{_digest(segment)}")
    if earlier:
        return earlier
    segmentId = segmentation.GenerateUniqueSegmentID(f"InvResSegment_{label.value}")
    if not segmentation.AddSegment(segment, segmentId):
        raise ConversionError(
            _("The segment {name} could not be added; nothing was changed.").format(name=name),
            _("Choose a new segmentation as output."),
        )
    done.added.append(segmentId)
    return segmentId


def _earlierSegment(
    segmentation: slicer.vtkSegmentation, origin: str, label: SegmentLabel, done: ImportedSegments
) -> str:
    """The id of the segment that an earlier run of this model made for this label and that is as it left it."""
    for index in range(segmentation.GetNumberOfSegments()):
        segmentId, segment = segmentation.GetNthSegmentID(index), segmentation.GetNthSegment(index)
        model, _separator, rest = _tag(segment, ORIGIN_TAG).partition("/")
        value, _separator, digest = rest.partition("/")
        if model != origin or value != str(label.value) or segmentId in done.segmentIds:
            continue
        if digest != _digest(segment):  # costs milliseconds a segment
            done.warnings.append(
                _("The segment {name} was edited after an earlier run and is kept as it is.").format(
                    name=segment.GetName()
                )
            )
        # The same value may have stood for both sides of a structure then, and for the left one now.
        elif re.fullmatch(rf"{re.escape(label.name)}( \d+)?", segment.GetName()):
            return segmentId
    return ""


def _digest(segment: slicer.vtkSegment) -> str:
    """Changes with the segment's name and with any of its voxels, but not with the size of its image."""
    mask = _mask(segment)
    found = hashlib.sha256(segment.GetName().encode())
    if mask.any():
        box = []
        for axis in range(3):
            used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
            box.append(slice(int(used[0]), int(used[-1]) + 1))
        part = np.ascontiguousarray(mask[tuple(box)])
        found.update(f"{part.shape} {zlib.crc32(np.packbits(part))}".encode())
    return found.hexdigest()[:16]


def _freeName(segmentation: slicer.vtkSegmentation, name: str) -> str:
    taken = {segmentation.GetNthSegment(index).GetName() for index in range(segmentation.GetNumberOfSegments())}
    candidates = itertools.chain([name], (f"{name} {number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _tag(segment: slicer.vtkSegment, name: str) -> str:
    value = vtk.reference("")
    return str(value) if segment.GetTag(name, value) else ""


def _sameGrid(result: ResultFile, volumeNode: slicer.vtkMRMLVolumeNode) -> bool:
    wanted, size = volumeMatrix(volumeNode), volumeNode.GetImageData().GetDimensions()
    if result.labels.shape[::-1] != tuple(size):
        return False
    ends = np.array([[*corner, 1] for corner in itertools.product(*((0, length - 1) for length in size))])
    shift_mm = np.linalg.norm(ends @ (result.matrix - wanted).T, axis=1).max()
    return bool(shift_mm <= GRID_TOLERANCE * np.linalg.norm(wanted[:3, :3], axis=0).min())


def _imageIn(
    segmentationNode: slicer.vtkMRMLSegmentationNode, inputNode: slicer.vtkMRMLVolumeNode, labels: np.ndarray
) -> slicer.vtkOrientedImageData:
    """Labels on the input's grid as an image in the segmentation's frame; resampled (nearest) only where no turn,
    shift or scaling leads there."""
    # The volume's own numbers: those of a file are rounded.
    matrix = volumeMatrix(inputNode)
    between = linearTransformBetween(inputNode, segmentationNode)
    if between is not None and _skew((between @ matrix)[:3, :3]) <= RIGHT_ANGLE_TOLERANCE:
        return labelImage(labels, between @ matrix)
    image = labelImage(labels, matrix)
    transform = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(
        inputNode.GetParentTransformNode(), segmentationNode.GetParentTransformNode(), transform
    )
    slicer.vtkOrientedImageDataResample.TransformOrientedImage(image, transform)
    return image


def _refreshRepresentations(segmentation: slicer.vtkSegmentation) -> None:
    """Surfaces of segments whose voxels changed are made anew where there were any."""
    closedSurface = "Closed surface"
    if segmentation.ContainsRepresentation(closedSurface):
        segmentation.CreateRepresentation(closedSurface, True)
