"""The memory-efficient FCN for full-size CT: a U-Net of compact convolution blocks, with in-place norms if wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from ..networkconfig import NetworkConfig
from .base import complete_config
from .blocks import normed
from .levels import LevelNetwork
from .portable import Convolution

__all__ = ["CompactFCN"]

CHANNELS = (40, 80, 160, 256)
NARROWEST = 4  # of a bottleneck; one map would be no path for three classes
Layers = Callable[[int, int, NetworkConfig], list[nn.Module]]
"""Layers, from the widths before and after them."""


class CompactFCN(LevelNetwork):
    """Wang, Oda, Mori, Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN (2020).

    Published: a U-Net with two convolutions a level, for which `network.block` puts a "bottleneck" (1x1x1 to 1/K of the
    width, 3x3x3, 1x1x1 back), two "separable" ones (3x3x3 depthwise, 1x1x1) or a "ccblock" (made of both); batch norm;
    in-place activated norms (`network.inplace_norm`); mixed precision; and, with one channel and three classes, 9.5,
    3.2, 2.7 and 2.6 million parameters for plain, bottleneck, separable and ccblock.

    Chosen, so that all four counts come out within 2 % (the text gives neither widths nor levels nor K): four levels of
    40 to 256 maps; 3x3x3 convolutions with stride 2 down (to the same width) and transposed ones up (to the finer
    width), which stay plain in every variant and are most of what is left of a compact one; one bottleneck for the two
    convolutions of a level, of 1/3 (`network.bottleneck_ratio`) of its wider end. Two narrower ones in sequence fit the
    counts as well, but need far more memory than plain convolutions, against the paper's table 1. Also chosen: a
    ccblock is a bottleneck whose 3x3x3 is separable; a norm and a leaky ReLU behind every convolution but the depthwise
    ones; no residual connections.
    """

    takes_inplace_norm = True

    def __init__(self, config: NetworkConfig, engine: str = "auto", memory: str = "low"):
        ones = (1,) * len(CHANNELS)
        config = complete_config(config, CHANNELS, ones, ones[1:], "batch")
        super().__init__(config, engine, memory)
        channels, kernel = config.channels, config.kernel
        self.encoder, self.up, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[level - 1] if level else config.in_channels
            down = _unit([_conv(before, before, kernel, config.strides[level - 1])], config) if level else []
            self.encoder.append(nn.Sequential(*down, *_block(before, width, config)))
        for stride, (fine, coarse) in zip(config.strides, pairwise(channels), strict=True):
            depth, height, width = (s - 1 for s in stride)
            up = nn.ConvTranspose3d(coarse, fine, kernel, stride, kernel // 2, (depth, height, width))
            self.up.append(nn.Sequential(*_unit([up], config)))
            self.decoder.append(nn.Sequential(*_block(2 * fine, fine, config)))
        self.head = nn.Conv3d(channels[0], config.out_channels, 1)

    def shrink(self, level: int, x: torch.Tensor) -> torch.Tensor:
        return x  # the encoder's levels begin with it

    def raised(self, level: int, x: torch.Tensor) -> torch.Tensor:
        return self.recomputed(self.up[level], x)

    def join(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([skip, x], dim=1)


def _block(before: int, width: int, config: NetworkConfig) -> list[nn.Module]:
    """What stands for the two convolutions of a level."""
    layers = _BLOCKS[config.block](before, width, config)
    return [*layers, nn.Dropout3d(config.dropout)] if config.dropout > 0 else layers


def _twice(unit: Layers) -> Layers:
    return lambda before, after, config: [*unit(before, after, config), *unit(after, after, config)]


def _plain(before: int, after: int, config: NetworkConfig) -> list[nn.Module]:
    return _unit([_conv(before, after, config.kernel)], config)


def _separable(before: int, after: int, config: NetworkConfig) -> list[nn.Module]:
    return _unit([_conv(before, before, config.kernel, groups=before), _conv(before, after, 1)], config)


def _bottleneck(middle: Layers) -> Layers:
    def layers(before: int, after: int, config: NetworkConfig) -> list[nn.Module]:
        narrow = max(NARROWEST, max(before, after) // config.bottleneck_ratio)
        first, last = (_unit([_conv(*ends, 1)], config) for ends in ((before, narrow), (narrow, after)))
        return [*first, *middle(narrow, narrow, config), *last]

    return layers


_BLOCKS = {
    "plain": _twice(_plain),
    "bottleneck": _bottleneck(_plain),
    "separable": _twice(_separable),
    "ccblock": _bottleneck(_separable),
}


def _unit(convolutions: Sequence[nn.Conv3d | nn.ConvTranspose3d], config: NetworkConfig) -> list[nn.Module]:
    """Convolutions in sequence, norm, leaky ReLU."""
    for conv in convolutions:
        nn.init.kaiming_normal_(conv.weight, a=config.negative_slope)
        if config.norm == "none":
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        else:
            conv.register_parameter("bias", None)  # the norm would take it away again
    return [*convolutions, *normed(convolutions[-1].out_channels, config)]


def _conv(before: int, after: int, kernel: int, stride: int | tuple[int, int, int] = 1, groups: int = 1) -> nn.Conv3d:
    return Convolution(before, after, kernel, stride, kernel // 2, groups=groups)
