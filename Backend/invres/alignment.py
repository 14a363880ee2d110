"""The channels of a case on the grid of its first one, by what their headers say; nothing is registered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from . import InvresError
from .volume import Geometry, Volume, resample

__all__ = [
    "IMAGE_TOLERANCE_MM",
    "LABEL_TOLERANCE_MM",
    "LEAST_OVERLAP",
    "align_channels",
    "check_label_place",
    "overlap",
    "resampled_sentence",
    "same_place",
]

# Headers are stored in float32 at best; label tools round origins a little more.
IMAGE_TOLERANCE_MM = 1e-3
LABEL_TOLERANCE_MM = 1e-2
LEAST_OVERLAP = 0.5
"""Part of the first image that another one must cover; below it the panel warns before it aligns."""
SAMPLES = 16  # along each axis of a box, to measure what two have in common


def align_channels(
    volumes: Sequence[Volume | None], names: Sequence[str], case: str = ""
) -> tuple[list[Volume | None], list[str]]:
    """The volumes of a case, None for a channel that it lacks, on the grid of the first that is there; and the names of
    those that were resampled.

    Linear, without smoothing, and the volume's smallest value where it ends, as *Align to reference* in the panel. One
    that has the first one's voxels already is left as it is, however its axes are stored.
    Raises InvresError for a volume that covers less than half of the first one.
    """
    there = [(name, volume) for name, volume in zip(names, volumes, strict=True) if volume is not None]
    if not there:
        return list(volumes), []
    first, grid = there[0][0], there[0][1].geometry
    moved = [name for name, volume in there[1:] if not same_place(grid, volume.geometry, IMAGE_TOLERANCE_MM)]
    for name, volume in there:
        if name in moved and (part := overlap(grid, volume.geometry)) < LEAST_OVERLAP:
            covers = f"covers only {max(1, round(100 * part))} % of" if part else "does not overlap"
            raise InvresError(
                f"{name} of {f'the case {case}' if case else 'this case'} {covers} {first}, so it cannot be resampled "
                "to its grid.",
                hint="See whether both are of one examination; what moved in between has to be registered first.",
                code="grid_mismatch",
            )
    aligned = [
        resample(volume, grid, outside=float(volume.array.min())) if volume is not None and name in moved else volume
        for name, volume in zip(names, volumes, strict=True)
    ]
    return aligned, moved


def check_label_place(label: Volume, volumes: Sequence[Volume | None], names: Sequence[str], case: str) -> None:
    """Raises InvresError for a label map drawn on another channel than the first: label maps are never resampled."""
    there = [(name, volume) for name, volume in zip(names, volumes, strict=True) if volume is not None]
    drawn_on = [name for name, volume in there if same_place(volume.geometry, label.geometry, LABEL_TOLERANCE_MM)]
    if drawn_on and there[0][0] not in drawn_on:
        raise InvresError(
            f"The label of the case {case} lies on the grid of {drawn_on[0]}, and the other channels are brought to "
            f"that of {there[0][0]}, the first one.",
            hint=f"Label maps are not resampled: name {drawn_on[0]} first among the channels of a dataset.json.",
            code="label_grid_mismatch",
        )


def same_place(grid: Geometry, other: Geometry, tolerance_mm: float) -> bool:
    """Whether two grids have the same voxels, in whatever order of axes and direction each is stored."""
    return grid.same_as(other, tolerance_mm) or grid.canonical().same_as(other.canonical(), tolerance_mm)


def overlap(grid: Geometry, other: Geometry) -> float:
    """Part (0 to 1) of the box of a grid that lies inside the box of another one."""
    axes = [(np.arange(SAMPLES) + 0.5) / SAMPLES * size - 0.5 for size in grid.shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    world = points @ grid.affine[:3, :3].T + grid.origin_mm
    voxels = np.linalg.solve(other.affine[:3, :3], (world - other.origin_mm).T).T
    return float(((voxels >= -0.5) & (voxels <= np.array(other.shape) - 0.5)).all(axis=1).mean())


def resampled_sentence(cases: Sequence[Sequence[str]]) -> str:
    """What was resampled, from the names of such channels in each case; "" where nothing was."""
    counts = Counter(name for names in cases for name in names)
    if not counts:
        return ""
    told = [name if len(cases) == 1 else f"{name} in {count} of {len(cases)} cases" for name, count in counts.items()]
    return (
        f"Resampled to the grid of the first channel by what the headers say, without registration: {', '.join(told)}."
    )
