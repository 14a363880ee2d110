"""How far the reversible engine goes to save memory: three settings, each a superset of the one before."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SETTINGS", "MemorySetting"]


@dataclass(frozen=True)
class MemorySetting:
    """What the engine's working set is allowed to be, in fractions of a half (x1 or x2) of the finest level.

    slab_parts: maps that live only for a moment are worked on in slabs of this fraction.
    slab_minimum: values in a slab, and in such a part of the channels, below which it is not cut further: smaller
        pieces only add overhead.
    gradient_parts: the gradient inside a function is held for this fraction of its channels at a time. More parts make
        convolutions narrower, hence slower, but not more numerous.
    short_gradients: under mixed precision the gradient of the state has 16 bits as well.
    fixed_point: the state lives on a 16-bit grid, where adding and subtracting are exact (see `fixed_point`).
    """

    slab_parts: int = 10
    slab_minimum: int = 2**19
    gradient_parts: int = 1
    short_gradients: bool = False
    fixed_point: bool = False


SETTINGS = {
    "low": MemorySetting(),
    "lower": MemorySetting(slab_parts=12, gradient_parts=4, short_gradients=True),
    "lowest": MemorySetting(
        slab_parts=40, slab_minimum=2**18, gradient_parts=6, short_gradients=True, fixed_point=True
    ),
}
