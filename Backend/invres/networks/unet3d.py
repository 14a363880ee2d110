"""The baseline: a 3D U-Net (arXiv 1606.06650) with instance norm and leaky ReLU, as the paper compares against."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from ..networkconfig import NetworkConfig
from .base import complete_config
from .blocks import DoubleConv
from .levels import LevelNetwork

__all__ = ["UNet3D"]

CHANNELS = (16, 32, 64, 128, 256)


class UNet3D(LevelNetwork):
    """Two convolutions a level, max pooling, trilinear interpolation, concatenated skip connections.

    Published: that structure. Chosen: widths of 16 to 256, so that the three networks have similar parameter counts;
    interpolation instead of a transposed convolution.
    """

    takes_inplace_norm = True
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

    def shrink(self, level: int, x: torch.Tensor) -> torch.Tensor:
        return functional.max_pool3d(x, self.config.strides[level - 1])

    def join(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([skip, x], dim=1)
