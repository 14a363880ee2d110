"""What is known of a loaded volume: its name, the header it came from, and its intensities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import slicer

from . import NodeConversion
from .GeometryDoctor import ALIGNED_FROM, SOURCE_ROLE

__all__ = [
    "DICOM_TAGS",
    "IMAGE_CLASS",
    "UNCERTAINTY",
    "IntensityStatistics",
    "VolumeDescription",
    "choosableImages",
    "describeVolume",
    "frameOfReference",
]

IMAGE_CLASS = "vtkMRMLScalarVolumeNode"
UNCERTAINTY = "InvResSegment.Uncertainty"
"""Attribute of a volume that is no image, but a map of where a model is unsure: the name that the panel gave it."""
DICOM_TAGS = {
    "seriesDescription": "0008,103e",
    "modality": "0008,0060",
    "imageType": "0008,0008",
    "scanningSequence": "0018,0020",
    "sequenceVariant": "0018,0021",
    "sequenceName": "0018,0024",
    "echoTime": "0018,0081",
    "repetitionTime": "0018,0080",
    "inversionTime": "0018,0082",
    "flipAngle": "0018,1314",
    "contrastAgent": "0018,0010",
    "diffusionBValue": "0018,9087",
    "seriesInstanceUid": "0020,000e",
    "frameOfReferenceUid": "0020,0052",
}


@dataclass(frozen=True)
class IntensityStatistics:
    """Of a sample of the voxels. distinct: number of different values in it, counted up to 256."""

    minimum: float
    maximum: float
    median: float
    whole: bool
    distinct: int

    @staticmethod
    def of(array: np.ndarray) -> IntensityStatistics:
        """Statistics of an array of any shape; infinities and NaN are left out."""
        flat = array.reshape(-1)[:: max(1, array.size // 100_000)].astype(np.float64)
        flat = flat[np.isfinite(flat)]
        if not flat.size:
            return IntensityStatistics(0, 0, 0, True, 0)
        return IntensityStatistics(
            float(flat.min()),
            float(flat.max()),
            float(np.median(flat)),
            bool((flat == np.round(flat)).all()),
            min(256, len(np.unique(flat))),
        )


@dataclass(frozen=True)
class VolumeDescription:
    """What is known of a volume. key: whatever the caller knows it by, such as a node id.

    Times in ms, angle in degrees, b value in s/mm2; None and "" where the header says nothing.
    """

    name: str
    key: str = ""
    seriesDescription: str = ""
    modality: str = ""
    imageType: str = ""
    scanningSequence: str = ""
    sequenceVariant: str = ""
    sequenceName: str = ""
    echoTime: float | None = None
    repetitionTime: float | None = None
    inversionTime: float | None = None
    flipAngle: float | None = None
    contrastAgent: str = ""
    diffusionBValue: float | None = None
    seriesInstanceUid: str = ""
    frameOfReferenceUid: str = ""
    statistics: IntensityStatistics | None = None

    @staticmethod
    def fromHeader(name: str, header: dict[str, str], key: str = "", **fields: Any) -> VolumeDescription:
        """From DICOM values as text; the keys are those of `DICOM_TAGS`. Numbers that are none are left out."""
        values: dict[str, Any] = {}
        for attribute in DICOM_TAGS:
            text = (header.get(attribute) or "").strip()
            if attribute.endswith(("Time", "Angle", "Value")):
                values[attribute] = _number(text)
            else:
                values[attribute] = text
        return VolumeDescription(name=name, key=key, **values, **fields)


def choosableImages(scene: slicer.vtkMRMLScene) -> list[slicer.vtkMRMLScalarVolumeNode]:
    """The volumes of a scene that a person can choose as an image, as the selectors offer them.

    Without maps of uncertainty, which only a person would take for one.
    """
    nodes = [scene.GetNthNodeByClass(n, IMAGE_CLASS) for n in range(scene.GetNumberOfNodesByClass(IMAGE_CLASS))]
    # Of just this class: label maps, vectors and tensors are no images of one channel.
    nodes = [node for node in nodes if node.GetClassName() == IMAGE_CLASS and not node.GetHideFromEditors()]
    return [node for node in nodes if not node.GetAttribute(UNCERTAINTY)]


def describeVolume(volumeNode: slicer.vtkMRMLVolumeNode) -> VolumeDescription:
    """The description of a volume node; its key is the node's id.

    The header is that of the first instance in Slicer's DICOM database, else attributes such as
    "DICOM.SeriesDescription". A volume made by `GeometryDoctor.align` is described by the one it was made of.
    """
    source = volumeNode.GetNodeReference(SOURCE_ROLE) or volumeNode
    name = volumeNode.GetAttribute(ALIGNED_FROM) or volumeNode.GetName() or ""
    statistics = None
    if not NodeConversion.exportProblem(volumeNode):
        statistics = IntensityStatistics.of(NodeConversion.volumeArray(volumeNode))
    return VolumeDescription.fromHeader(name, _header(source), key=volumeNode.GetID() or "", statistics=statistics)


def frameOfReference(volumeNode: slicer.vtkMRMLVolumeNode) -> str:
    """The DICOM UID of the frame of reference that a volume was loaded in; "" if it is not known."""
    return _headerValue(volumeNode, "frameOfReferenceUid")


def _header(volumeNode: slicer.vtkMRMLVolumeNode) -> dict[str, str]:
    """DICOM values as text, by the keys of `DICOM_TAGS`; those that are not known are missing."""
    header = {key: _headerValue(volumeNode, key) for key in DICOM_TAGS}
    return {key: value for key, value in header.items() if value}


def _headerValue(volumeNode: slicer.vtkMRMLVolumeNode, key: str) -> str:
    """One value of the header: from an attribute of the node, else from Slicer's DICOM database, which readers fill."""
    keyword = key[:1].upper() + key[1:].replace("Uid", "UID")
    value = volumeNode.GetAttribute(f"DICOM.{_KEYWORDS.get(key, keyword)}") or ""
    instances = (volumeNode.GetAttribute("DICOM.instanceUIDs") or "").split()
    database = getattr(slicer, "dicomDatabase", None)
    if not value and instances and database is not None:
        value = database.instanceValue(instances[0], DICOM_TAGS[key]) or ""
    return value


_KEYWORDS = {"contrastAgent": "ContrastBolusAgent", "diffusionBValue": "DiffusionBValue"}


def _number(text: str) -> float | None:
    try:
        value = float(text.split("\\")[0])
    except ValueError:
        return None
    return value if np.isfinite(value) else None
