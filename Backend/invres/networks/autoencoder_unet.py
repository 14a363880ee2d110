"""The encoder-decoder that won BraTS 2018, regularised by an autoencoder: residual blocks, a small decoder."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from ..networkconfig import NetworkConfig
from .base import complete_config
from .blocks import make_norm
from .levels import LevelNetwork
from .portable import Convolution

__all__ = ["AutoencoderUNet"]

CHANNELS = (32, 64, 128, 256)
BLOCKS = (1, 2, 2, 4)
DECODER_BLOCKS = (1, 1, 1)


class AutoencoderUNet(LevelNetwork):
    """Myronenko, arXiv 1810.11654 (table 1): an asymmetric encoder-decoder; its VAE branch is `network.vae`.

    Published: widths, numbers of blocks, group norm, strided convolutions down, 1x1x1 convolution and trilinear
    interpolation up, skip connections by addition, a dropout of 0.2 behind the first convolution (`network.dropout`).
    Chosen: the VAE branch is the thriftier one that all networks here share.
    """

    def __init__(self, config: NetworkConfig, engine: str = "auto", memory: str = "low"):
        config = complete_config(config, CHANNELS, BLOCKS, DECODER_BLOCKS, "group")
        super().__init__(config, engine, memory)
        channels, kernel = config.channels, config.kernel
        self.stem = Convolution(config.in_channels, channels[0], kernel, padding=kernel // 2)
        self.dropout = nn.Dropout3d(config.dropout) if config.dropout > 0 else nn.Identity()
        self.down, self.encoder = nn.ModuleList(), nn.ModuleList()
        for level, (width, count) in enumerate(zip(channels, config.blocks, strict=True)):
            if level:
                stride = config.strides[level - 1]
                self.down.append(nn.Conv3d(channels[level - 1], width, kernel, stride=stride, padding=kernel // 2))
            self.encoder.append(nn.Sequential(*(_ResidualBlock(width, config) for _ in range(count))))
        self.narrow = nn.ModuleList(nn.Conv3d(coarse, fine, 1) for fine, coarse in pairwise(channels))
        self.decoder = nn.ModuleList(
            nn.Sequential(*(_ResidualBlock(width, config) for _ in range(count)))
            for width, count in zip(channels, config.decoder_blocks, strict=False)
        )
        self.head = nn.Conv3d(channels[0], config.out_channels, 1)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.stem(x))

    def shrink(self, level: int, x: torch.Tensor) -> torch.Tensor:
        return self.down[level - 1](x)

    def narrowed(self, level: int, x: torch.Tensor) -> torch.Tensor:
        return self.narrow[level](x)

    def join(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x + skip


class _ResidualBlock(nn.Module):
    """x + twice (norm -> ReLU -> convolution)."""

    def __init__(self, channels: int, config: NetworkConfig):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            conv = Convolution(channels, channels, config.kernel, padding=config.kernel // 2)
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [make_norm(config.norm, channels), nn.ReLU(inplace=config.norm != "none"), conv]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)
