"""What a parameter belongs to, by its name."""

from __future__ import annotations

__all__ = ["STEMS", "is_head", "is_rim"]

STEMS = ("stem.weight", "encoder.0.layers.0.weight")
"""The first convolution's weights, by network; their second axis is the input channels."""
_FIRST = (*STEMS, "encoder.0.0.weight", "layers.0.weight")  # compact_fcn, of whatever block; espcn
_LAST = ("head.", "heads.", "vae.head.", "layers.2.")  # the last one is espcn's


def is_head(name: str) -> bool:
    """Whether a parameter of this name belongs to the layer that makes the logits."""
    return name.startswith(("head.", "heads."))


def is_rim(name: str) -> bool:
    """Whether it belongs to the first layer, or to one that makes a result: to what the data's own channels fix."""
    return name in _FIRST or name.startswith(_LAST)
