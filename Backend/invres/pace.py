"""What segmentations of this process have taken: how fast, and how many windows. The plan of the next one asks."""

from __future__ import annotations

import numpy as np

from .volume import Geometry

__all__ = ["remember_speed", "remember_windows", "speed_of", "windows_of"]

Triple = tuple[int, int, int]

# Seconds per voxel of a window, by weights and device; of the last run or probe.
_SPEED: dict[tuple[str, str], float] = {}
# Windows by package, grid of the whole image, window and overlap; of the last run. Not by weights: how an image is
# prepared counts as well.
_WINDOWS: dict[tuple[str, Triple, tuple[float, ...], Triple, float], int] = {}


def remember_speed(sha256: str, device: str, windows: int, window: Triple, predict_s: float) -> None:
    """Takes the speed of the model with these weights."""
    if windows > 0 and predict_s > 0:
        _SPEED[sha256, device] = predict_s / (windows * float(np.prod(window)))


def speed_of(sha256: str, device: str) -> float | None:
    """Seconds per voxel of a window; None where nothing has run yet."""
    return _SPEED.get((sha256, device))


def remember_windows(package_id: str, grid: Geometry, window: Triple, overlap: float, windows: int) -> None:
    """Takes how many windows a whole image needed, its empty borders cropped, or the places that were found in it.

    grid: of the image; mirrored predictions do not count.
    """
    _WINDOWS[_key(package_id, grid, window, overlap)] = windows


def windows_of(package_id: str, grid: Geometry, window: Triple, overlap: float) -> int | None:
    """How many windows the last image on such a grid needed; None where there was none."""
    return _WINDOWS.get(_key(package_id, grid, window, overlap))


def _key(
    package_id: str, grid: Geometry, window: Triple, overlap: float
) -> tuple[str, Triple, tuple[float, ...], Triple, float]:
    """Only the size of the grid counts, not where it lies; rounded, as spacings reach the plan as text."""
    canonical = grid.canonical()
    return package_id, canonical.shape, tuple(round(float(mm), 4) for mm in canonical.spacing_mm), window, overlap
