"""What image files say about their voxels, and the checks and repairs that all formats share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk

from . import InvresError
from .events import format_bytes

if TYPE_CHECKING:
    from .nifti_file import NiftiHeader

__all__ = [
    "COPY_AGAIN",
    "LPS_TO_RAS",
    "READABLE",
    "Header",
    "TimeAxis",
    "array_order",
    "check_claim",
    "check_dimensions",
    "check_spacing",
    "checked_layout",
    "corners",
    "itk_affine",
    "itk_information",
    "missing_data_file",
    "repaired_axes",
    "shift_mm_between",
    "spacing_of",
    "unsupported_values",
]

sitk.ProcessObject.GlobalWarningDisplayOff()

READABLE = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd), Analyze (.hdr, .img) or a DICOM folder"
COPY_AGAIN = "Copy, download or export it again."
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_DEFLATE_LIMIT = 1100  # zlib and gzip cannot shrink data more than 1032 times
_STRONG_SHEAR_DEGREES = 5.0


@dataclass(frozen=True)
class TimeAxis:
    """The fourth axis of a file: the place of its first volume and the step from one to the next.

    in_seconds: the file says that this is time, its step and its unit, from which both were converted to s.
    """

    start: float = 0.0
    step: float = 1.0
    in_seconds: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.start):
            object.__setattr__(self, "start", 0.0)
        # Many files leave the step out, as 0: then the volumes are counted, whatever unit is declared.
        if not 0 < self.step < math.inf:
            object.__setattr__(self, "step", 1.0)
            object.__setattr__(self, "in_seconds", False)

    def at(self, number: int) -> float:
        """The place of volume `number`, counted from 0."""
        return round(self.start + number * self.step, 6)


@dataclass(frozen=True)
class Header:
    """What a file says about its voxels.

    files: one name, or the slices of a DICOM series in the order of their position.
    size: (x, y, z) or (x, y, z, t) voxels; components: values per voxel.
    affine: 4x4, (d, h, w, 1) -> RAS mm, its axes at right angles.
    frames: of one DICOM file with all slices, the numbers of its frames in the order of their position.
    mixed_types: the slices of a series do not all have values of one type.
    time: the fourth axis of 4D. metadata: text fields of NRRD files.
    warnings: a sentence for each thing that was repaired or looks wrong.
    """

    files: tuple[str, ...]
    size: tuple[int, ...]
    affine: np.ndarray
    components: int = 1
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    nifti: NiftiHeader | None = None
    frames: tuple[int, ...] = ()
    mixed_types: bool = False
    time: TimeAxis = TimeAxis()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)"""
        return self.size[2], self.size[1], self.size[0]

    @property
    def count(self) -> int:
        """Volumes in the file: 1 for 3D."""
        return self.size[3] if len(self.size) > 3 else 1


def corners(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """RAS positions in mm (8, 3) of the centres of the corner voxels of a (D, H, W) grid."""
    index = np.array([[d, h, w] for d in (0, 1) for h in (0, 1) for w in (0, 1)]) * (np.array(shape) - 1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def itk_information(file: str) -> sitk.ImageFileReader:
    """A reader with the header of `file`. Raises RuntimeError where ITK does not know or refuses it."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader


def itk_affine(path: Path, reader: sitk.ImageFileReader | sitk.Image) -> np.ndarray:
    """(d, h, w, 1) -> RAS of a header; raises InvresError for a voxel size that is not above 0."""
    spacing = np.array(reader.GetSpacing()[:3])
    check_spacing(path, spacing)
    dimension = reader.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (dimension, dimension))[:3, :3] * spacing
    affine[:3, 3] = reader.GetOrigin()[:3]
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return array_order(affine)


def array_order(affine: np.ndarray) -> np.ndarray:
    """(x, y, z, 1) -> RAS as (d, h, w, 1) -> RAS, and back."""
    return affine[:, [2, 1, 0, 3]]


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size (3,) in mm, in the order of the affine's axes."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def shift_mm_between(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far a corner voxel of a (D, H, W) grid moves at the most, along any axis of the world."""
    return float(np.abs(corners(affine, shape) - corners(other, shape)).max())


def repaired_axes(path: Path, affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """The affine with its axes turned to right angles (nearest rotation, polar decomposition; the centre stays).

    Returns a sentence with the size of the change where it exceeds a hundredth of a voxel.
    Raises InvresError for a voxel size that is not above 0 and for axes in one plane.
    """
    spacing = spacing_of(affine)
    check_spacing(path, spacing)
    axes = affine[:3, :3] / spacing
    cosine = np.abs(axes.T @ axes - np.eye(3)).max()
    if cosine < 1e-6:
        return affine, ""
    left, singular, right = np.linalg.svd(axes)
    if singular[-1] < 1e-2:
        raise InvresError(f"The header of {path} gives axes that lie in one plane.", hint="Export the image again.")
    repaired = affine.copy()
    repaired[:3, :3] = (left @ right) * spacing
    middle = (np.array(shape) - 1) / 2
    repaired[:3, 3] += (affine[:3, :3] - repaired[:3, :3]) @ middle
    shift_mm, degrees = shift_mm_between(affine, repaired, shape), math.degrees(math.asin(min(1.0, cosine)))
    if shift_mm <= 0.01 * spacing.min():
        return repaired, ""
    change = f"by up to {degrees:.2g} degrees and were turned to right angles, which moves voxels by up to"
    if degrees > _STRONG_SHEAR_DEGREES:
        return repaired, (
            f"{path.name} is strongly sheared (by a tilted gantry, or an affine registration in its header): its axes "
            f"miss right angles {change} {shift_mm:.3g} mm, so shapes and positions are wrong; resample it to a "
            "regular grid first."
        )
    return repaired, f"{path.name}: the axes in its header miss right angles {change} {shift_mm:.2g} mm."


def check_spacing(path: Path, spacing: np.ndarray) -> None:
    """Raises InvresError for a voxel size that is not above 0 mm."""
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        sizes = " x ".join(f"{float(s):g}" for s in spacing)
        raise InvresError(
            f"The header of {path} gives a voxel size of {sizes} mm, but every size must be above 0.",
            hint="Export the image again or mend its header.",
        )


def checked_layout(path: Path, reader: sitk.ImageFileReader) -> tuple[tuple[int, ...], int]:
    """Size (x, y, z[, t]) and components of a file; raises InvresError unless it is 3D or 4D and has real values."""
    size, pixel = tuple(reader.GetSize()), sitk.GetPixelIDValueAsString(reader.GetPixelID())
    check_dimensions(path, size)
    if "complex" in pixel or "unknown" in pixel.lower():
        raise unsupported_values(path, pixel)
    return size, reader.GetNumberOfComponents()


def check_dimensions(path: Path, size: tuple[int, ...]) -> None:
    """Raises InvresError for what is neither 3D nor 4D."""
    if len(size) not in (3, 4):
        what = "flat (2D)" if len(size) == 2 else f"{len(size)}D"
        raise InvresError(f"{path} is {what}, but a 3D volume is wanted.", hint="Give the whole volume, not a slice.")


def unsupported_values(path: Path, kind: str) -> InvresError:
    """The mistake to raise for a file whose voxels are complex or of an unknown kind."""
    return InvresError(
        f"{path} has values of the kind '{kind}', but plain numbers are wanted.", hint="Export it as whole numbers."
    )


def missing_data_file(path: Path, data_file: str) -> InvresError:
    """The mistake to raise for a header without the file that has its voxels."""
    return InvresError(
        f"{path} keeps its voxels in the file {data_file}, which is not beside it.", hint="Copy both files together."
    )


def check_claim(path: Path, size: tuple[int, ...], claimed_bytes: int, stored_bytes: int, *, packed: bool) -> None:
    """Raises InvresError where a header claims more than the stored bytes, packed or not, can hold."""
    if claimed_bytes > stored_bytes * (_DEFLATE_LIMIT if packed else 1):
        raise InvresError(
            f"{path} is damaged or cut short: its header claims {' x '.join(map(str, size))} voxels "
            f"({format_bytes(claimed_bytes)}), but the file holds only {format_bytes(max(0, stored_bytes))}.",
            hint=COPY_AGAIN,
        )
