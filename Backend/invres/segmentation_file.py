"""Slicer's segmentation files (.seg.nrrd): names, colours, terminology and layers to and from one label map."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import InvresError
from .config import LabelScheme
from .events import Reporter
from .image_header import array_order, corners
from .volume_io import read_header, read_voxels, write_image

if TYPE_CHECKING:
    from .volume import Volume

__all__ = [
    "DEFAULT_TERMINOLOGY",
    "PALETTE",
    "flatten_segments",
    "reference_grid",
    "segment_layers",
    "segment_names",
    "write_segmentation",
]

DEFAULT_TERMINOLOGY = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^85756007^Tissue~SCT^85756007^Tissue~^^"
    "~Anatomic codes - DICOM master list~^^~^^"
)
"""Slicer's own entry for a segment without one: generic tissue."""

PALETTE = (
    (230, 75, 60),
    (60, 160, 230),
    (90, 190, 90),
    (245, 190, 50),
    (160, 95, 200),
    (70, 205, 200),
    (240, 130, 40),
    (225, 115, 175),
    (150, 110, 70),
    (175, 210, 70),
    (60, 90, 180),
    (170, 170, 170),
)
"""RGB (0..255) of labels without a colour, in turn."""


def write_segmentation(
    path: str | os.PathLike[str],
    labels_volume: Volume,
    scheme: LabelScheme,
    fields: Mapping[str, str] | None = None,
) -> None:
    """Writes a label map; `.seg.nrrd` keeps the names, colours and terminology of `scheme` for Slicer.

    fields: what else the header of a `.seg.nrrd` says; Slicer passes over what it does not know.

    labels_volume: integers (D, H, W), 0 and the labels' output values. Other endings get the plain label map. Regions
    overlap, so each has a layer of its own there, with all its values, whichever region was written last.
    Raises InvresError for values that no label has, and as `write_volume` does.
    """
    array = labels_volume.array
    if array.dtype == bool:
        array = array.view(np.uint8)
    known = {0, *(label.output_value for label in scheme.labels)}
    foreign = sorted(set(np.unique(array).tolist()) - known)
    if foreign:
        raise InvresError(
            f"The label map for {os.path.basename(path)} has the value {foreign[0]}, but its labels have "
            f"{', '.join(map(str, sorted(known)))}.",
            hint="Use the label scheme that the map was made with.",
        )
    affine = labels_volume.geometry.affine
    metadata = None
    if os.fspath(path).lower().endswith(".seg.nrrd"):
        metadata = _segment_fields(scheme, array.shape, affine) | dict(fields or {})
        # The types of Slicer's own label maps.
        dtype = np.result_type(*(np.min_scalar_type(value) for value in known))
        array = array.astype(dtype if dtype == np.uint8 else np.promote_types(dtype, np.int16), copy=False)
        if scheme.regions and len(scheme.labels) > 1:
            layers = [np.isin(array, label.values) * array.dtype.type(label.output_value) for label in scheme.labels]
            write_image(path, np.stack(layers), affine, metadata=metadata, layers=True)
            return
    write_image(path, array, affine, metadata=metadata)


def segment_names(fields: dict[str, str]) -> dict[int, str]:
    """What each value of the label map of a Slicer segmentation is called, as `flatten_segments` numbers them."""
    numbers = _numbers(fields)
    names = [fields.get(f"Segment{number}_Name", f"Segment_{number}") for number in numbers]
    return dict(zip(_values(fields, numbers), names, strict=True))


def segment_layers(path: str | os.PathLike[str]) -> tuple[np.ndarray, dict[str, tuple[int, int]]]:
    """The layers (D, H, W, layers) of a Slicer segmentation on the grid of its image, and where each segment is by its
    name: (layer, value). Segments that overlap stay whole.

    Raises InvresError for a damaged file.
    """
    header = read_header(path)
    stored = read_voxels(header).reshape(*header.shape, -1)
    shape, _, box = reference_grid(header.shape, header.affine, header.metadata)
    layers = np.zeros((*shape, stored.shape[-1]), stored.dtype)
    layers[box] = stored
    fields = header.metadata
    where = {
        fields.get(f"Segment{number}_Name", f"Segment_{number}"): (
            int(fields.get(f"Segment{number}_Layer", 0)),
            int(fields.get(f"Segment{number}_LabelValue", 1)),
        )
        for number in _numbers(fields)
    }
    if any(layer not in range(layers.shape[-1]) for layer, _ in where.values()):
        raise _layer_missing(os.path.basename(path))
    return layers, where


def flatten_segments(array: np.ndarray, fields: dict[str, str], name: str, report: Reporter) -> np.ndarray:
    """One label map (D, H, W) from the layers (D, H, W, layers) of a Slicer segmentation.

    Segments keep their label values; where two have the same one, all are renumbered 1, 2, ... in order.
    Where segments overlap the later one stays. Both are reported as warnings.
    """
    layers = array if array.ndim == 4 else array[..., None]
    if layers.shape[-1] == 1:
        return layers[..., 0]
    numbers = _numbers(fields)
    layer = [int(fields.get(f"Segment{n}_Layer", i)) for i, n in enumerate(numbers)]
    stored = [int(fields.get(f"Segment{n}_LabelValue", 1)) for n in numbers]
    if any(index not in range(layers.shape[-1]) for index in layer):
        raise _layer_missing(name)
    values = _values(fields, numbers)
    if values != stored:
        names = [fields.get(f"Segment{n}_Name", str(n)) for n in numbers]
        listing = ", ".join(f"{value} = {text}" for value, text in zip(values, names, strict=True))
        report.warning(f"{name}: segments in different layers have the same label value; renumbered: {listing}.")
    labels = np.zeros(layers.shape[:3], dtype=np.uint8 if max(values, default=0) < 256 else np.int32)
    overlap_voxels = 0
    for index, old, new in zip(layer, stored, values, strict=True):
        inside = layers[..., index] == old
        overlap_voxels += int(np.count_nonzero(labels[inside]))
        labels[inside] = new
    if overlap_voxels:
        report.warning(
            f"{name}: {overlap_voxels} voxels belong to more than one segment; the segment listed last was kept."
        )
    return labels


def _layer_missing(name: str) -> InvresError:
    return InvresError(f"The segmentation {name} is damaged: it names a layer that it does not hold.")


def _numbers(fields: dict[str, str]) -> list[int]:
    return sorted({int(match[1]) for key in fields if (match := re.match(r"Segment(\d+)_ID$", key))})


def _values(fields: dict[str, str], numbers: list[int]) -> list[int]:
    """Of the segments in the label map: their own, or 1, 2, ... where two in different layers have the same one."""
    stored = [int(fields.get(f"Segment{number}_LabelValue", 1)) for number in numbers]
    return stored if len(set(stored)) == len(stored) else list(range(1, len(numbers) + 1))


def reference_grid(
    shape: tuple[int, ...], affine: np.ndarray, fields: dict[str, str]
) -> tuple[tuple[int, ...], np.ndarray, tuple[slice, ...]]:
    """The grid of the image that a Slicer segmentation was drawn on: (shape, affine, box of the stored voxels in it).

    Slicer may store only the box around the segments. The stored grid itself where no fitting one is named.
    """
    stored = tuple(shape), affine, tuple(slice(0, size) for size in shape)
    match = re.search(r"Reference image geometry\|([^|]*)\|", fields.get("Segmentation_ConversionParameters", ""))
    try:
        numbers = [float(text) for text in match[1].split(";") if text.strip()] if match else []
    except ValueError:
        return stored
    if len(numbers) != 22 or not np.isfinite(numbers).all():
        return stored
    first, last = np.array(numbers[16::2]), np.array(numbers[17::2])
    matrix = np.reshape(numbers[:16], (4, 4))
    matrix[:3, 3] += matrix[:3, :3] @ first
    whole, whole_shape = array_order(matrix), tuple((last - first + 1).astype(int)[::-1].tolist())
    if min(whole_shape) < 1 or abs(np.linalg.det(whole)) < 1e-12:
        return stored
    ends = np.linalg.solve(whole, np.c_[corners(affine, tuple(shape)), np.ones(8)].T).T[:, :3]
    start = np.round(ends[0]).astype(int)
    expected = corners(np.block([[np.eye(3), start[:, None]], [np.zeros(3), 1]]), tuple(shape))
    fits = np.abs(ends - expected).max() < 1e-2 and (start >= 0).all() and (start + shape <= whole_shape).all()
    box = tuple(slice(int(a), int(a) + size) for a, size in zip(start, shape, strict=True))
    return (whole_shape, whole, box) if fits and whole_shape != tuple(shape) else stored


def _segment_fields(scheme: LabelScheme, shape: tuple[int, ...], affine: np.ndarray) -> dict[str, str]:
    """The text fields that vtkMRMLSegmentationStorageNode writes, for layers on the whole grid: one of all labels, or
    of each region one."""
    extent = [number for size in reversed(shape) for number in (0, size - 1)]
    matrix = array_order(affine)
    geometry = "".join(f"{number:.17g};" for number in [*matrix.ravel().tolist(), *extent])
    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ConversionParameters": f"Reference image geometry|{geometry}|&",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for index, label in enumerate(scheme.labels):
        colour = label.colour or PALETTE[index % len(PALETTE)]
        fields |= {
            f"Segment{index}_ID": f"Segment_{label.output_value}",
            f"Segment{index}_Name": label.name,
            f"Segment{index}_NameAutoGenerated": "0",
            f"Segment{index}_Color": " ".join(f"{part / 255:.6g}" for part in colour),
            f"Segment{index}_ColorAutoGenerated": "0",
            f"Segment{index}_LabelValue": str(label.output_value),
            f"Segment{index}_Layer": str(index if scheme.regions else 0),
            f"Segment{index}_Extent": " ".join(map(str, extent)),
            f"Segment{index}_Tags": f"TerminologyEntry:{label.terminology or DEFAULT_TERMINOLOGY}|",
        }
    return fields
