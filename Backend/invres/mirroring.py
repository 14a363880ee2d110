"""Predictions averaged over mirrored images: along which axes, and for which labels that makes sense."""

from __future__ import annotations

from collections.abc import Sequence

from . import InvresError
from .config import LabelScheme, check_axes
from .sides import SIDES

__all__ = ["LEFT_TO_RIGHT", "check_mirror", "flips_of", "kept_mirror"]

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
    return next((name for name in scheme.names if name.casefold().startswith(SIDES)), "")
