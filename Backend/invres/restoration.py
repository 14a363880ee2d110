"""The way back: from a prepared grid to exactly the grid of the original files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .config import LabelScheme
from .volume import Geometry

__all__ = ["restore_probabilities", "restore_uncertainty", "restore_volume"]

# Slabs of the restored grid are made of about this many voxels.
SLAB_VOXELS = 1_000_000


def restore_probabilities(
    probabilities: np.ndarray, prepared_geometry: Geometry, original: Geometry, scheme: LabelScheme
) -> np.ndarray:
    """Labels in file values on the original grid (D, H, W), from probabilities (K, d, h, w) on the prepared grid.

    Linear interpolation, then the most probable class (the first of equals), or for regions every region above 0.5
    with later ones overwriting earlier ones. Outside the crop is background. uint8, or the next wider type that the
    output values need. Slab by slab and class by class, so beside the result only a few slabs live.
    Raises ValueError for grids that do not belong together.
    """
    if len(probabilities) != scheme.out_channels:
        raise ValueError(f"{scheme.out_channels} probability maps are wanted, got {len(probabilities)}.")
    outputs = [label.output_value for label in scheme.labels]
    whole = np.min_scalar_type(max([0, *outputs])) if min([0, *outputs]) >= 0 else np.dtype(np.int32)
    grid = _Return(prepared_geometry, original)
    result = np.zeros(grid.canonical.shape, dtype=whole)
    for slab, target in grid.slabs():
        labels = np.zeros(grid.slab_shape(slab), dtype=whole)
        if scheme.regions:
            for value, region in zip(outputs, probabilities, strict=True):
                labels[grid.interpolate(region, slab) > 0.5] = value
        else:
            highest = grid.interpolate(probabilities[0], slab)
            for value, probability in zip(outputs, probabilities[1:], strict=True):
                candidate = grid.interpolate(probability, slab)
                better = candidate > highest
                labels[better] = value
                np.maximum(highest, candidate, out=highest)
        result[target] = labels
    return grid.to_original(result)


def restore_volume(
    array: np.ndarray, prepared_geometry: Geometry, original: Geometry, outside: float = 0.0
) -> np.ndarray:
    """One map (d, h, w) of the prepared grid as float32 (D, H, W) on the original grid; `outside` beyond the crop.

    Linear interpolation; for writing probabilities. Raises ValueError for grids that do not belong together.
    """
    grid = _Return(prepared_geometry, original)
    result = np.full(grid.canonical.shape, outside, dtype=np.float32)
    for slab, target in grid.slabs():
        result[target] = grid.interpolate(array, slab)
    return grid.to_original(result)


def restore_uncertainty(
    probabilities: np.ndarray, labels: np.ndarray, prepared_geometry: Geometry, original: Geometry, regions: bool
) -> np.ndarray:
    """How likely the label of each voxel is to be wrong, as the network has it: float32 (D, H, W) on the original grid.

    probabilities: (K, d, h, w) on the prepared grid. labels: (D, H, W), as `restore_probabilities` made them of these;
    what was set to 0 since counts as background. 1 minus the probability of the label, which is the largest, from 0 to
    1 - 1 / K, but where it was set to 0; there, up to 1. For regions, of which nothing is set to 0, 1 minus the
    probability of the answer, inside or outside, of the region that is least sure, from 0 to 0.5. 0 beyond the crop,
    which is background. Taken from the interpolated maps, as the labels are, slab by slab.
    Raises ValueError for grids that do not belong together.
    """
    grid = _Return(prepared_geometry, original)
    labels = grid.from_original(labels)
    result = np.zeros(grid.canonical.shape, dtype=np.float32)
    for slab, target in grid.slabs():
        labelled = labels[target] != 0
        surest = np.full(grid.slab_shape(slab), 1.0 if regions else 0.0, dtype=np.float32)
        for place, probability in enumerate(probabilities):
            found = grid.interpolate(probability, slab)
            if regions:
                np.minimum(surest, np.maximum(found, 1 - found), out=surest)
            else:
                np.maximum(surest, found, out=surest, where=labelled if place else True)
        result[target] = 1 - surest
    return grid.to_original(result)


class _Return:
    """The way of voxels from a prepared grid to the original one.

    Both are parallel, as prepare only permutes, flips, crops and rescales; so interpolation works axis by axis.
    Per axis: `first` voxel of the canonical original grid inside the crop, and for each voxel from there the index of
    its lower neighbour in the prepared grid and the weight of the upper one.
    """

    def __init__(self, prepared: Geometry, original: Geometry):
        self.canonical = original.canonical()
        if not np.allclose(prepared.direction, self.canonical.direction, atol=1e-4):
            raise ValueError("The prepared grid is not parallel to the canonical original grid.")
        cosines = np.asarray(self.canonical.direction).T @ np.asarray(original.direction)
        self._order = [int(axis) for axis in np.abs(cosines).argmax(axis=1)]
        self._flips = [axis for axis, source in enumerate(self._order) if cosines[axis, source] < 0]
        # Solving for the axes also serves directions that are not quite orthogonal.
        start_mm = np.linalg.solve(
            np.asarray(self.canonical.direction), np.asarray(prepared.origin_mm) - np.asarray(self.canonical.origin_mm)
        )
        self.first, self._lower, self._weight = [], [], []
        for axis in range(3):
            size, fine = prepared.shape[axis], self.canonical.spacing_mm[axis]
            scale = prepared.spacing_mm[axis] / fine
            start = start_mm[axis] / fine
            first, last = _cropped_range(start, size, scale, self.canonical.shape[axis])
            position = (np.arange(first, last) - start) / scale
            # A voxel centre found by float arithmetic must hit its own voxel exactly.
            nearest = np.rint(position)
            position = np.where(np.abs(position - nearest) < 1e-3, nearest, position).clip(0, size - 1)
            lower = np.minimum(position.astype(np.int64), max(size - 2, 0))
            self.first.append(first)
            self._lower.append(lower)
            self._weight.append((position - lower).astype(np.float32))
        if not all(len(lower) for lower in self._lower):
            raise ValueError("The prepared grid lies outside the original grid.")

    def slab_shape(self, slab: slice) -> tuple[int, int, int]:
        return slab.stop - slab.start, len(self._lower[1]), len(self._lower[2])

    def slabs(self) -> Iterator[tuple[slice, tuple[slice, slice, slice]]]:
        """Slabs along D, and where each lies in the canonical original array."""
        depth, height, width = (len(lower) for lower in self._lower)
        step = max(1, SLAB_VOXELS // (height * width))
        d, h, w = self.first
        for start in range(0, depth, step):
            stop = min(start + step, depth)
            yield slice(start, stop), (slice(d + start, d + stop), slice(h, h + height), slice(w, w + width))

    def interpolate(self, array: np.ndarray, slab: slice) -> np.ndarray:
        """A slab of one map (d, h, w) on the original grid, float32."""
        lower, weight = self._lower[0][slab], self._weight[0][slab]
        planes = slice(int(lower.min()), int(lower.max()) + 2)
        part = _along(np.asarray(array[planes], dtype=np.float32), 0, lower - planes.start, weight)
        for axis in (1, 2):
            part = _along(part, axis, self._lower[axis], self._weight[axis])
        return part

    def from_original(self, array: np.ndarray) -> np.ndarray:
        """The way back from `to_original`, as a view."""
        return np.flip(array.transpose(self._order), tuple(self._flips))

    def to_original(self, array: np.ndarray) -> np.ndarray:
        """A canonical array in the axis order and direction of the original grid."""
        return np.ascontiguousarray(np.flip(array, tuple(self._flips)).transpose(np.argsort(self._order)))


def _cropped_range(start: float, size: int, scale: float, whole: int) -> tuple[int, int]:
    """The voxels first..last-1, of an axis of `whole`, that were cropped before `size` voxels were made of them.

    start: the first prepared voxel's centre, scale: the prepared spacing, both in voxels. The crop has the prepared
    field of view's centre and a length that was rounded to `size`; of several lengths the longest is taken, so that
    no voxel of the crop is lost (and none further than half a prepared voxel outside it is gained).
    """
    ends = round(2 * start + (size - 1) * scale)
    length = int((size + 0.5) * scale + 1e-3)
    length -= (length + ends + 1) % 2
    first = (ends - length + 1) // 2
    return max(first, 0), min(first + length, whole)


def _along(array: np.ndarray, axis: int, lower: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Linear interpolation along one axis between voxel `lower` and the next; exact where weights are 0 or 1."""
    whole = (weight == 0) | (weight == 1)
    if whole.all():
        return array.take(lower + weight.astype(np.int64), axis=axis)
    shape = [1, 1, 1]
    shape[axis] = -1
    upper = weight.reshape(shape)
    result = array.take(lower, axis=axis)
    result *= 1 - upper
    result += array.take(np.minimum(lower + 1, array.shape[axis] - 1), axis=axis) * upper
    return result
