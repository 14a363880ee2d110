"""DICOM series: which files of a folder are one volume, and where their slices lie."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from . import InvresError
from .image_header import (
    COPY_AGAIN,
    LPS_TO_RAS,
    READABLE,
    Header,
    checked_layout,
    itk_affine,
    itk_information,
    repaired_axes,
)
from .multiframe import frame_grid

__all__ = ["read_series", "series_files", "series_of"]

PARALLEL = 1e-3  # of direction cosines


def series_files(folder: Path) -> tuple[str, ...]:
    """The sorted files of the one series in `folder`. Raises InvresError for none and for several."""
    series = {uid: _files_of(folder, uid) for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(os.fspath(folder))}
    if not series:
        inside = sorted(child.name for child in folder.iterdir() if child.is_dir())
        hint = f"Name one of its sub-folders: {', '.join(inside[:8])}." if inside else f"Allowed are {READABLE}."
        raise InvresError(f"The folder {folder} has no DICOM images.", hint=hint)
    if len(series) > 1:
        listing = "; ".join(f"{_description(files[0])} ({len(files)} files)" for files in series.values())
        raise InvresError(
            f"The folder {folder} has {len(series)} DICOM series, but one is wanted: {listing}.",
            hint="Move each series to a sub-folder and name that, or name one file of the series you want, "
            f"for example {Path(next(iter(series.values()))[0]).name}.",
        )
    return next(iter(series.values()))


def series_of(path: Path) -> tuple[str, ...]:
    """All files of the series that the DICOM file `path` belongs to; itself where it is a volume of its own."""
    reader = itk_information(os.fspath(path))
    if reader.GetSize()[-1] > 1:
        return (os.fspath(path),)
    uid = reader.GetMetaData("0020|000e").strip("\0 ") if reader.HasMetaDataKey("0020|000e") else ""
    files = _files_of(path.parent, uid) if uid else ()
    return files or (os.fspath(path),)


def read_series(files: tuple[str, ...]) -> Header:
    """The header of a series of slices (or of one multi-frame file) from the headers of all its files.

    Raises InvresError for a damaged header and for slices that do not make one volume.
    """
    folder = Path(files[0]).parent if len(files) > 1 else Path(files[0])
    try:
        readers = [itk_information(file) for file in files]
    except RuntimeError:
        raise InvresError(f"A DICOM file in {folder} has a damaged header.", hint=COPY_AGAIN) from None
    size, components = checked_layout(folder, readers[0])
    if len(files) == 1 and size[2] > 1:
        return _read_frames(Path(files[0]), size, components)
    if size[2] > 1:
        raise InvresError(
            f"The DICOM series in {folder} has {len(files)} files with several frames each, which cannot be joined.",
            hint=f"Name one of them, for example {Path(files[0]).name}, or convert the series with dcm2niix.",
        )
    affine = itk_affine(folder, readers[0])
    if len(files) == 1:
        affine, sentence = repaired_axes(folder, affine, size[2::-1])
        return Header(files, size, affine, components, warnings=(sentence,) if sentence else ())
    if len({reader.GetSize() for reader in readers}) > 1:
        raise InvresError(
            f"The DICOM slices in {folder} are not all of one size, so they are not one volume.",
            hint="Remove the slices that do not belong to it (a localizer, for example).",
        )
    origins = np.array([reader.GetOrigin() for reader in readers]) @ LPS_TO_RAS
    if np.ptp([reader.GetDirection() for reader in readers], axis=0).max() > PARALLEL:
        raise InvresError(
            f"The slices of the DICOM series in {folder} do not lie parallel, so they are not one volume.",
            hint="Export each stack of parallel slices as a volume of its own (dcm2niix does, and 3D Slicer).",
        )
    positions = origins @ affine[:3, 0] / np.linalg.norm(affine[:3, 0])
    order = np.argsort(positions, kind="stable")  # GDCM falls back to file names where positions repeat
    warnings = _checked_gaps(f"The DICOM series in {folder}", positions[order])
    affine[:3, 0] = (origins[order[-1]] - origins[order[0]]) / (len(files) - 1)
    affine[:3, 3] = origins[order[0]]
    size = (size[0], size[1], len(files))
    affine, sentence = repaired_axes(folder, affine, size[::-1])
    warnings += [sentence] if sentence else []
    # ITK takes the type of the first slice for all, and what another one's scale makes of its values may not fit it.
    mixed = len({reader.GetPixelID() for reader in readers}) > 1
    return Header(tuple(files[i] for i in order), size, affine, components, warnings=tuple(warnings), mixed_types=mixed)


def _read_frames(path: Path, size: tuple[int, ...], components: int) -> Header:
    """The header of one file that holds all slices."""
    order, positions, affine = frame_grid(path)
    if len(order) != size[2]:
        raise InvresError(f"{path} is damaged: it has {size[2]} frames and says of {len(order)} where they lie.")
    warnings = _checked_gaps(f"The DICOM file {path}", positions)
    affine, sentence = repaired_axes(path, affine, size[2::-1])
    warnings += [sentence] if sentence else []
    return Header((str(path),), size, affine, components, warnings=tuple(warnings), frames=order)


def _checked_gaps(what: str, positions: np.ndarray) -> list[str]:
    """A warning where slices at these places in mm, in order, are not evenly spaced.

    Raises InvresError where several lie at one place.
    """
    gaps = np.diff(positions)
    if gaps.min() < 1e-3:
        raise InvresError(
            f"{what} has several slices at one position, so it is not one 3D volume.",
            hint="Export one volume of it (a time series or a diffusion series has many).",
        )
    if np.ptp(gaps) <= 0.02 * gaps.mean():
        return []
    return [
        f"{what} has slices that are not evenly spaced ({gaps.min():.3g} to {gaps.max():.3g} mm); a slice may be "
        "missing, and positions inside are not right."
    ]


def _files_of(folder: Path, uid: str) -> tuple[str, ...]:
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(os.fspath(folder), uid))


def _description(file: str) -> str:
    reader = itk_information(file)
    text = reader.GetMetaData("0008|103e").strip("\0 ") if reader.HasMetaDataKey("0008|103e") else ""
    # Texts of old scanners are not UTF-8.
    return "'" + text.encode("utf-8", "replace").decode() + "'" if text else "without a description"
