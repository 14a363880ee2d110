"""Diffusion scans: b-values and directions, the diffusion tensor, and the frames that its components stand in.

Orientation is said once, here. A .bvec file gives directions in the frame that FSL uses: along the file's voxel axes
x, y, z, with x turned round where the grid is right-handed (its determinant in RAS is positive). A volume of six tensor
components in a file is in that frame too, as FSL's `dtifit --save_tensor` writes it: Dxx, Dxy, Dxz, Dyy, Dyz, Dzz in
mm2/s. Inside, tensors are in the frame of the world (RAS), so that turning the voxel axes changes none of their values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from . import InvresError
from .volume import Geometry

__all__ = [
    "COMPONENTS",
    "LOW_B",
    "file_frame",
    "fit_tensor",
    "gradient_files",
    "head_mask",
    "mean_diffusivity",
    "read_gradients",
    "turned",
]

NO_SCANS = ("grad_dev", "nodif", "nodif_brain", "nodif_brain_mask")
"""Volumes that HCP's diffusion folder holds beside the scan (`data`), by the same gradient tables."""
COMPONENTS = ("Dxx", "Dxy", "Dxz", "Dyy", "Dyz", "Dzz")
_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
LOW_B = 50.0  # s/mm2; below it an image counts as not diffusion-weighted (chosen; scanners write 0 to 5 for b = 0)
CHUNK = 2**16  # voxels fitted at a time
MEDIAN_VOXELS = 3


def gradient_files(image: Path) -> tuple[Path, Path] | None:
    """The .bval and .bvec beside a scan, by its name or as `bvals` and `bvecs` (HCP); None where they are not both."""
    stem = image.name.removesuffix(".gz").rpartition(".")[0]
    if stem in NO_SCANS:
        return None
    for bval, bvec in ((f"{stem}.bval", f"{stem}.bvec"), ("bvals", "bvecs")):
        if (image.parent / bval).is_file() and (image.parent / bvec).is_file():
            return image.parent / bval, image.parent / bvec
    return None


def read_gradients(bval: str | os.PathLike[str], bvec: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """b-values (n,) in s/mm2 and unit directions (n, 3) in the file's frame; directions of b = 0 may be anything.

    Raises InvresError for files that are no such tables, or do not belong together.
    """
    values, vectors = _table(Path(bval)).ravel(), _table(Path(bvec))
    if vectors.ndim == 2 and vectors.shape[1] != 3:
        vectors = vectors.T
    if vectors.ndim != 2 or vectors.shape != (len(values), 3):
        raise InvresError(
            f"{Path(bvec).name} must hold three numbers for each of the {len(values)} b-values of {Path(bval).name}, "
            f"got a table of {' x '.join(map(str, vectors.shape[::-1]))}.",
            hint="Give the .bval and .bvec that were exported with the scan.",
        )
    if values.min() < 0:
        raise InvresError(f"{Path(bval).name} has a b-value below 0 ({values.min():g} s/mm2).")
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = (values > LOW_B) & (np.abs(lengths - 1) > 0.1)
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise InvresError(
            f"Direction {place + 1} of {Path(bvec).name} has the length {lengths[place]:.3g}, but its b-value is "
            f"{values[place]:g} s/mm2, so it must be 1.",
            hint="Leave trace-weighted images out of the scan, or export it again.",
        )
    return values, vectors / np.where(lengths > 0, lengths, 1)[:, None]


def fit_tensor(signal: np.ndarray, b_values: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """The diffusion tensor by ordinary least squares of the logarithm: ln S = ln S0 - b g' D g.

    signal: (n, ...) with n images; values below 1e-4 of a voxel's largest count as that. directions: (n, 3).
    Returns (6, ...) float32 in mm2/s, in the order of `COMPONENTS` and the frame of `directions`; 0 where nothing is.
    Raises InvresError where the images do not determine a tensor.
    """
    products = [directions[:, i] * directions[:, j] * (1 if i == j else 2) for i, j in _PAIRS]
    design = np.column_stack([*(-b_values * product for product in products), np.ones(len(b_values))])
    # In units of b, so that columns are of one size and the rank is what it is.
    scaled = design / np.append(np.full(6, max(float(b_values.max(initial=0)), 1.0)), 1.0)
    if len(b_values) < 7 or np.linalg.matrix_rank(scaled, tol=1e-3) < 7:
        raise InvresError(
            f"These {len(b_values)} images do not determine a diffusion tensor: it takes six directions and an image "
            "without diffusion weighting.",
            hint="Check .bval and .bvec, and enhancement.largest_b.",
        )
    inverse = np.linalg.pinv(scaled)[:6] / max(float(b_values.max()), 1.0)
    flat = signal.reshape(len(b_values), -1)
    result = np.zeros((6, flat.shape[1]), np.float32)
    for start in range(0, flat.shape[1], CHUNK):
        part = flat[:, start : start + CHUNK].astype(np.float64)
        largest = part.max(axis=0)
        there = largest > 0
        logarithm = np.log(np.maximum(part[:, there], 1e-4 * largest[there]))
        result[:, start : start + CHUNK][:, there] = inverse @ logarithm
    return result.reshape(6, *signal.shape[1:])


def file_frame(geometry: Geometry) -> np.ndarray:
    """3x3: directions in a file's frame (see the module) -> RAS. geometry: of the volume as it lies in the file."""
    axes = geometry.direction[:, ::-1]  # columns: x, y, z of the file
    return axes * [-1.0 if np.linalg.det(axes) > 0 else 1.0, 1.0, 1.0]


def turned(tensor: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """M D M' for every voxel: six components (6, ...) from one frame in another."""
    full = np.empty((3, 3, *tensor.shape[1:]), tensor.dtype)
    for values, (i, j) in zip(tensor, _PAIRS, strict=True):
        full[i, j] = full[j, i] = values
    other = np.einsum("ai,ij...,bj->ab...", matrix, full, matrix, optimize=True)
    return np.stack([other[i, j] for i, j in _PAIRS]).astype(tensor.dtype)


def mean_diffusivity(tensor: np.ndarray) -> np.ndarray:
    """A third of the trace of (6, ...), as figure 5 of Blumberg et al. 2018 shows it."""
    return (tensor[0] + tensor[3] + tensor[5]) / 3


def head_mask(image: np.ndarray) -> np.ndarray:
    """Where the head is in (D, H, W): the largest part above Otsu's threshold after a median filter, with holes closed.

    Chosen; a mask made by a tool for that is better. For a diffusion scan, give the image without weighting.
    """
    from skimage.filters import threshold_otsu

    smooth = ndimage.median_filter(image, MEDIAN_VOXELS)
    if smooth.max() <= smooth.min():
        raise InvresError("The image has the same value everywhere, so nothing can be told from the background.")
    numbers, _ = ndimage.label(smooth > threshold_otsu(smooth))
    sizes = np.bincount(numbers.ravel())[1:]
    return ndimage.binary_fill_holes(numbers == 1 + int(sizes.argmax()))


def _table(path: Path) -> np.ndarray:
    try:
        text = path.read_text(encoding="utf-8-sig").replace(",", " ")
        rows: Sequence[list[float]] = [
            [float(word) for word in line.split()] for line in text.splitlines() if line.split()
        ]
        found = np.array(rows, dtype=float)
        if not found.size or not np.isfinite(found).all():
            raise ValueError
    except FileNotFoundError:
        raise InvresError(f"There is no file {path}.", hint="Check the spelling and the folder.") from None
    except (OSError, ValueError):
        raise InvresError(
            f"{path} is not a table of numbers.", hint="Give the text files with b-values and directions."
        ) from None
    return found
