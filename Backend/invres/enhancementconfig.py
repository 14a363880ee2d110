"""What image quality transfer is trained on, and what its models keep of it, as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import InvresError

__all__ = ["EnhancementConfig", "EnhancementPlan"]

Kind = Literal["tensor", "image"]


@dataclass(frozen=True)
class EnhancementConfig:
    """Pairs of low and high resolution (Blumberg et al. 2018, section 3).

    kind: "tensor" takes diffusion scans and enhances their six tensor components; "image" takes plain volumes.
    patches: for each scan, with the central voxel inside its mask; published value. held_out: the share of all patches
    that is validated on; published value.
    largest_b: diffusion weightings above this (s/mm2) are left out. The paper's data has b = 1000 alone; 1500 is
    chosen, as above it a single tensor describes the signal less well.
    residual: the network learns what an interpolation of its own input lacks (see `interpolation`), and prediction adds
    the two, as in Kim et al. 2016 (VDSR, arXiv 1511.04587). A training then starts at the interpolation itself. The
    published way is False: the network gives the voxels of high resolution themselves.
    """

    kind: Kind = "image"
    patches: int = 2250
    held_out: float = 0.2
    largest_b: float = 1500.0
    residual: bool = False

    def __post_init__(self) -> None:
        if self.patches < 2:
            raise InvresError(f"enhancement.patches must be 2 or more for each scan, got {self.patches}.")
        if not 0 < self.held_out < 1:
            raise InvresError(f"enhancement.held_out must be above 0 and below 1, got {self.held_out}.")
        if not self.largest_b > 0:
            raise InvresError(f"enhancement.largest_b must be above 0 s/mm2, got {self.largest_b}.")


@dataclass(frozen=True)
class EnhancementPlan:
    """How a model's input and output are scaled, channel by channel; kept in its manifest.

    input_mean, input_std, target_mean, target_std: of the training scans inside their masks, at low and at high
    resolution. Of kind "image" they are figures of volumes that were z-scored by their own mask before, as MR has no
    unit; of kind "tensor" they are in mm2/s.
    residual: the network's output, times target_std, is added to the interpolation of its input, else to target_mean.
    """

    kind: Kind
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]
    target_mean: tuple[float, ...]
    target_std: tuple[float, ...]
    largest_b: float = EnhancementConfig.largest_b
    residual: bool = EnhancementConfig.residual

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, f"{side}_{what}")) for side in ("input", "target") for what in ("mean", "std")}
        if lengths != {self.channels}:
            raise InvresError(
                f"enhancement must have {self.channels} means and standard deviations of input and target each."
            )
        if not min(*self.input_std, *self.target_std) > 0:
            raise InvresError("enhancement.input_std and target_std must be above 0.")

    @property
    def channels(self) -> int:
        """Of input and output."""
        return 6 if self.kind == "tensor" else 1
