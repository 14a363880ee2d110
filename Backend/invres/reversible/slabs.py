"""Cutting maps (N, C, D, H, W) into pieces, so that what lives only for a moment is a fraction of a map."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

import torch

from .fixed_point import decode

__all__ = ["abridged", "blocks", "channel_parts", "depth_slabs", "load"]

Block = tuple[slice, slice, slice, slice, slice]
T = TypeVar("T")
_ABRIDGED: ContextVar[bool] = ContextVar("abridged", default=False)


@contextlib.contextmanager
def abridged() -> Iterator[None]:
    """Inside it, of many pieces only the first two and the last are worked on.

    For predicting memory on tensors without values: what is alive in the pieces between is the same.
    """
    token = _ABRIDGED.set(True)
    try:
        yield
    finally:
        _ABRIDGED.reset(token)


def _all_or_some(pieces: Sequence[T]) -> Sequence[T]:
    return [*pieces[:2], pieces[-1]] if _ABRIDGED.get() and len(pieces) > 3 else pieces


def depth_slabs(shape: Sequence[int], elements: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) planes of slabs of a map of this shape, with about `elements` values each."""
    n, c, depth, height, width = shape
    count = max(1, round(n * c * depth * height * width / max(elements, 1)))
    planes = max(1, -(-depth // count))
    for start in _all_or_some(range(0, depth, planes)):
        yield start, min(start + planes, depth)


def channel_parts(channels: int, group: int, parts: int) -> Iterator[slice]:
    """Runs of channels, about 1 / `parts` of them each, that do not cut through a group of `group` channels."""
    size = group * max(1, -(-(channels // group) // parts))
    for start in _all_or_some(range(0, channels, size)):
        yield slice(start, min(start + size, channels))


def blocks(size: Sequence[int], voxels: int) -> Iterator[Block]:
    """Indices of boxes of whole planes, or of whole rows where a plane is too large, of about `voxels` voxels each."""
    depth, height, width = size
    planes = max(1, min(depth, voxels // max(1, height * width)))
    rows = height if planes > 1 else max(1, min(height, voxels // max(1, width)))
    for d in _all_or_some(range(0, depth, planes)):
        for h in _all_or_some(range(0, height, rows)):
            yield (
                slice(None),
                slice(None),
                slice(d, min(d + planes, depth)),
                slice(h, min(h + rows, height)),
                slice(0, width),
            )


def load(tensor: torch.Tensor, where: tuple[slice, ...], dtype: torch.dtype) -> torch.Tensor:
    """A piece of a state map as floating point: a view, or decoded where the state is fixed point."""
    piece = tensor[where]
    return decode(piece, dtype) if piece.dtype == torch.int16 else piece
