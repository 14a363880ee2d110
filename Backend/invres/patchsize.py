"""The patch of a training, no larger than its cases are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from .config import Recipe
from .events import SILENT, Reporter
from .networks import build, with_patch
from .volume import Geometry

__all__ = ["within_cases"]

Triple = tuple[int, int, int]


def within_cases(
    recipe: Recipe, grids: Sequence[Geometry], spacing_mm: tuple[float, float, float], report: Reporter = SILENT
) -> Recipe:
    """The recipe with its patch cut, along each axis, to the median case: of 20 slices a patch of 96 sees repeated
    border for the most part, which costs memory and shifts the statistics that norms divide by.

    grids: of the training cases' files, canonical; empty borders, which preparation may cut off as well, count.
    spacing_mm: of prepared cases. Sides are multiples of the network's divisor (at least one of them twice that, or the
    coarsest maps would be a single voxel). A note says what was changed. A recipe of label maps draws its own images
    and stays as it is, and so does one whose patch is small enough.
    """
    if recipe.label_maps is not None or not grids:
        return recipe
    patch = recipe.training.patch
    median = np.median([grid.with_spacing(spacing_mm).shape for grid in grids], axis=0)
    with torch.device("meta"):
        divisor = build(dataclasses.replace(recipe.network, vae=None)).divisor
    sides = _sides(patch, median.tolist(), divisor)
    if sides == patch:
        return recipe
    spacing, size, old, new = (
        "x".join(f"{side:.4g}" for side in sides) for sides in (spacing_mm, median.tolist(), patch, sides)
    )
    report.note(f"The patch is {new} voxels instead of {old}: at {spacing} mm the median training case has {size}.")
    training = dataclasses.replace(recipe.training, patch=sides)
    return dataclasses.replace(recipe, training=training, network=with_patch(recipe.network, sides))


def _sides(patch: Triple, size: Sequence[float], divisor: Triple) -> Triple:
    """The patch, not longer along any axis than `size` rounded up to a multiple of the divisor."""
    multiples = [math.ceil(length / d) for length, d in zip(size, divisor, strict=True)]
    if max(multiples) == 1:
        multiples = [2, 2, 2]
    depth, height, width = (min(p, n * d) for p, n, d in zip(patch, multiples, divisor, strict=True))
    return depth, height, width
