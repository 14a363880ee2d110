"""Windows over an image that overlap, and the mean of what a network says in them; mirrored windows along with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

__all__ = ["mirrored_logits", "sliding_window", "window_starts"]

Triple = tuple[int, int, int]
SIGMA = 0.125  # of the Gaussian weights, in window lengths, as nnU-Net has it


def window_starts(size: int, length: int, overlap: float) -> list[int]:
    """Where windows of this length begin on an axis; the last one ends with the image. overlap: part of the length."""
    step = max(1, int(length * (1 - overlap)))
    last = max(0, size - length)
    return [min(index * step, last) for index in range(math.ceil(last / step) + 1)]


@torch.no_grad()
def sliding_window(
    predict: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    window: Triple,
    overlap: float,
    batch: int,
    onto: torch.device | str,
) -> torch.Tensor:
    """The mean (K, D, H, W) float32, on the device `onto`, of what is predicted for windows of an image (C, D, H, W).

    predict: windows (N, C, *window), N up to `batch`, -> (N, K, *window), which may be overwritten. Each counts by a
    Gaussian around its middle. Where the window is longer than the image, the image's border is repeated.

    Windows stand on a grid, so their weights are products of one weight an axis, and so are the sums by which they are
    divided: that is done beforehand, axis by axis, and needs no second map of the image's size.
    """
    size = tuple(image.shape[1:])
    axes = [_places(extent, length, overlap) for extent, length in zip(size, window, strict=True)]
    pads = [(axis[0].lacking_before, axis[-1].lacking_behind) for axis in axes]
    if any(map(any, pads)):
        image = functional.pad(image[None], [part for pair in reversed(pads) for part in pair], mode="replicate")[0]
    mean: torch.Tensor | None = None
    windows = list(itertools.product(*axes))
    for first in range(0, len(windows), batch):
        some = windows[first : first + batch]
        tiles = [image[:, d.source, h.source, w.source] for d, h, w in some]
        # A single window is looked at where it lies.
        answers = predict(tiles[0][None] if len(tiles) == 1 else torch.stack(tiles)).float()
        del tiles
        if mean is None:
            mean = torch.zeros(answers.shape[1], *size, device=onto)
        for answer, (d, h, w) in zip(answers.unbind(), some, strict=True):
            along_d, along_h, along_w = (place.weight.to(answer.device) for place in (d, h, w))
            answer *= along_d[:, None, None] * along_h[:, None] * along_w
            mean[:, d.target, h.target, w.target] += answer[:, d.inside, h.inside, w.inside].to(onto)
        del answer, answers  # before the next windows need their memory
    assert mean is not None  # there is always a window
    return mean


class _Place(NamedTuple):
    """Of a window along one axis.

    source: in the image, filled up where it is shorter than a window. inside: what of the window is image; target:
    where that lies in the image as it is. weight: (length), float32; those of all windows sum up to 1 in each voxel.
    """

    source: slice
    inside: slice
    target: slice
    weight: torch.Tensor
    lacking_before: int
    lacking_behind: int


def _places(extent: int, length: int, overlap: float) -> list[_Place]:
    lacking = max(0, length - extent)
    before, behind = lacking // 2, lacking - lacking // 2
    starts = window_starts(extent, length, overlap)
    distances = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    bell = torch.exp(-0.5 * (distances / (SIGMA * length)) ** 2)
    total = torch.zeros(extent + lacking, dtype=torch.float64)
    for start in starts:
        total[start : start + length] += bell
    seen = min(extent, length)
    return [
        _Place(
            source=slice(start, start + length),
            inside=slice(before, before + seen),
            target=slice(start, start + seen),
            weight=(bell / total[start : start + length]).float(),
            lacking_before=before,
            lacking_behind=behind,
        )
        for start in starts
    ]


def mirrored_logits(
    network: Callable[[torch.Tensor], Any], tiles: torch.Tensor, flips: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The mean of the network's logits (N, K, D, H, W) float32 for tiles mirrored along each of some axes (0 to 2) and
    turned back. Overwrites what the network has returned."""
    total: torch.Tensor | None = None
    for flip in flips:
        axes = [axis + 2 for axis in flip]  # a flip of no axis would copy too
        found = network(tiles.flip(axes) if axes else tiles).logits.float()
        found = found.flip(axes) if axes else found
        total = found if total is None else total.add_(found)
        del found
    assert total is not None
    return total.div_(len(flips))
