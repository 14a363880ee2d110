"""Connected pieces of a mask, where voxels that share a face hang together."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

__all__ = ["LOOSE", "clear_loose_pieces", "largest_piece"]

LOOSE = 0.05
"""Of the largest piece: what is smaller hangs in the air. Not simply all others, because a field of view that ends
below the temporal lobes cuts their poles from the rest, and these are about as large as the brain stem beside them."""


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """The largest piece of a mask (D, H, W), as a mask; nothing where the mask is empty."""
    pieces, sizes = _labelled(mask)
    return pieces == sizes.argmax() if sizes.any() else np.zeros_like(mask)


def clear_loose_pieces(labels: np.ndarray) -> tuple[int, int]:
    """Sets to 0, in place, what does not hang together with the largest piece of all labels (D, H, W) as one, and is
    smaller than `LOOSE` of it. Returns how many pieces that were, and how many voxels."""
    boxes = ndimage.find_objects((labels != 0).view(np.uint8))
    if not boxes:
        return 0, 0
    inside = labels[boxes[0]]  # the air around it need not be looked at
    pieces, sizes = _labelled(inside != 0)
    loose = (sizes > 0) & (sizes < LOOSE * sizes.max())
    inside[loose[pieces]] = 0
    return int(loose.sum()), int(sizes[loose].sum())


def _labelled(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each voxel's piece, and how many voxels a piece has; the background counts as none."""
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return pieces, sizes
