"""Compares the place of volumes in the world, says in plain sentences what differs, and aligns on request."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from . import NodeConversion

__all__ = [
    "ALIGNED_FROM",
    "SOURCE_ROLE",
    "Alignment",
    "Finding",
    "VolumeGeometry",
    "align",
    "canAlign",
    "compare",
    "describeGeometry",
    "examine",
    "overlapFraction",
    "sameGrid",
]

ALIGNED_FROM = "InvResSegment.AlignedFrom"
"""Attribute of an aligned volume: the name of the original, which says more about its contrast than its own name."""
SOURCE_ROLE = "InvResSegment.AlignmentSource"
"""Node reference of an aligned volume to the original."""

TOLERANCE_MM = 1e-3  # as the backend's, for the channels of one case
LITTLE_OVERLAP = 0.5
_SAMPLES = 16


@dataclass(frozen=True, eq=False)
class VolumeGeometry:
    """Where a volume lies. size: voxels (I, J, K); toFrame: 4x4 (i, j, k, 1) -> RAS mm before the parent transform.

    toWorld: 4x4 to the world, None under a non-linear transform; transform: id of the parent transform, or "";
    frameOfReference: DICOM UID, or "".
    """

    name: str
    size: tuple[int, int, int]
    toFrame: np.ndarray
    toWorld: np.ndarray | None
    transform: str = ""
    transformName: str = ""
    frameOfReference: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed. severity: "ok", "note", "warning" or "error"; only an error prevents segmenting.

    code: for programs ("spacing", "overlap"...); sentence: for people; volume: whom it is about.
    """

    severity: str
    code: str
    sentence: str
    volume: str = ""


@dataclass(frozen=True)
class Alignment:
    """Whether a volume can be aligned. needsConsent: it can, but only a person knows whether it is right."""

    possible: bool
    needsConsent: bool
    sentence: str


# ---------------------------------------------------------------- arithmetic


def sameGrid(reference: VolumeGeometry, other: VolumeGeometry, tolerance_mm: float = TOLERANCE_MM) -> bool:
    """True if both have the same voxels in the same places of the world."""
    if reference.size != other.size:
        return False
    pair = _matrices(reference, other)
    return pair is not None and _shift_mm(reference.size, *pair) <= tolerance_mm


def compare(reference: VolumeGeometry, others: Sequence[VolumeGeometry]) -> list[Finding]:
    """What differs between each volume and the reference, in world space; one "ok" finding if nothing does."""
    findings = [finding for other in others for finding in _differences(reference, other)]
    if findings:
        return findings
    if not others:
        return [Finding("ok", "single", _("There is one volume; it keeps its own grid."), reference.name)]
    return [Finding("ok", "same", _("All volumes lie on the same grid."), reference.name)]


def overlapFraction(
    size: Sequence[int], toWorld: np.ndarray, otherSize: Sequence[int], otherToWorld: np.ndarray
) -> float:
    """Part (0 to 1) of the first volume's box that lies inside the second's; sizes in voxels (I, J, K)."""
    points = _samplePoints(size)
    return _insideFraction((np.linalg.inv(otherToWorld) @ toWorld @ points.T).T[:, :3], otherSize)


def _matrices(reference: VolumeGeometry, other: VolumeGeometry) -> tuple[np.ndarray, np.ndarray] | None:
    """Both voxel matrices in one frame: the common parent's, or the world; None if no matrix leads there."""
    if reference.transform == other.transform:
        return reference.toFrame, other.toFrame
    if reference.toWorld is None or other.toWorld is None:
        return None
    return reference.toWorld, other.toWorld


def _shift_mm(size: Sequence[int], first: np.ndarray, second: np.ndarray) -> float:
    ends = np.array([[*end, 1] for end in itertools.product(*((0, length - 1) for length in size))])
    return float(np.linalg.norm((ends @ (first - second).T)[:, :3], axis=1).max())


def _differences(reference: VolumeGeometry, other: VolumeGeometry) -> list[Finding]:
    def found(severity: str, code: str, sentence: str, **values: object) -> Finding:
        text = sentence.format(name=other.name, reference=reference.name, **values)
        return Finding(severity, code, text, other.name)

    findings = []
    if reference.frameOfReference and other.frameOfReference and reference.frameOfReference != other.frameOfReference:
        sentence = _("{name} and {reference} come from different examinations: their frames of reference differ.")
        findings.append(found("warning", "frame_of_reference", sentence))
    pair = _matrices(reference, other)
    if pair is None:
        under = " / ".join(filter(None, [other.transformName, reference.transformName]))
        sentence = _("{name} and {reference} are not under the same non-linear transform ({transform}); align it.")
        return [*findings, found("error", "transform", sentence, transform=under)]
    if sameGrid(reference, other):
        return findings
    first, second = pair
    details = [found(*detail[:3], **detail[3]) for detail in _details(reference, other, first, second)]
    fraction = overlapFraction(reference.size, first, other.size, second)
    if fraction == 0:
        details.append(found("error", "overlap", _("{name} does not overlap {reference} at all.")))
    elif fraction < LITTLE_OVERLAP:
        sentence = _("{name} covers only {percent} % of {reference}.")
        details.append(found("warning", "overlap", sentence, percent=max(1, round(100 * fraction))))
    if reference.transform != other.transform:
        sentence = _("{name} is under {own}, {reference} under {its}; they were compared where they lie in the world.")
        none = _("no transform")
        own, its = other.transformName or none, reference.transformName or none
        details.append(found("note", "transform", sentence, own=own, its=its))
    return findings + details


def _details(
    reference: VolumeGeometry, other: VolumeGeometry, first: np.ndarray, second: np.ndarray
) -> list[tuple[str, str, str, dict[str, object]]]:
    """Severity, code, sentence and its values for each way in which the grids differ."""
    details: list[tuple[str, str, str, dict[str, object]]] = []
    if reference.size != other.size:
        sentence = _("{name} has {size} voxels, {reference} has {wanted}.")
        details.append(("error", "extent", sentence, {"size": _by(other.size), "wanted": _by(reference.size)}))
    spacing, wanted = (np.linalg.norm(matrix[:3, :3], axis=0) for matrix in (second, first))
    if not np.allclose(spacing, wanted, rtol=0, atol=1e-4):
        sentence = _("{name} has voxels of {size} mm, {reference} of {wanted} mm.")
        details.append(("error", "spacing", sentence, {"size": _by(spacing), "wanted": _by(wanted)}))
    cosines = np.clip(np.sum(second[:3, :3] / spacing * (first[:3, :3] / wanted), axis=0), -1, 1)
    degrees = np.degrees(np.arccos(cosines))
    if _orientation(first) != _orientation(second):
        sentence = _("The axes of {name} run in other directions than those of {reference} ({axes}).")
        details.append(("error", "axes", sentence, {"axes": f"{_orientation(second)} / {_orientation(first)}"}))
    elif degrees.max() > 0.01:
        sentence = _("The axes of {name} are turned by up to {degrees} degrees against {reference}.")
        details.append(("error", "axes", sentence, {"degrees": f"{degrees.max():.3g}"}))
    distance_mm = float(np.linalg.norm(first[:3, 3] - second[:3, 3]))
    if distance_mm > TOLERANCE_MM:
        sentence = _("The first voxel of {name} lies {distance} mm from that of {reference}.")
        details.append(("error", "origin", sentence, {"distance": f"{distance_mm:.3g}"}))
    if not details:
        sentence = _("The voxels of {name} lie up to {distance} mm from those of {reference}.")
        shift = _shift_mm(reference.size, first, second)
        details.append(("error", "origin", sentence, {"distance": f"{shift:.2g}"}))
    return details


def _samplePoints(size: Sequence[int], count: int = _SAMPLES) -> np.ndarray:
    """Points (N, 4) spread evenly over the box of a volume, as (i, j, k, 1)."""
    axes = [(np.arange(count) + 0.5) / count * length - 0.5 for length in size]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return np.c_[grid, np.ones(len(grid))]


def _insideFraction(points: np.ndarray, size: Sequence[int]) -> float:
    return float(((points >= -0.5) & (points <= np.array(size) - 0.5)).all(axis=1).mean())


def _orientation(matrix: np.ndarray) -> str:
    """Where the axes I, J, K point, as the letters that radiologists use: "LPS"."""
    letters = ("RL", "AP", "SI")
    strongest = [int(np.abs(matrix[:3, axis]).argmax()) for axis in range(3)]
    return "".join(letters[world][int(matrix[world, axis] < 0)] for axis, world in enumerate(strongest))


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)


# ---------------------------------------------------------------- on nodes


def describeGeometry(volumeNode: slicer.vtkMRMLVolumeNode, frameOfReference: str = "") -> VolumeGeometry:
    """The geometry of a volume node with voxels."""
    toFrame = NodeConversion.volumeMatrix(volumeNode)
    between = NodeConversion.linearTransformBetween(volumeNode, None)
    parent = volumeNode.GetParentTransformNode()
    return VolumeGeometry(
        name=volumeNode.GetName(),
        size=tuple(volumeNode.GetImageData().GetDimensions()),
        toFrame=toFrame,
        toWorld=None if between is None else between @ toFrame,
        transform=parent.GetID() if parent else "",
        transformName=parent.GetName() if parent else "",
        frameOfReference=frameOfReference,
    )


def examine(volumeNodes: Sequence[slicer.vtkMRMLVolumeNode], framesOfReference: Sequence[str] = ()) -> list[Finding]:
    """`compare` for volume nodes with voxels; the first is the reference."""
    frames = [*framesOfReference, *[""] * (len(volumeNodes) - len(framesOfReference))]
    first, *others = (describeGeometry(node, frame) for node, frame in zip(volumeNodes, frames, strict=True))
    return compare(first, others)


def canAlign(
    volumeNode: slicer.vtkMRMLVolumeNode,
    referenceNode: slicer.vtkMRMLVolumeNode,
    framesOfReference: tuple[str, str] = ("", ""),
) -> Alignment:
    """Whether `align` would give something sensible; framesOfReference: DICOM UIDs of the two, "" if unknown."""
    names = {"name": volumeNode.GetName(), "reference": referenceNode.GetName()}

    def no(sentence: str) -> Alignment:
        return Alignment(False, False, sentence.format(**names))

    for node in (volumeNode, referenceNode):
        if problem := NodeConversion.exportProblem(node):
            return no(problem.replace("{", "{{").replace("}", "}}"))
    if volumeNode is referenceNode:
        return no(_("{name} is the reference itself."))
    if not _invertible(volumeNode, referenceNode):
        return no(_("{name} is under a transform that cannot be inverted; harden it first in Transforms."))
    transform = _referenceVoxelsToVolume(volumeNode, referenceNode)
    points = _samplePoints(referenceNode.GetImageData().GetDimensions())
    inside = np.array([transform.TransformPoint(point[:3].tolist()) for point in points])
    if not np.isfinite(inside).all():
        return no(_("{name} is under a transform that cannot be inverted; harden it first in Transforms."))
    fraction = _insideFraction(inside, volumeNode.GetImageData().GetDimensions())
    if fraction == 0:
        return no(_("{name} does not overlap {reference}; register them first, for example with General Registration."))
    if all(framesOfReference) and framesOfReference[0] != framesOfReference[1]:
        sentence = _(
            "{name} and {reference} come from different examinations; align them only if they were registered."
        )
        return Alignment(True, True, sentence.format(**names))
    sentence = _("{name} will be resampled to the grid of {reference}, of which it covers {percent} %.")
    return Alignment(True, False, sentence.format(**names, percent=max(1, round(100 * fraction))))


def align(
    volumeNode: slicer.vtkMRMLScalarVolumeNode, referenceNode: slicer.vtkMRMLVolumeNode
) -> slicer.vtkMRMLScalarVolumeNode:
    """A new volume "<name> on <reference>": the same tissue in the same place of the world, on the reference's grid.

    Linear interpolation in the volume's own number type; outside of the volume its smallest value. The original is
    not touched. Raises NodeConversion.ConversionError where `canAlign` says no.
    """
    check = canAlign(volumeNode, referenceNode)
    if not check.possible:
        raise NodeConversion.ConversionError(check.sentence)
    reslice = vtk.vtkImageReslice()
    # Only the voxels: a volume node keeps its place apart from its image.
    image = vtk.vtkImageData()
    image.ShallowCopy(volumeNode.GetImageData())
    image.SetOrigin(0, 0, 0)
    image.SetSpacing(1, 1, 1)
    reslice.SetInputData(image)
    reslice.SetResliceTransform(_referenceVoxelsToVolume(volumeNode, referenceNode))
    reslice.SetInterpolationModeToLinear()
    reslice.SetBackgroundLevel(image.GetScalarRange()[0])
    reslice.SetOutputOrigin(0, 0, 0)
    reslice.SetOutputSpacing(1, 1, 1)
    reslice.SetOutputExtent(referenceNode.GetImageData().GetExtent())
    reslice.AutoCropOutputOff()
    reslice.Update()

    scene = volumeNode.GetScene()
    name = _("{name} on {reference}").format(name=volumeNode.GetName(), reference=referenceNode.GetName())
    aligned = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", scene.GenerateUniqueName(name))
    matrix = vtk.vtkMatrix4x4()
    referenceNode.GetIJKToRASMatrix(matrix)
    aligned.SetIJKToRASMatrix(matrix)
    aligned.SetAndObserveTransformNodeID(referenceNode.GetTransformNodeID())
    aligned.SetAndObserveImageData(reslice.GetOutput())
    aligned.CreateDefaultDisplayNodes()
    if aligned.GetDisplayNode() and volumeNode.GetDisplayNode():
        aligned.GetDisplayNode().CopyContent(volumeNode.GetDisplayNode())
    aligned.SetAttribute(ALIGNED_FROM, volumeNode.GetAttribute(ALIGNED_FROM) or volumeNode.GetName())
    aligned.SetNodeReferenceID(SOURCE_ROLE, volumeNode.GetID())
    return aligned


def _referenceVoxelsToVolume(
    volumeNode: slicer.vtkMRMLVolumeNode, referenceNode: slicer.vtkMRMLVolumeNode
) -> vtk.vtkAbstractTransform:
    """From voxels of the reference to voxels of the volume, through the world."""
    toFrame, fromFrame = NodeConversion.volumeMatrix(referenceNode), NodeConversion.volumeMatrix(volumeNode)
    between = NodeConversion.linearTransformBetween(referenceNode, volumeNode)
    if between is not None:
        linear = vtk.vtkTransform()
        linear.SetMatrix(NodeConversion.toVtkMatrix(np.linalg.inv(fromFrame) @ between @ toFrame))
        return linear
    bent = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(
        referenceNode.GetParentTransformNode(), volumeNode.GetParentTransformNode(), bent
    )
    chain = vtk.vtkGeneralTransform()
    chain.PostMultiply()
    chain.Concatenate(NodeConversion.toVtkMatrix(toFrame))
    chain.Concatenate(bent)
    chain.Concatenate(NodeConversion.toVtkMatrix(np.linalg.inv(fromFrame)))
    return chain


def _invertible(volumeNode: slicer.vtkMRMLVolumeNode, referenceNode: slicer.vtkMRMLVolumeNode) -> bool:
    """Whether places of the reference can be found in the volume, that is against its parent transform."""
    parent = volumeNode.GetParentTransformNode()
    if parent is None:
        return True
    if parent.IsTransformToWorldLinear():
        matrix = vtk.vtkMatrix4x4()
        parent.GetMatrixTransformToWorld(matrix)
        return abs(np.linalg.det(NodeConversion.fromVtkMatrix(matrix)[:3, :3])) > 1e-9
    # VTK inverts grids and splines step by step and tells only the console when it fails; a point that comes back
    # to where it was proves more.
    voxelsToFrame = NodeConversion.volumeMatrix(referenceNode)
    there, back = vtk.vtkGeneralTransform(), vtk.vtkGeneralTransform()
    ends = referenceNode.GetParentTransformNode(), parent
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(*ends, there)
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(*reversed(ends), back)
    points = (voxelsToFrame @ _samplePoints(referenceNode.GetImageData().GetDimensions(), 5).T).T[:, :3]
    returned = [back.TransformPoint(there.TransformPoint(point.tolist())) for point in points]
    return bool(np.allclose(returned, points, rtol=0, atol=0.5))
