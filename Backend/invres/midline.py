"""Left and right of a label map: its mid-sagittal plane is the one that mirrors the labels best."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .config import LabelScheme
from .events import SILENT, Reporter
from .preprocessing import nonzero_box
from .sides import Side
from .volume import Volume

__all__ = ["Mirror", "Plane", "best_mirror", "divided", "find_midline", "join_sides", "likeness_at", "on_one_side"]

ALIKE = 0.48  # the least likeness of two halves: real ones reach 0.7, planes through one hemisphere 0.45
BESIDE_MM = 10.0  # an image that is to tell the middle by its axis shows so much on either side of it
NARROWEST_MM = 25.0  # both sides together; less is one side alone, which is its own mirror image, too
ONE_SIDE_MM = 90.0  # one side alone is no wider
NO_WORSE = 0.25  # so far what lies in the middle may be from its best likeness
NEAR_MM = 6.0  # so far a piece of one side may reach beyond a plane that is a little off

# A head may be turned and tilted in the scanner by so much, and shown so much more on one side than on the other.
ANGLES = np.radians(np.arange(-36, 37, 12))
OFFSETS_MM = np.arange(-36, 37, 6.0)
POINTS = (30, 80, 250)  # of each label: for all planes, for the best of them, and to place the one that is taken
STARTS = 3
Place = Sequence[float] | np.ndarray
STEPS = np.array([[0, 0, 0], [0.1, 0, 0], [0, 0.1, 0], [0, 0, 4.0]])  # of turn, tilt (radians) and offset (mm)
THIN_MM = 2.0
LEAST_POINTS = 20  # of a label that has a say
UPRIGHT = 0.1  # what a radian of turn or tilt costs: what is round gives no direction of its own
UNSEEN = 0.3  # what a point counts for whose mirror image lies beyond the volume: about as much as by chance


@dataclass(frozen=True)
class Plane:
    """turn, tilt: of its normal, which points to the right, towards anterior and superior, in radians.
    offset_mm: along the normal, from the origin of the world."""

    turn: float
    tilt: float
    offset_mm: float

    @property
    def normal(self) -> np.ndarray:
        """RAS unit vector."""
        return _normal(self.turn, self.tilt)

    def distance_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Of points (..., 3) in RAS; positive on the right."""
        return points_mm @ self.normal - self.offset_mm


@dataclass(frozen=True)
class Mirror:
    """likeness: the part of a label's voxels with their like on the other side, from 0 to 1, in the mean over labels;
    a little less where the plane is turned.
    width_mm: of all of them, across the plane."""

    plane: Plane
    likeness: float
    width_mm: float


def divided(labels: Volume, scheme: LabelScheme, sides: Sequence[Side], report: Reporter = SILENT) -> Volume | None:
    """The label map with the values of left and right for the labels that have sides, by `sided_scheme`.

    labels: integers (D, H, W), with the output values of `scheme`.
    Without a midline, what lies clearly on one side of the scanner's own middle is taken to be on that side. Otherwise
    None: nobody can say. Both are told as a warning. Voxels without a label stay 0.
    """
    values = {label.name: label.output_value for label in scheme.labels}
    most = max([int(labels.array.max()), *(value for side in sides for value in (side.left_value, side.right_value))])
    found = labels.array.astype(np.promote_types(labels.array.dtype, np.min_scalar_type(most)))
    box = nonzero_box([labels.array])
    inside = labels.array[box]
    places = dict(enumerate(ndimage.find_objects(inside), start=1))
    used = [side for side in sides if places.get(values[side.label]) is not None]
    if not used:
        return Volume(found, labels.geometry)
    plane = find_midline(labels, scheme, sides)
    if plane is None:
        plane = _scanners_middle(labels, [values[side.label] for side in used])
        if plane is None:
            report.warning("Left and right could not be told apart in this image, so each structure has both in one.")
            return None
        report.warning(
            "The image shows no midline, so left and right were told by the scanner's axis alone: check the side."
        )
    geometry = labels.geometry.crop(box)
    slope, start = plane.normal @ geometry.affine[:3, :3], float(plane.distance_mm(geometry.affine[:3, 3]))
    along = [
        np.float32(part) * np.arange(size, dtype=np.float32) for part, size in zip(slope, inside.shape, strict=True)
    ]
    distance = np.float32(start) + along[0][:, None, None] + along[1][:, None] + along[2]
    for side in used:
        part = places[values[side.label]]
        mask = inside[part] == values[side.label]
        right = _right(mask, distance[part])
        found[box][part][mask] = np.where(right, side.right_value, side.left_value)
    return Volume(found, labels.geometry)


def _right(mask: np.ndarray, distance_mm: np.ndarray) -> np.ndarray:
    """Which voxels of a structure, those of the mask in their order, are on the right. A piece that reaches only a
    little beyond the plane is on one side as a whole."""
    pieces, count = ndimage.label(mask)
    piece, distance = pieces[mask], distance_mm[mask]
    right = distance > 0
    voxels, on_right, far_right, far_left = (
        np.bincount(piece[which], minlength=count + 1)
        for which in (slice(None), right, distance > NEAR_MM, distance < -NEAR_MM)
    )
    to_right = (2 * on_right > voxels) & (far_left == 0)
    to_left = (2 * on_right <= voxels) & (far_right == 0)
    return (right | to_right[piece]) & ~to_left[piece]


def join_sides(labels: np.ndarray, scheme: LabelScheme, sides: Sequence[Side]) -> None:
    """Gives left and right of a label map the value of their label again, in place."""
    values = {label.name: label.output_value for label in scheme.labels}
    masks = [(values[side.label], np.isin(labels, (side.left_value, side.right_value))) for side in sides]
    for value, mask in masks:
        labels[mask] = value


def on_one_side(labels: np.ndarray, scheme: LabelScheme, sides: Sequence[Side], right: bool) -> np.ndarray:
    """A label map (file values) of which all that has sides lies on one of them, with that side's values."""
    values = {label.name: label.output_value for label in scheme.labels}
    of_side = {values[side.label]: side.right_value if right else side.left_value for side in sides}
    most = max([int(labels.max(initial=0)), *of_side.values()])
    found = labels.astype(np.promote_types(labels.dtype, np.min_scalar_type(most)))
    for value, sided in of_side.items():
        found[labels == value] = sided
    return found


def find_midline(labels: Volume, scheme: LabelScheme, sides: Sequence[Side]) -> Plane | None:
    """The plane between left and right; None where the labels do not show it.

    Where much of one side is lacking, what lies in the middle (third ventricle, brain stem) still tells.
    """
    sided = {side.label for side in sides}
    between = [label.output_value for label in scheme.labels if label.name not in sided]
    middle = best_mirror(labels, between)
    whole = best_mirror(labels, [label.output_value for label in scheme.labels])
    if whole is not None and whole.likeness >= ALIKE and whole.width_mm >= NARROWEST_MM:
        plane = whole.plane
        if middle is None or middle.likeness < ALIKE:
            return plane
        # One side alone may have a plane of its own, but that does not lie in the middle.
        if likeness_at(plane, labels, between) > middle.likeness - NO_WORSE:
            return plane
    return middle.plane if middle is not None and middle.likeness >= ALIKE else None


def _scanners_middle(labels: Volume, values: Sequence[int]) -> Plane | None:
    """The plane through the world's origin, if the image lies on both sides of it and all of these values clearly on
    one. Many files, as those of the Decathlon, begin at the origin and say nothing of where the head's middle is."""
    affine = labels.geometry.affine
    corners = np.array(list(itertools.product(*((0, size - 1) for size in labels.array.shape))))
    ends_mm = corners @ affine[0, :3] + affine[0, 3]
    if ends_mm.min() > -BESIDE_MM or ends_mm.max() < BESIDE_MM:
        return None
    places = np.argwhere(np.isin(labels.array, values))
    across_mm = places @ affine[0, :3] + affine[0, 3]
    one_sided = across_mm.max() < 0 or across_mm.min() > 0
    return Plane(0.0, 0.0, 0.0) if one_sided and np.ptp(across_mm) < ONE_SIDE_MM else None


def best_mirror(labels: Volume, values: Sequence[int]) -> Mirror | None:
    """The plane that mirrors these values best; None where there is next to nothing of them.

    A head may be turned or tilted by up to 40 degrees in the world; axes and voxels of the volume may be any.
    """
    most, some, few = (_Samples(labels, values, count) for count in reversed(POINTS))
    if not len(few.points_mm):
        return None
    starts = []
    for turn in ANGLES:
        for tilt in ANGLES:
            middle = float(np.median(few.points_mm @ _normal(turn, tilt)))
            starts += [(few.likeness(start), start) for away in OFFSETS_MM if (start := (turn, tilt, middle + away))]
    best = sorted(starts, reverse=True)[:STARTS]
    rough = max((_climbed(some, start, STEPS) for _, start in best), key=most.likeness)
    turn, tilt, offset = (float(number) for number in _climbed(most, rough, STEPS / 4))
    plane = Plane(turn, tilt, offset)
    return Mirror(plane, most.likeness((turn, tilt, offset)), float(np.ptp(plane.distance_mm(most.points_mm))))


def likeness_at(plane: Plane, labels: Volume, values: Sequence[int]) -> float:
    """How well a plane mirrors these values, as `Mirror` has it."""
    return _Samples(labels, values, POINTS[-1]).likeness((plane.turn, plane.tilt, plane.offset_mm))


def _climbed(samples: _Samples, start: Place, steps: np.ndarray) -> np.ndarray:
    from scipy.optimize import minimize  # long to import, and few models have sides

    options = {"initial_simplex": np.asarray(start) + steps, "maxfev": 60, "xatol": 1e-3, "fatol": 1e-4}
    found: np.ndarray = minimize(lambda at: -samples.likeness(at), start, method="Nelder-Mead", options=options).x
    return found


def _normal(turn: float, tilt: float) -> np.ndarray:
    """The axis to the right, turned towards anterior and tilted towards superior."""
    return np.array([np.cos(turn) * np.cos(tilt), np.sin(turn) * np.cos(tilt), np.sin(tilt)])


class _Samples:
    """Points of each label, spread evenly over it, and what lies at their mirror images."""

    def __init__(self, labels: Volume, values: Sequence[int], count: int):
        step = [max(1, int(THIN_MM / size)) for size in labels.geometry.spacing_mm]
        thin = labels.array[:: step[0], :: step[1], :: step[2]]
        places = np.flatnonzero(thin)
        there = thin.ravel()[places]
        chosen = []
        for value in values:
            own = places[there == value]
            if len(own) >= LEAST_POINTS:
                chosen.append(own[np.linspace(0, len(own) - 1, min(len(own), count)).astype(int)])
        self._array, self._affine = labels.array, labels.geometry.affine
        self._inverse = np.linalg.inv(self._affine)
        flat = np.concatenate(chosen) if chosen else np.empty(0, int)
        index = np.unravel_index(flat, thin.shape)
        self._values = thin[index]
        # Each label counts as much as any other: the small ones say best where the middle is.
        self._weights = np.concatenate([np.full(len(own), 1 / len(own) / len(chosen)) for own in chosen] or [flat])
        self._index = np.stack([*(np.array(step) * np.transpose(index)).T, np.ones(len(flat))])

    @property
    def points_mm(self) -> np.ndarray:
        """(n, 3), RAS."""
        return (self._affine @ self._index)[:3].T

    def likeness(self, at: Place) -> float:
        """at: turn, tilt and offset of a plane."""
        normal, mirror = _normal(at[0], at[1]), np.eye(4)
        mirror[:3, :3] -= 2 * np.outer(normal, normal)
        mirror[:3, 3] = 2 * at[2] * normal
        d, h, w = np.rint((self._inverse @ mirror @ self._affine)[:3] @ self._index).astype(np.intp)
        depth, height, width = self._array.shape
        seen = (d >= 0) & (d < depth) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        same = self._array[d * seen, h * seen, w * seen] == self._values
        return float(self._weights @ np.where(seen, same, UNSEEN)) - UPRIGHT * (at[0] ** 2 + at[1] ** 2)
