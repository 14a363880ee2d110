"""A region of interest: a box in RAS mm to which the work is cut down, and outside of which nothing is found."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from . import InvresError
from .alignment import IMAGE_TOLERANCE_MM
from .preprocessing import PreparedCase
from .volume import Geometry, Volume

__all__ = ["Bounds", "are_left_and_right", "clear_outside", "crop_to_region", "cut_out", "region_shape"]

Bounds = tuple[float, ...]
Box = tuple[slice, slice, slice]
Triple = tuple[int, int, int]
BESIDE_MM = 10.0


def are_left_and_right(boxes: Sequence[Bounds]) -> bool:
    """Whether these are two boxes of which the second lies beside the first, to its right, rather than elsewhere."""
    if len(boxes) != 2:
        return False
    first, second = (np.reshape(box, (3, 2)).mean(axis=1) for box in boxes)
    apart = second - first
    return bool(apart[0] > BESIDE_MM and apart[0] > np.abs(apart[1:]).max())


def crop_to_region(prepared: PreparedCase, bounds: Bounds, window: Triple) -> PreparedCase:
    """The part of a prepared case that the network has to see to segment the box.

    bounds: (R0, R1, A0, A1, S0, S1) in mm. A quarter of the window is kept around the box, and at least a whole window
    where the volume has one, so that borders are not seen by the network as the end of the body. Intensities were
    scaled by the whole volume before, so they do not depend on the box.
    Raises InvresError where the box holds nothing of the case.
    """
    first, last = _index_box(prepared.geometry, bounds)
    if (first >= prepared.geometry.shape).any() or (last < 0).any():
        raise InvresError(
            "The region of interest lies outside the volume, or in its empty border.",
            hint="Move the region over the part to segment, or switch it off.",
            code="empty_region",
        )
    box = tuple(
        _with_context(max(int(a), 0), min(int(b) + 1, size), side, size)
        for a, b, side, size in zip(first, last, window, prepared.geometry.shape, strict=True)
    )
    part = (slice(None), *box)
    return dataclasses.replace(
        prepared,
        image=np.ascontiguousarray(prepared.image[part]),
        geometry=prepared.geometry.crop(box),  # type: ignore[arg-type]
    )


def cut_out(volumes: Sequence[Volume | None], bounds: Bounds) -> tuple[list[Volume | None], Box]:
    """The volumes as if only the box had been acquired, and where in them it lies (slices).

    volumes: on one grid, which each may have in an order of axes of its own; None stays None. The slices are of the
    first. Raises InvresError where the box lies outside.
    """
    grid = next(volume.geometry for volume in volumes if volume is not None)
    first, last = _index_box(grid, bounds)
    if (first >= grid.shape).any() or (last < 0).any():
        raise InvresError(
            "The region of interest lies outside the volume.",
            hint="Move the region over the part to segment, or switch it off.",
            code="empty_region",
        )
    boxes = [None if volume is None else _slices(volume.geometry, grid, bounds) for volume in volumes]
    parts: list[Volume | None] = [
        None
        if volume is None or box is None
        else Volume(np.ascontiguousarray(volume.array[box]), volume.geometry.crop(box))
        for volume, box in zip(volumes, boxes, strict=True)
    ]
    return parts, _slices(grid, grid, bounds)


def region_shape(box: Triple, whole: Triple, window: Triple) -> Triple:
    """Voxels that `crop_to_region` keeps, at most, for a box of these sizes somewhere in the volume."""
    sizes = (min(w, max(b + 2 * (s // 4), s)) for b, w, s in zip(box, whole, window, strict=True))
    return tuple(sizes)  # type: ignore[return-value]


def clear_outside(array: np.ndarray, geometry: Geometry, bounds: Bounds, value: float = 0) -> None:
    """Sets voxels (D, H, W) whose centre lies outside the box to `value`, in place."""
    affine = geometry.affine
    depth, height, width = geometry.shape
    in_plane = [
        affine[axis, 1] * np.arange(height)[:, None] + affine[axis, 2] * np.arange(width)[None] for axis in range(3)
    ]
    # A voxel centre on the wall is inside, whatever the rounding.
    slack_mm = 1e-4
    for index in range(depth):
        outside = np.zeros((height, width), dtype=bool)
        for axis in range(3):
            position = in_plane[axis] + (affine[axis, 0] * index + affine[axis, 3])
            low, high = bounds[2 * axis] - slack_mm, bounds[2 * axis + 1] + slack_mm
            outside |= (position < low) | (position > high)
        array[index][outside] = value


def _slices(geometry: Geometry, first: Geometry, bounds: Bounds) -> Box:
    """Of the voxels in a box; of a grid that is the first one but for rounding, the same ones as there."""
    grid = first if first.same_as(geometry, tolerance_mm=IMAGE_TOLERANCE_MM) else geometry
    low, high = _index_box(grid, bounds)
    d, h, w = (slice(max(int(a), 0), min(int(b) + 1, size)) for a, b, size in zip(low, high, grid.shape, strict=True))
    return d, h, w


def _index_box(geometry: Geometry, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """First and last voxel (may lie outside the grid) of the smallest index box around the box in mm."""
    ends = np.array(list(itertools.product(bounds[0:2], bounds[2:4], bounds[4:6])))
    affine = geometry.affine
    index = np.linalg.solve(affine[:3, :3], (ends - affine[:3, 3]).T).T
    return np.floor(index.min(axis=0) + 1e-3).astype(int), np.ceil(index.max(axis=0) - 1e-3).astype(int)


def _with_context(start: int, stop: int, window: int, size: int) -> slice:
    start, stop = max(0, start - window // 4), min(size, stop + window // 4)
    missing = min(window, size) - (stop - start)
    if missing > 0:
        start = min(max(0, start - missing // 2), size - min(window, size))
        stop = max(stop, start + min(window, size))
    return slice(start, stop)
