"""Whether a segmentation is the same as one in a file: voxel by voxel, and where not, the Dice of each label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .config import LabelScheme
from .files import SEGMENTATION
from .metrics import dice_by_label
from .segmentation import Segmentation
from .segmentation_file import segment_layers
from .volume import read_geometry, read_volume

__all__ = ["Agreement", "compare"]


@dataclass(frozen=True)
class Agreement:
    """voxels: of the grid; different: those where any label is another one. dice: by label, 1 where both are empty.

    other_grid: how the grids differ, in words, "" where they do not; then nothing else is known."""

    voxels: int
    different: int
    dice: dict[str, float]
    other_grid: str = ""

    @property
    def same(self) -> bool:
        """Voxel by voxel, on the same grid."""
        return not self.different and not self.other_grid


def compare(stored: Path, found: Segmentation) -> Agreement:
    """found against the segmentation in a file: labels by their names in a .seg.nrrd, by their values elsewhere.

    Raises InvresError for a file that cannot be read, or is no label map.
    """
    grid = found.labels.geometry
    if differs := read_geometry(stored).difference(grid):
        return Agreement(found.array.size, 0, {}, differs)
    now = _Masks(found.array[..., None], _values_of(found.scheme))
    if stored.name.lower().endswith(SEGMENTATION):
        layers, where = segment_layers(stored)
        before = _Masks(layers, {name: (layer, (value,)) for name, (layer, value) in where.items()})
    else:
        before = _Masks(read_volume(stored, kind="labels").array[..., None], _values_of(found.scheme))
    different = np.zeros(grid.shape, bool)
    dice = {}
    for name in dict.fromkeys([*now.where, *before.where]):
        one, other = now.of(name), before.of(name)
        different |= one != other
        dice[name] = dice_by_label(one[None], other[None])[0]
    # A value that no label has is none of theirs.
    different |= now.beyond() != before.beyond()
    return Agreement(different.size, int(different.sum()), dice)


@dataclass(frozen=True)
class _Masks:
    """Masks of labels, made one at a time. layers: (D, H, W, layers). where: name -> layer and values."""

    layers: np.ndarray
    where: dict[str, tuple[int, tuple[int, ...]]]

    def of(self, name: str) -> np.ndarray:
        if name not in self.where:
            return np.zeros(self.layers.shape[:3], bool)
        layer, values = self.where[name]
        return np.isin(self.layers[..., layer], values)

    def beyond(self) -> np.ndarray:
        """Voxels with a value that no label has."""
        known = sorted({0, *(value for _, values in self.where.values() for value in values)})
        return np.asarray((~np.isin(self.layers, known)).any(axis=-1))


def _values_of(scheme: LabelScheme) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {label.name: (0, label.values if scheme.regions else (label.output_value,)) for label in scheme.labels}
