"""Volumes with their place in the world: reading, writing and resampling; the one place where axis orders are said.

Arrays are (D, H, W) = (k, j, i), W fastest in memory. The world is RAS in mm. Files and SimpleITK are LPS with the
order (x, y, z); the conversion happens when a file is read or written and nowhere else. "Canonical" means that D points
superior, H anterior and W right, reached by flips and transposition alone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk

from . import InvresError
from .events import SILENT, Reporter
from .image_header import Header, TimeAxis, corners
from .segmentation_file import flatten_segments, reference_grid, write_segmentation
from .volume_io import WRITABLE_ENDINGS, read_header, read_voxels, to_sitk, write_image

__all__ = [
    "SEVERAL_VOLUMES",
    "WRITABLE_ENDINGS",
    "Geometry",
    "Volume",
    "check_scalar",
    "finite_values",
    "read_channels",
    "read_geometry",
    "read_volume",
    "resample",
    "write_channels",
    "write_segmentation",
    "write_series",
    "write_volume",
]

SEVERAL_VOLUMES = "several_volumes"
"""Code of the error where one volume was wanted and the file holds more."""

_WORLD_AXES = (2, 1, 0)  # canonical D, H, W point along these axes of RAS


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of a volume.

    shape: (D, H, W) voxels. spacing_mm: (D, H, W). origin_mm: RAS of the centre of voxel (0, 0, 0).
    direction: 3x3, column a = RAS unit vector of array axis a.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: np.ndarray

    def __post_init__(self) -> None:
        direction = np.array(self.direction, dtype=float).reshape(3, 3)
        direction.setflags(write=False)
        object.__setattr__(self, "direction", direction)
        # Plain numbers, so that a geometry can be written to JSON.
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "spacing_mm", tuple(float(s) for s in self.spacing_mm))
        object.__setattr__(self, "origin_mm", tuple(float(o) for o in self.origin_mm))
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InvresError(f"A volume has three sizes of 1 or more, got {list(self.shape)}.")
        if len(self.spacing_mm) != 3 or not min(self.spacing_mm) > 0:
            raise InvresError(f"A spacing has three values above 0 mm, got {list(self.spacing_mm)}.")

    @staticmethod
    def from_affine(affine: np.ndarray, shape: tuple[int, ...]) -> Geometry:
        """The grid of a 4x4 (d, h, w, 1) -> RAS matrix."""
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        return Geometry(_three(shape), _three(spacing), _three(affine[:3, 3]), affine[:3, :3] / spacing)

    @property
    def affine(self) -> np.ndarray:
        """4x4, (d, h, w, 1) -> RAS mm."""
        affine = np.eye(4)
        affine[:3, :3] = self.direction * self.spacing_mm
        affine[:3, 3] = self.origin_mm
        return affine

    def same_as(self, other: Geometry, tolerance_mm: float = 1e-3) -> bool:
        """True if the shapes are equal and no corner voxel lies further off than `tolerance_mm`."""
        return self.shape == other.shape and self._shift_mm(other) <= tolerance_mm

    def difference(self, other: Geometry) -> str:
        """What differs, as a phrase: "spacing 1x1x1 mm against 1x1x2 mm"; empty if the same."""
        if self.same_as(other):
            return ""
        phrases = []
        if self.shape != other.shape:
            phrases.append(f"size {_by(self.shape)} against {_by(other.shape)} voxels")
        if not np.allclose(self.spacing_mm, other.spacing_mm, rtol=0, atol=1e-4):
            phrases.append(f"spacing {_by(self.spacing_mm)} mm against {_by(other.spacing_mm)} mm")
        cosines = np.clip(np.sum(self.direction * other.direction, axis=0), -1, 1)
        degrees = float(np.degrees(np.arccos(cosines)).max())
        if degrees > 0.01:
            phrases.append(f"axes turned by up to {degrees:.3g} degrees")
        if (distance_mm := float(np.linalg.norm(np.subtract(self.origin_mm, other.origin_mm)))) > 1e-3:
            phrases.append(f"origin {distance_mm:.3g} mm apart")
        return ", ".join(phrases) or f"voxels up to {self._shift_mm(other):.3g} mm apart"

    def canonical(self) -> Geometry:
        """The same grid with D superior, H anterior, W right as nearly as flips and transposition allow."""
        order, flipped = _canonical_moves(self.direction)
        affine = self.affine
        for axis in flipped:
            affine[:3, 3] += affine[:3, axis] * (self.shape[axis] - 1)
            affine[:3, axis] *= -1
        return replace(
            self,
            shape=_three([self.shape[a] for a in order]),
            spacing_mm=_three([self.spacing_mm[a] for a in order]),
            origin_mm=_three(affine[:3, 3]),
            direction=(self.direction * [-1 if a in flipped else 1 for a in range(3)])[:, order],
        )

    def crop(self, box: tuple[slice, slice, slice]) -> Geometry:
        """The grid of `array[box]`; slices of step 1 inside the volume."""
        bounds = [part.indices(size)[:2] for part, size in zip(box, self.shape, strict=True)]
        start = np.array([first for first, _ in bounds])
        origin = self.affine[:3, :3] @ start + self.origin_mm
        return replace(self, shape=_three([last - first for first, last in bounds]), origin_mm=_three(origin))

    def with_spacing(self, spacing_mm: tuple[float, float, float]) -> Geometry:
        """The same field of view and centre in voxels of `spacing_mm` (D, H, W); the shape is rounded."""
        ratio = np.array(self.spacing_mm) / spacing_mm
        shape = np.maximum(1, np.round(np.array(self.shape) * ratio)).astype(int)
        old_middle = self.direction @ (np.array(self.spacing_mm) * (np.array(self.shape) - 1) / 2)
        new_middle = self.direction @ (np.array(spacing_mm) * (shape - 1) / 2)
        origin = np.array(self.origin_mm) + old_middle - new_middle
        return Geometry(_three(shape), spacing_mm, _three(origin), self.direction)

    def _shift_mm(self, other: Geometry) -> float:
        offsets = corners(self.affine, self.shape) - corners(other.affine, other.shape)
        return float(np.linalg.norm(offsets, axis=1).max())


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels (D, H, W) with their grid."""

    array: np.ndarray
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.array.shape != self.geometry.shape:
            raise InvresError(f"An array of {self.array.shape} voxels does not fit a grid of {self.geometry.shape}.")

    def canonical(self) -> Volume:
        """The same voxels with D superior, H anterior, W right: flipped and transposed, never interpolated."""
        order, flipped = _canonical_moves(self.geometry.direction)
        array = np.flip(self.array, flipped).transpose(order)
        return Volume(np.ascontiguousarray(array), self.geometry.canonical())

    def oriented_as(self, direction: np.ndarray) -> Volume:
        """The way back from `canonical`: the same voxels with the axes of a grid whose direction this is."""
        order, flipped = _canonical_moves(direction)
        back = np.argsort(order)
        array = np.flip(self.array.transpose(back), flipped)
        affine = self.geometry.affine
        affine[:3, :3] = affine[:3, back]
        for axis in flipped:
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
        return Volume(np.ascontiguousarray(array), Geometry.from_affine(affine, array.shape))


def read_geometry(path: str | os.PathLike[str]) -> Geometry:
    """The grid of a file or DICOM folder from its header alone; that of one volume where a file holds several.

    For Slicer's segmentations that of the image they were drawn on, as `read_volume` gives labels.
    Raises InvresError where the header is missing, damaged or not of a volume.
    """
    header = read_header(path)
    shape, affine, _ = reference_grid(header.shape, header.affine, header.metadata)
    return Geometry.from_affine(affine, shape)


def read_volume(
    path: str | os.PathLike[str], *, kind: Literal["image", "labels"] = "image", report: Reporter = SILENT
) -> Volume:
    """One 3D volume from a file, a DICOM folder (one series) or one file of a DICOM series, on its own grid.

    kind "image": values as stored; NaN and infinities become the smallest finite value, with a warning.
    kind "labels": whole numbers in the smallest integer type; Slicer's segmentations become one label map.
    What was repaired or looks wrong is told to `report`. Raises InvresError where this is not one readable 3D volume.
    """
    header = read_header(path)
    for sentence in header.warnings:
        report.warning(sentence, path=os.fspath(path))
    name = Path(path).name
    if header.count > 1:
        raise InvresError(
            f"{path} is 4D with {header.count} volumes of {_by(header.size[:3])} voxels, but one 3D volume is wanted.",
            hint="Split it into one file per volume, or use it as the only image of a case with that many channels.",
            code=SEVERAL_VOLUMES,
        )
    is_segmentation = kind == "labels" and "Segment0_ID" in header.metadata
    if not is_segmentation:
        check_scalar(path, header)
    array, affine = read_voxels(header).reshape(*header.shape, -1), header.affine
    if is_segmentation:
        array = flatten_segments(array, header.metadata, name, report)
        stored = array
        shape, affine, box = reference_grid(stored.shape, affine, header.metadata)
        array = np.zeros(shape, stored.dtype)
        array[box] = stored
    else:
        array = array[..., 0]
    array = _as_labels(array, path) if kind == "labels" else finite_values(array, name, report)
    return Volume(array, Geometry.from_affine(affine, array.shape))


def read_channels(path: str | os.PathLike[str], *, report: Reporter = SILENT) -> list[Volume]:
    """A 4D file as one Volume per channel, in its order; a 3D file or DICOM folder gives one.

    Raises InvresError as `read_volume` does.
    """
    header = read_header(path)
    if header.count == 1:
        return [read_volume(path, report=report)]
    check_scalar(path, header)
    for sentence in header.warnings:
        report.warning(sentence, path=os.fspath(path))
    geometry = Geometry.from_affine(header.affine, header.shape)
    name = Path(path).name
    return [
        Volume(finite_values(channel, f"{name}, channel {index}", report), geometry)
        for index, channel in enumerate(read_voxels(header))
    ]


def write_volume(path: str | os.PathLike[str], volume: Volume, *, compress: bool = True) -> None:
    """Writes .nii, .nii.gz, .nrrd or .mha on the volume's own grid; complete or not at all. Folders are made.

    compress: for .nrrd and .mha (.nii never is, .nii.gz always).
    Raises InvresError for other endings and where the disk does not take the file.
    """
    write_image(path, volume.array, volume.geometry.affine, compress=compress)


def write_channels(path: str | os.PathLike[str], channels: Sequence[Volume], *, compress: bool = True) -> None:
    """Writes volumes of one grid as one 4D file, as `read_channels` reads it; otherwise as `write_volume`."""
    array = np.stack([channel.array for channel in channels])
    write_image(path, array, channels[0].geometry.affine, compress=compress)


def write_series(path: str | os.PathLike[str], array: np.ndarray, geometry: Geometry, time: TimeAxis) -> None:
    """Writes frames (T, D, H, W) of one grid as one 4D file; otherwise as `write_volume`."""
    write_image(path, array, geometry.affine, time=time)


def resample(
    volume: Volume,
    geometry: Geometry,
    *,
    interpolation: Literal["linear", "nearest", "label"] = "linear",
    outside: float = 0.0,
) -> Volume:
    """The volume at the voxel centres of `geometry`, in physical space; the same grid gives the array itself.

    "linear" returns float32 (float64 stays); "nearest" and "label" keep the type. "label" interpolates each label
    linearly and takes the largest, so borders stay smooth. outside: the value where the volume ends.
    """
    if volume.geometry.same_as(geometry, tolerance_mm=1e-6):
        return Volume(volume.array, geometry)
    if interpolation not in _INTERPOLATORS:
        raise InvresError(f"interpolation must be one of {', '.join(_INTERPOLATORS)}, got {interpolation!r}.")
    array = volume.array
    if interpolation == "linear" and array.dtype != np.float64:
        array = array.astype(np.float32, copy=False)
    grid = to_sitk(np.zeros((1, 1, 1), np.uint8), geometry.affine)
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(grid)
    resampler.SetSize(geometry.shape[::-1])
    resampler.SetInterpolator(_INTERPOLATORS[interpolation])
    resampler.SetDefaultPixelValue(outside)
    resampled = sitk.GetArrayFromImage(resampler.Execute(to_sitk(array, volume.geometry.affine)))
    return Volume(resampled.astype(array.dtype, copy=False), geometry)


_INTERPOLATORS = {
    "linear": sitk.sitkLinear,
    "nearest": sitk.sitkNearestNeighbor,
    "label": getattr(sitk, "sitkLabelLinear", sitk.sitkLabelGaussian),  # older SimpleITK has only the second
}


def _canonical_moves(direction: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The order of array axes that is nearest to canonical, and the axes (before ordering) to flip."""

    def agreement(order: tuple[int, ...]) -> float:
        return sum(abs(direction[world, axis]) for world, axis in zip(_WORLD_AXES, order, strict=True))

    order = max(itertools.permutations(range(3)), key=agreement)
    flipped = tuple(axis for world, axis in zip(_WORLD_AXES, order, strict=True) if direction[world, axis] < 0)
    return order, flipped


def check_scalar(path: str | os.PathLike[str], header: Header) -> None:
    """Raises InvresError for colours and vectors."""
    if header.components > 1:
        raise InvresError(
            f"{path} has {header.components} values per voxel (colour or vectors), but one is wanted.",
            hint="Export it as a grey-value volume, or each component as a file of its own.",
        )


def finite_values(array: np.ndarray, name: str, report: Reporter) -> np.ndarray:
    """`array` without NaN, infinities and what float32, which all is computed in, cannot hold; with a warning that says
    how many there were and where."""
    if array.dtype.kind != "f" or (usable := np.abs(array) <= np.finfo(np.float32).max).all():
        return array
    where = np.nonzero(~usable)
    smallest = array[usable].min() if usable.any() else array.dtype.type(0)
    box = ", ".join(f"{axis} {w.min()} to {w.max()}" for axis, w in zip(("k", "j", "i"), where, strict=True))
    report.warning(
        f"{name}: {len(where[0])} voxels are NaN, infinite or beyond 3.4e38 (slices {box}); they were set to the "
        f"smallest other value, {float(smallest):g}."
    )
    return np.where(usable, array, smallest)


def _as_labels(array: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """`array` in the smallest of uint8, uint16, int16, int32 that holds it."""
    if array.dtype.kind == "f":
        fractional = array != np.round(array)  # also true for NaN
        if fractional.any() or np.isinf(array).any():
            example = float(array[fractional][0]) if fractional.any() else float("inf")
            raise InvresError(
                f"{path} is no label map: labels are whole numbers, but {np.count_nonzero(fractional)} voxels have "
                f"others, such as {example:g}.",
                hint="Give the label file, not an image or a probability map; resample labels with nearest neighbour.",
            )
    low, high = int(array.min()), int(array.max())
    for dtype in (np.uint8, np.uint16, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype, copy=False)
    raise InvresError(f"{path} is no label map: its values reach from {low} to {high}, more than 32 bits hold.")


def _three(values: Any) -> tuple[Any, Any, Any]:
    first, second, third = values
    return first, second, third


def _by(numbers: tuple[float, ...]) -> str:
    return "x".join(f"{number:.4g}" for number in numbers)
