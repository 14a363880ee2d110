"""How a segmentation is to be made, checked without torch, so that a wrong wish is told at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import InvresError
from .config import check_axes

__all__ = ["SegmentOptions"]


@dataclass(frozen=True)
class SegmentOptions:
    """overlap: part of a window shared with its neighbour. mirror_axes: also predict mirrored along these and average;
    None = as the model wants it.
    window: voxels (D, H, W), (0, 0, 0) = the model's own. device: "auto", "cpu" or "cuda:0".
    roi_mm: a box (R0, R1, A0, A1, S0, S1) in RAS mm outside of which nothing is segmented; () = the whole volume.
    sides: what a model has on both sides is divided into left and right when a file is written.
    one_piece: what hangs loose is left out, if the model's labels are of one piece.
    align: channels on other grids than the first are resampled to its grid when files are read (`alignment`)."""

    device: str = "auto"
    overlap: float = 0.5
    mirror_axes: tuple[int, ...] | None = None
    window: tuple[int, int, int] = (0, 0, 0)
    roi_mm: tuple[float, ...] = ()
    sides: bool = True
    one_piece: bool = True
    align: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise InvresError(f"The overlap must be at least 0 and below 1, got {self.overlap}.")
        check_axes("Mirror axes", self.mirror_axes or ())
        if any(self.window) and min(self.window) < 1:
            raise InvresError(f"The window must be three sizes of 1 voxel or more, got {list(self.window)}.")
        if self.roi_mm and not (
            len(self.roi_mm) == 6
            and all(math.isfinite(end) for end in self.roi_mm)
            and all(low < high for low, high in zip(self.roi_mm[::2], self.roi_mm[1::2], strict=True))
        ):
            raise InvresError(
                "A region of interest has six ends in mm, each lower one below its upper one, "
                f"got {list(self.roi_mm)}.",
                hint="Give R0 R1 A0 A1 S0 S1.",
            )

    def mirrored_as(self, own: Sequence[int]) -> SegmentOptions:
        """With the model's own mirror axes, if none are asked for."""
        return self if self.mirror_axes is not None else replace(self, mirror_axes=tuple(own))
