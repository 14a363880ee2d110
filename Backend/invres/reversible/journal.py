"""What the forward pass of a reversible program leaves behind for the backward pass, besides the final state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .drift import Watch
from .recompute import RandomState
from .setting import SETTINGS, MemorySetting

__all__ = ["Journal"]


@dataclass
class Journal:
    """One run's notes. Nothing in it grows with the number of voxels, but for what a step has to keep by its nature.

    dtype: in which state values are computed with (float32, or float64 in tests).
    largest: number of values in a half of the finest level; the measure for slabs.
    stash: tensors that have no inverse. random_states: of functions that draw random numbers.
    samples: of the state in front of each step, where the drift is to be checked.
    recording: False where no backward will follow, so that nothing need be left behind.
    """

    setting: MemorySetting = SETTINGS["low"]
    dtype: torch.dtype = torch.float32
    largest: int = 0
    stash: list[torch.Tensor] = field(default_factory=list)
    random_states: list[RandomState | None] = field(default_factory=list)
    samples: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    recording: bool = True
    wants_input_gradient: bool = True

    @property
    def slab_elements(self) -> int:
        """Values in a slab. The same in forward and backward: a fixed-point state needs the very same sums again."""
        return max(self.setting.slab_minimum, self.largest // self.setting.slab_parts)

    @property
    def part_elements(self) -> int:
        """Values of a function's inner gradient that may be held at a time."""
        return max(self.setting.slab_minimum, self.largest // self.setting.gradient_parts)

    def count_overflows(self, count: torch.Tensor) -> None:
        known = self.watch.overflows
        self.watch.overflows = count if known is None else known + count
