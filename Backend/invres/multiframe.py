"""DICOM files with many frames (enhanced MR and CT): where each frame lies, which ITK takes on trust."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import InvresError
from .image_header import LPS_TO_RAS

__all__ = ["frame_grid"]

CONVERT = "Convert it with dcm2niix, or load it in 3D Slicer and save the volume as NRRD."


def frame_grid(path: Path) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Of an enhanced DICOM file: the order of its frames along their normal, positions along it (mm), and the affine.

    affine: 4x4, (d, h, w, 1) -> RAS mm, d counted in this order. Source: DICOM PS3.3, C.7.6.16 (functional groups).
    Raises InvresError where pydicom is not there, the file does not say where its frames lie, or they lie at angles or
    are scaled differently.
    """
    try:
        import pydicom
    except ImportError:
        raise InvresError(
            f"{path} holds several frames, and the package pydicom, which tells where they lie, is not installed.",
            hint=f"`pip install pydicom`. {CONVERT}",
        ) from None
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True)
        own = data.PerFrameFunctionalGroupsSequence
        shared = data.get("SharedFunctionalGroupsSequence") or [None]
        groups = [(frame, shared[0]) for frame in own]
        if not groups:
            raise ValueError
        positions = _each(groups, "PlanePositionSequence", "ImagePositionPatient")
        cosines = _each(groups, "PlaneOrientationSequence", "ImageOrientationPatient")
        spacings = _each(groups, "PixelMeasuresSequence", "PixelSpacing")
        scales = {_scale(group) for group in groups}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OSError, pydicom.errors.InvalidDicomError):
        raise InvresError(f"{path} holds several frames, but not where each of them lies.", hint=CONVERT) from None
    if np.ptp(cosines, axis=0).max() > 1e-3 or np.ptp(spacings, axis=0).max() > 1e-3:
        raise InvresError(
            f"The frames of {path} do not lie parallel, or differ in voxel size, so they are not one volume.",
            hint=CONVERT,
        )
    if len(scales) > 1:
        raise InvresError(f"The frames of {path} have scales of their own, which cannot be read here.", hint=CONVERT)
    along_row, along_column = cosines[0, :3], cosines[0, 3:]
    normal = np.cross(along_row, along_column)
    places = positions @ normal
    order = np.argsort(places, kind="stable")
    affine = np.eye(4)
    affine[:3, 0] = (positions[order[-1]] - positions[order[0]]) / max(len(order) - 1, 1)
    affine[:3, 1] = along_column * spacings[0, 0]
    affine[:3, 2] = along_row * spacings[0, 1]
    affine[:3, 3] = positions[order[0]]
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return tuple(int(index) for index in order), places[order], affine


def _each(groups: Sequence[tuple[Any, Any]], sequence: str, element: str) -> np.ndarray:
    """The numbers of an element in every frame, its own or the shared one: (frames, n)."""
    found = []
    for group in groups:
        holder = next((one for one in group if one is not None and sequence in one), None)
        if holder is None:
            raise ValueError(f"no {sequence}")
        found.append([float(value) for value in getattr(getattr(holder, sequence)[0], element)])
    return np.array(found)


def _scale(group: tuple[Any, Any]) -> tuple[float, float]:
    holder = next((one for one in group if one is not None and "PixelValueTransformationSequence" in one), None)
    if holder is None:
        return 1.0, 0.0
    item = holder.PixelValueTransformationSequence[0]
    return float(item.get("RescaleSlope", 1)), float(item.get("RescaleIntercept", 0))
