"""The baseline: a 3D U-Net (arXiv 1606.06650) with instance norm and leaky ReLU, as the paper compares against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from ..config import NetworkConfig
from ..reversible import Readout
from .base import SegmentationNetwork, complete_config
from .blocks import DoubleConv

__all__ = ["UNet3D"]

CHANNELS = (16, 32, 64, 128, 256)


class UNet3D(SegmentationNetwork):
    """Two convolutions a level, max pooling, trilinear interpolation, concatenated skip connections.

    Published: that structure. Chosen: widths of 16 to 256, so that the three networks have similar parameter counts;
    interpolation instead of a transposed convolution.
    engine="checkpoint" recomputes the inside of each level.
    """

    widths: ClassVar[tuple[int, ...]] = CHANNELS
    narrows: ClassVar[bool] = False
    """Whether a level takes on the width of the next finer one before its maps are interpolated up to that."""

    def __init__(self, config: NetworkConfig, engine: str = "auto", memory: str = "low"):
        ones = (1,) * len(self.widths)
        config = complete_config(config, self.widths, ones, ones[1:])
        super().__init__(config, engine, memory)
        channels = config.channels
        inputs = (config.in_channels, *channels[:-1])
        up = (channels[0], *channels[:-1]) if self.narrows else channels  # width with which a level goes up
        self.encoder = nn.ModuleList(DoubleConv(i, o, config) for i, o in zip(inputs[:-1], channels[:-1], strict=True))
        self.encoder.append(DoubleConv(inputs[-1], up[-1], config, middle=channels[-1]))
        self.decoder = nn.ModuleList(
            DoubleConv(fine + up[level + 1], up[level], config, middle=fine) for level, fine in enumerate(channels[:-1])
        )
        self.head = nn.Conv3d(channels[0], config.out_channels, 1)

    def compute(
        self, x: torch.Tensor, wants_features: bool, readout: Readout | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        skips = []
        for level, block in enumerate(self.encoder):
            if level:
                x = functional.max_pool3d(x, self.config.strides[level - 1])
            x = self.recomputed(block, x)
            skips.append(x)
        features = skips.pop()
        for level in reversed(range(len(self.decoder))):
            scale = tuple(float(s) for s in self.config.strides[level])
            x = functional.interpolate(x, scale_factor=scale, mode="trilinear", align_corners=False)
            x = self.recomputed(self.decoder[level], torch.cat([skips.pop(), x], dim=1))
        found = (self.head(x),) if readout is None else readout.of([x])
        return found, features if wants_features else None

    def apply_head(self, *maps: torch.Tensor) -> torch.Tensor:
        return self.head(*maps)

    def head_modules(self) -> Sequence[nn.Module]:
        return [self.head]
