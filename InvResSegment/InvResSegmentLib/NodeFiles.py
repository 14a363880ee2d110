"""Volumes and segmentations between files and the scene, without dialogs and without leaving storage nodes behind."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import slicer
from slicer.i18n import tr as _

from .NodeConversion import BINARY_LABELMAP, ConversionError, labelImage, volumeArray, volumeMatrix
from .NrrdFile import writeNrrd
from .ResultFile import DamagedFile, ResultFile, SegmentLabel, readResultFile, readSegments

__all__ = [
    "emptySegmentation",
    "loadSegmentation",
    "loadVolume",
    "newSegmentation",
    "readLabelMap",
    "readLabels",
    "saveSegmentation",
]

IMAGE, LABELS = "vtkMRMLScalarVolumeNode", "vtkMRMLLabelMapVolumeNode"
SEGMENTATION_FILE = ".seg.nrrd"
_EMPTY = {"Segmentation_SourceRepresentation": BINARY_LABELMAP}
"""Tells a segmentation without segments from a label map that names none."""
LOOKED_INTO, TRIED = 100, 5  # files of a folder
SINGLE_FILES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".img")


def loadVolume(path: Path, name: str, kind: str = IMAGE, passing: bool = False) -> slicer.vtkMRMLScalarVolumeNode:
    """A volume of the scene from a file, or from the folder of a DICOM series; displayed nowhere yet.

    passing: neither saved with the scene nor offered in selectors.
    Raises ConversionError where there is no such file, or no volume in it.
    """
    files = _files(path)
    node = _newNode(kind, name, passing)
    if not any(_readInto(node, file, series=path.is_dir()) for file in files):
        slicer.mrmlScene.RemoveNode(node)
        raise ConversionError(
            _("{path} could not be read as a volume.").format(path=path),
            _("Look whether Slicer's Add Data can load it."),
        )
    if kind == IMAGE:
        _giveDisplay(node, passing)
    return node


def _readInto(node: slicer.vtkMRMLScalarVolumeNode, file: Path, series: bool) -> bool:
    """Whether there is a volume in a file. series: it is of a folder, and others may belong to it."""
    storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    # Names of DICOM files may end in anything (1.2.840.55), and the backend reads the series of such a file.
    storage.SetSingleFile(not series and file.name.lower().endswith(SINGLE_FILES))
    storage.SetFileName(str(file))
    read = storage.ReadData(node)
    slicer.mrmlScene.RemoveNode(storage)  # the scene would take the file for its own, and write to it
    image = node.GetImageData()
    return bool(read) and image is not None and image.GetPointData().GetScalars() is not None


def readLabels(path: Path, values: Mapping[str, Sequence[int]] | None = None) -> ResultFile:
    """The segments of a label file on its own grid; a .seg.nrrd says by itself what they are.

    values: of the other formats, the voxel values of each segment by its name; they are numbered from 1 in the result.
    Raises ConversionError.
    """
    if path.name.lower().endswith(SEGMENTATION_FILE):
        try:
            return readResultFile(path)
        except (DamagedFile, OSError) as error:
            raise ConversionError(
                _("{path} could not be read ({reason}).").format(path=path.name, reason=error)
            ) from None
    array, matrix = _labelArray(path)
    labels = np.zeros(array.shape, np.uint8 if len(values or {}) < 256 else np.uint16)
    segments = []
    for number, (name, of_label) in enumerate((values or {}).items(), 1):
        labels[np.isin(array, list(of_label))] = number
        segments.append(SegmentLabel(name, number))
    return ResultFile(labels[..., None], matrix, tuple(segments))


def readLabelMap(
    path: Path, labels: Sequence[SegmentLabel], parts: Mapping[str, Sequence[int]] | None = None
) -> ResultFile:
    """The segments of a label map that names none. labels: what its values stand for.

    parts: of labels that are regions, all values that lie in each by its name; they may overlap.
    Raises ConversionError where it cannot be read, or has a value that no label has.
    """
    array, matrix = _labelArray(path)
    foreign = sorted(set(np.unique(array).tolist()) - {0, *(label.value for label in labels)})
    if foreign:
        raise ConversionError(
            _("{path} has the value {value}, and nothing says what that stands for.").format(
                path=path.name, value=foreign[0]
            ),
            _("In the tab Models, import the model that made it."),
        )
    if not parts:
        return ResultFile(array.astype(np.int32, copy=False)[..., None], matrix, tuple(labels))
    layers = [np.isin(array, parts[label.name]) * np.int32(label.value) for label in labels]
    regions = tuple(replace(label, layer=number) for number, label in enumerate(labels))
    return ResultFile(np.stack(layers, axis=-1), matrix, regions)


def _labelArray(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The voxels (K, J, I) of a label file and their matrix. Raises ConversionError."""
    node = loadVolume(path, path.name, LABELS, passing=True)
    array, matrix = volumeArray(node).copy(), volumeMatrix(node)
    slicer.mrmlScene.RemoveNode(node)
    return array, matrix


def emptySegmentation(name: str, passing: bool = False) -> slicer.vtkMRMLSegmentationNode:
    """A segmentation of the scene without segments. passing: neither saved with the scene nor offered in selectors."""
    node = _newNode("vtkMRMLSegmentationNode", name, passing)
    _giveDisplay(node, passing)
    return node


def newSegmentation(
    found: ResultFile, name: str, colour: tuple[float, float, float] | None = None, passing: bool = False
) -> slicer.vtkMRMLSegmentationNode:
    """A segmentation of the scene with these segments, where the file says that they lie.

    colour: of all of them, 0 to 1. passing: neither saved with the scene nor offered in selectors.
    """
    node = emptySegmentation(name, passing)
    segmentation = node.GetSegmentation()
    segmentation.SetSourceRepresentationName(BINARY_LABELMAP)
    images = [labelImage(layer, found.matrix) for layer in np.moveaxis(found.layers, 3, 0)]
    for label in found.segments:
        stated = label if colour is None else replace(label, colour=tuple(255 * part for part in colour))
        segment = slicer.vtkSegment()
        segment.SetName(stated.name)
        segment.SetLabelValue(stated.value)
        if stated.colour:
            segment.SetColor(*(part / 255 for part in stated.colour))
        if stated.terminology:
            segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), stated.terminology)
        segment.AddRepresentation(BINARY_LABELMAP, images[label.layer])  # one for all of a layer: they share it
        segmentation.AddSegment(segment, segmentation.GenerateUniqueSegmentID(f"InvResSegment_{stated.value}"))
    return node


def loadSegmentation(path: Path, name: str) -> slicer.vtkMRMLSegmentationNode:
    """A segmentation that `saveSegmentation` wrote, with Slicer's own reader. Raises ConversionError.

    That reader may end the application on a file that was cut off: only for files that were written whole.
    """
    try:
        segments = readSegments(path)
    except (DamagedFile, OSError) as error:
        raise ConversionError(
            _("{path} could not be read as a segmentation ({reason}).").format(path=path, reason=error)
        ) from None
    node = emptySegmentation(name)
    if not segments:  # not every release of Slicer reads back what has none
        return node
    storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
    storage.SetFileName(str(path))
    read = storage.ReadData(node)
    slicer.mrmlScene.RemoveNode(storage)
    if not read:
        slicer.mrmlScene.RemoveNode(node)
        raise ConversionError(_("{path} could not be read as a segmentation.").format(path=path))
    return node


def saveSegmentation(
    node: slicer.vtkMRMLSegmentationNode, path: Path, imageNode: slicer.vtkMRMLScalarVolumeNode
) -> None:
    """Writes a segmentation as .seg.nrrd, whole or not at all. Raises OSError.

    imageNode: what it was drawn on. One without segments becomes an empty label map on that grid: "there is nothing
    here" is an answer, too, and Slicer's own writer has no place for it, or refuses it.
    """
    temporary = path.with_name(f".{secrets.token_hex(6)}{SEGMENTATION_FILE}")
    try:
        if node.GetSegmentation().GetNumberOfSegments():
            written = _writeSegments(node, temporary)
        else:
            empty = np.zeros(imageNode.GetImageData().GetDimensions()[::-1], np.uint8)
            writeNrrd(temporary, empty, volumeMatrix(imageNode), _EMPTY, packed=True)
            written = True
        if not written or not temporary.is_file():
            raise OSError(_("{path} could not be written").format(path=path))
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _writeSegments(node: slicer.vtkMRMLSegmentationNode, path: Path) -> bool:
    storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
    try:
        storage.SetFileName(str(path))
        return bool(storage.WriteData(node))
    finally:
        slicer.mrmlScene.RemoveNode(storage)


def _files(path: Path) -> list[Path]:
    """The file itself, or those of the folder of a DICOM series of which one should be enough, the likeliest first."""
    try:
        files = _inSeries(path) if path.is_dir() else [path]
        there = bool(files) and files[0].is_file()
    except OSError as error:
        raise ConversionError(
            _("{path} cannot be read: {reason}.").format(path=path, reason=error.strerror or error)
        ) from None
    if not there:
        raise ConversionError(
            _("The file {path} is not there any more.").format(path=path), _("Put it back where it was.")
        )
    return files


def _inSeries(folder: Path) -> list[Path]:
    """Files of a folder that may be slices: notes, previews and the desktop's own files may lie beside those."""
    named = sorted(one for one in folder.iterdir() if not one.name.startswith(".") and one.is_file())
    files = [one for one in named if one.stem.upper() != "DICOMDIR"][:LOOKED_INTO]
    return sorted(files, key=lambda file: not _isDicom(file))[:TRIED]  # not all DICOM files say that they are


def _isDicom(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _newNode(kind: str, name: str, passing: bool):
    node = slicer.mrmlScene.CreateNodeByClass(kind)
    node.UnRegister(None)
    node.SetName(slicer.mrmlScene.GenerateUniqueName(name))
    _mark(node, passing)  # before selectors and the subject hierarchy see it
    return slicer.mrmlScene.AddNode(node)


def _giveDisplay(node, passing: bool) -> None:
    node.CreateDefaultDisplayNodes()
    if node.GetDisplayNode() is not None:
        _mark(node.GetDisplayNode(), passing)


def _mark(node, passing: bool) -> None:
    if passing:
        node.SetSaveWithScene(False)
        node.SetHideFromEditors(True)
