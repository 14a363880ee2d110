"""What a parameter belongs to, by its name."""

from __future__ import annotations

__all__ = ["STEMS", "is_head"]

STEMS = ("stem.weight", "encoder.0.layers.0.weight")
"""The first convolution's weights, by network; their second axis is the input channels."""


def is_head(name: str) -> bool:
    """Whether a parameter of this name belongs to the layer that makes the logits."""
    return name.startswith(("head.", "heads."))
