"""What encoder-decoders without an inverse share: levels that go down, and come up again beside their skips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..reversible import Readout
from .base import SegmentationNetwork
from .portable import interpolate

__all__ = ["LevelNetwork"]


class LevelNetwork(SegmentationNetwork):
    """Subclasses set `encoder` and `decoder` (a module a level, finest first) and `head`, and say how levels meet.

    engine="checkpoint" recomputes the inside of each level.
    """

    encoder: nn.ModuleList
    decoder: nn.ModuleList
    head: nn.Module

    def start(self, x: torch.Tensor) -> torch.Tensor:
        """What comes before the first level."""
        return x

    def shrink(self, level: int, x: torch.Tensor) -> torch.Tensor:
        """From level - 1 down to `level`."""
        raise NotImplementedError

    def narrowed(self, level: int, x: torch.Tensor) -> torch.Tensor:
        """The maps below `level` as they are interpolated up to it."""
        return x

    def raised(self, level: int, x: torch.Tensor) -> torch.Tensor:
        """From below `level` up to its size."""
        scale = tuple(float(s) for s in self.config.strides[level])
        x = self.narrowed(level, x)
        return interpolate(x, scale_factor=scale)

    def join(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The skip connection and what came up from below."""
        raise NotImplementedError

    def compute(
        self, x: torch.Tensor, wants_features: bool, readout: Readout | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        x = self.start(x)
        skips = []
        for level, block in enumerate(self.encoder):
            if level:
                x = self.shrink(level, x)
            x = self.recomputed(block, x)
            skips.append(x)
        features = skips.pop()
        for level in reversed(range(len(self.decoder))):
            x = self.recomputed(self.decoder[level], self.join(skips.pop(), self.raised(level, x)))
        found = (self.head(x),) if readout is None else readout.of([x])
        return found, features if wants_features else None

    def apply_head(self, *maps: torch.Tensor) -> torch.Tensor:
        return self.head(*maps)

    def head_modules(self) -> Sequence[nn.Module]:
        return [self.head]
