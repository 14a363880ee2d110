"""Which parts of a network keep their weights in a fine-tuning."""

from __future__ import annotations

from collections.abc import Collection

from . import InvresError
from .networks import SegmentationNetwork, is_head

__all__ = ["FROZEN_PARTS", "freeze"]

FROZEN_PARTS = ("none", "encoder", "all-but-head")


def freeze(network: SegmentationNetwork, part: str, changed: Collection[str] = ()) -> list[str]:
    """Takes the parameters of one of FROZEN_PARTS out of the training and returns their names.

    changed: parameters that are trained all the same, because they do not come from the base model as they are.
    Raises InvresError for another part.
    """
    if part not in FROZEN_PARTS:
        raise InvresError(f"There is no part {part!r} to freeze; the parts are {', '.join(FROZEN_PARTS)}.")
    frozen = []
    for name, parameter in network.named_parameters():
        inside = _in_encoder(name, network) if part == "encoder" else part == "all-but-head" and not is_head(name)
        if inside and name not in changed:
            parameter.requires_grad = False
            frozen.append(name)
    return frozen


def _in_encoder(name: str, network: SegmentationNetwork) -> bool:
    """The first convolution and everything down to the deepest level, that level included."""
    words = name.split(".")
    if words[:2] == ["program", "steps"]:
        # The VAE branch reads the program's state behind the step `tap`: the end of the encoder.
        return bool(int(words[2]) <= network.program.tap)  # type: ignore[union-attr, operator]
    return words[0] in ("stem", "down", "encoder")
