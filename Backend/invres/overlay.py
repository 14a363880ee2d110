"""Pictures that a person judges a segmentation by: three planes, labels in colour, a legend, scores in the title."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import InvresError
from .config import LabelScheme
from .files import written_whole
from .volume import Volume

__all__ = ["draw_overlay"]

OPACITY = 0.45


def draw_overlay(
    path: Path, image: Volume, rows: Sequence[tuple[str, np.ndarray]], scheme: LabelScheme, title: str
) -> Path:
    """Writes a PNG: the plain image on top, then one row for each (caption, label map (D, H, W) in file values).

    Sagittal, coronal and axial planes through the middle of the labels, in radiological view (the patient's right is
    on the picture's left), in mm. Raises InvresError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise InvresError(
            "Pictures need the package matplotlib, which is not installed.", hint="Run `pip install matplotlib`."
        ) from None
    base = image.canonical()
    maps = [("Image", None), *((caption, Volume(labels, image.geometry).canonical().array) for caption, labels in rows)]
    centre = _centre(next((m for _, m in maps if m is not None and m.any()), base.array))
    low, high = np.percentile(base.array[base.array > base.array.min()], (1, 99.5))
    colours = {label.output_value: np.array(label.colour or (230, 75, 60)) / 255 for label in scheme.labels}
    figure = Figure(figsize=(10, 3.15 * len(maps) + 0.9), dpi=110, facecolor="black", layout="constrained")
    axes = figure.subplots(len(maps), 3, squeeze=False)
    spacing_mm = base.geometry.spacing_mm
    for row, (caption, labels) in zip(axes, maps, strict=True):
        for axis, plane in zip(row, _PLANES, strict=True):
            grey = np.clip((_cut(base.array, plane, centre) - low) / (high - low), 0, 1)
            picture = np.repeat(grey[..., None], 3, axis=2)
            if labels is not None:
                cut = _cut(labels, plane, centre)
                for value, colour in colours.items():
                    picture[cut == value] = (1 - OPACITY) * picture[cut == value] + OPACITY * colour
            vertical, horizontal = (spacing_mm[a] for a in plane.axes)
            axis.imshow(picture, aspect=vertical / horizontal, interpolation="nearest")
            axis.set_axis_off()
            axis.text(0.02, 0.5, plane.left, transform=axis.transAxes, color="white", va="center", fontsize=9)
            axis.text(
                0.98, 0.5, plane.right, transform=axis.transAxes, color="white", va="center", ha="right", fontsize=9
            )
        row[1].set_title(caption, color="white", fontsize=10)
    figure.suptitle(title, color="white", fontsize=12)
    patches = [Patch(color=tuple(colours[label.output_value]), label=label.name) for label in scheme.labels]
    columns, size = (len(patches), 10) if len(patches) < 6 else (5, 8)  # so that long names fit
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=size, frameon=False)
    for text in legend.get_texts():
        text.set_color("white")
    with written_whole(path) as temporary:
        figure.savefig(temporary)
    return path


class _Plane:
    """A cut along array axis `fixed`; picture rows run along axes[0], both axes flipped."""

    def __init__(self, fixed: int, axes: tuple[int, int], left: str, right: str):
        self.fixed, self.axes, self.left, self.right = fixed, axes, left, right


# Canonical arrays run superior, anterior, right.
_PLANES = (
    _Plane(2, (0, 1), "A", "P"),
    _Plane(1, (0, 2), "R", "L"),
    _Plane(0, (1, 2), "R", "L"),
)


def _cut(array: np.ndarray, plane: _Plane, centre: tuple[int, ...]) -> np.ndarray:
    return np.take(array, centre[plane.fixed], axis=plane.fixed)[::-1, ::-1]


def _centre(labels: np.ndarray) -> tuple[int, ...]:
    """The voxel in the middle of the labelled box."""
    found = np.argwhere(labels != labels.min())
    return tuple(int(c) for c in (found.min(axis=0) + found.max(axis=0)) // 2)
