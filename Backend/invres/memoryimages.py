"""Images in memory as volumes: SimpleITK's, and arrays with their place in the world."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk

from . import InvresError
from .events import SILENT, Reporter
from .image_header import (
    LPS_TO_RAS,
    array_order,
    check_dimensions,
    itk_affine,
    repaired_axes,
    unsupported_values,
)
from .volume import Geometry, Volume, finite_values

__all__ = ["image_from_array", "volumes_in"]

NAME = Path("the image")
"""What messages call an image that has no file."""


def image_from_array(
    array: np.ndarray,
    *,
    spacing: Sequence[float] | None = None,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    direction: Sequence[float] | np.ndarray = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    affine: np.ndarray | None = None,
    order: Literal["kji", "ijk"] | None = None,
) -> Volume:
    """An array of three axes with its place in the world, as `Model.segment` takes it.

    Either spacing (mm), origin (mm) and direction (9 numbers) in the order x, y, z in LPS, as SimpleITK has them; or
    affine, 4x4 from (i, j, k, 1) to RAS mm, as nibabel has it, and Slicer as IJK to RAS matrix.
    order: of the array's axes: "kji" as SimpleITK and `slicer.util.arrayFromVolume` give arrays, "ijk" as nibabel does.
    It has to be said with an affine, which comes with both; with a spacing it is "kji" unless said otherwise.
    Axes that are not at right angles are turned to them, of which a Python warning tells.
    Raises InvresError for anything else.
    """
    array = np.asarray(array)
    if array.ndim != 3 or array.dtype.kind not in "buif":
        raise InvresError(
            f"An image is an array of three axes with real numbers, got {array.ndim} axes of {array.dtype}.",
            hint="Give each channel as an image of its own.",
        )
    if (spacing is None) == (affine is None):
        raise InvresError("The place of an image is given by its spacing or by its affine; give one of them.")
    if order not in ("kji", "ijk", None) or (affine is not None and order is None):
        raise InvresError(
            'With an affine, say the order of the array\'s axes: order="ijk" as nibabel has it, order="kji" as Slicer '
            "and SimpleITK have it."
        )
    if affine is None:
        matrix = np.eye(4)
        try:
            matrix[:3, :3] = np.reshape(np.asarray(direction, float), (3, 3)) * np.asarray(spacing, float)
            matrix[:3, 3] = np.reshape(np.asarray(origin, float), 3)
        except ValueError:
            raise InvresError(
                "An image has a spacing of 3 numbers, an origin of 3 and a direction of 9 or 3x3."
            ) from None
        matrix[:3] = LPS_TO_RAS @ matrix[:3]
    else:
        matrix = np.asarray(affine, float)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise InvresError(f"An affine is a 4x4 matrix of finite numbers, got {matrix.shape}.")
    if order == "ijk":
        array = array.transpose()
    if array.dtype in (bool, np.float16):
        array = array.astype(np.uint8 if array.dtype == bool else np.float32)
    turned, sentence = repaired_axes(NAME, array_order(matrix), array.shape)
    if sentence:
        warnings.warn(sentence, stacklevel=2)
    return Volume(array, Geometry.from_affine(turned, array.shape))


def volumes_in(image: sitk.Image | Volume, report: Reporter = SILENT) -> list[Volume]:
    """The volumes of an image of three axes, or of one of SimpleITK's of four, with channels along the last one; as a
    file with them would be read (`read_channels`).

    Raises InvresError for other sizes, for colours, vectors and complex numbers, and for what is no image.
    """
    if isinstance(image, Volume):
        return [Volume(finite_values(image.array, str(NAME), report), image.geometry)]
    if not isinstance(image, sitk.Image):
        raise InvresError(
            f"An image is a path, a SimpleITK image, or what invres.image_from_array makes of an array, got "
            f"{type(image).__name__}.",
            hint="An array needs its spacing or affine: invres.image_from_array(array, spacing=...).",
        )
    size, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    check_dimensions(NAME, size)
    if "complex" in (kind := image.GetPixelIDTypeAsString()):
        raise unsupported_values(NAME, kind)
    if components > 1:
        raise InvresError(f"The image has {components} values per voxel (colour or vectors), but one is wanted.")
    shape: Any = size[2::-1]
    affine, sentence = repaired_axes(NAME, itk_affine(NAME, image), shape)
    if sentence:
        report.warning(sentence)
    geometry = Geometry.from_affine(affine, shape)
    array = sitk.GetArrayFromImage(image).reshape(-1, *shape)
    return [Volume(finite_values(channel, str(NAME), report), geometry) for channel in array]
