"""Predictions averaged over mirrored images: along which axes, and for which labels that makes sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from . import InvresError
from .config import LabelScheme, Recipe, check_axes
from .events import SILENT, Reporter
from .sides import is_of_one_side

__all__ = ["LEFT_TO_RIGHT", "check_mirror", "flips_of", "kept_mirror", "with_kept_flips"]

LEFT_TO_RIGHT = 2  # axis of a prepared case


def check_mirror(scheme: LabelScheme, axes: Sequence[int]) -> None:
    """Raises InvresError for axes that are none, and where the mirrored prediction would call left what is right."""
    check_axes("Mirror axes", axes)
    sided = _sided(scheme)
    if LEFT_TO_RIGHT in axes and sided:
        raise InvresError(
            f"The model tells left from right ({sided}), so its mirrored prediction cannot be averaged with the plain "
            "one.",
            hint=f"Leave axis {LEFT_TO_RIGHT} out.",
        )


def kept_mirror(scheme: LabelScheme, axes: Sequence[int]) -> tuple[int, ...]:
    """The axes that remain for a model that was made from another one, with these labels."""
    return tuple(axis for axis in axes if axis != LEFT_TO_RIGHT or not _sided(scheme))


def with_kept_flips(recipe: Recipe, scheme: LabelScheme, report: Reporter = SILENT) -> Recipe:
    """The recipe without mirroring from left to right, in training and prediction, where a label is of one side: the
    flipped patch would call left what is right. Recipes of label maps exchange their labels, and stay as they are."""
    flips, mirror = (kept_mirror(scheme, axes) for axes in (recipe.augmentation.flip_axes, recipe.mirror_axes))
    if recipe.label_maps is not None or (flips, mirror) == (recipe.augmentation.flip_axes, recipe.mirror_axes):
        return recipe
    report.note(f"Labels are of one side ({_sided(scheme)}), so nothing is mirrored from left to right.")
    augmentation = dataclasses.replace(recipe.augmentation, flip_axes=flips)
    return dataclasses.replace(recipe, augmentation=augmentation, mirror_axes=mirror)


def flips_of(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of the axes, the empty one first: what is predicted and averaged.

    >>> flips_of((0, 2))
    [(), (0,), (2,), (0, 2)]
    """
    flips: list[tuple[int, ...]] = [()]
    for axis in axes:
        flips += [(*flip, axis) for flip in flips]
    return flips


def _sided(scheme: LabelScheme) -> str:
    """A label of one side of the body, or ""."""
    return next((name for name in scheme.names if is_of_one_side(name)), "")
