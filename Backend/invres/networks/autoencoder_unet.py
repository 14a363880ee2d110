"""The encoder-decoder that won BraTS 2018, regularised by an autoencoder: residual blocks, a small decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from ..config import NetworkConfig
from ..reversible import Readout
from .base import SegmentationNetwork, complete_config
from .blocks import make_norm

__all__ = ["AutoencoderUNet"]

CHANNELS = (32, 64, 128, 256)
BLOCKS = (1, 2, 2, 4)
DECODER_BLOCKS = (1, 1, 1)


class AutoencoderUNet(SegmentationNetwork):
    """Myronenko, arXiv 1810.11654 (table 1): an asymmetric encoder-decoder; its VAE branch is `network.vae`.

    Published: widths, numbers of blocks, group norm, strided convolutions down, 1x1x1 convolution and trilinear
    interpolation up, skip connections by addition, a dropout of 0.2 behind the first convolution (`network.dropout`).
    Chosen: the VAE branch is the thriftier one that all networks here share.
    engine="checkpoint" recomputes the inside of each level.
    """

    def __init__(self, config: NetworkConfig, engine: str = "auto", memory: str = "low"):
        config = complete_config(config, CHANNELS, BLOCKS, DECODER_BLOCKS, "group")
        super().__init__(config, engine, memory)
        channels, kernel = config.channels, config.kernel
        self.stem = nn.Conv3d(config.in_channels, channels[0], kernel, padding=kernel // 2)
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

    def compute(
        self, x: torch.Tensor, wants_features: bool, readout: Readout | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        x = self.dropout(self.stem(x))
        skips = []
        for level, blocks in enumerate(self.encoder):
            if level:
                x = self.down[level - 1](x)
            x = self.recomputed(blocks, x)
            skips.append(x)
        features = skips.pop()
        for level in reversed(range(len(self.decoder))):
            scale = tuple(float(s) for s in self.config.strides[level])
            x = functional.interpolate(self.narrow[level](x), scale_factor=scale, mode="trilinear", align_corners=False)
            x = self.recomputed(self.decoder[level], x + skips.pop())
        found = (self.head(x),) if readout is None else readout.of([x])
        return found, features if wants_features else None

    def apply_head(self, *maps: torch.Tensor) -> torch.Tensor:
        return self.head(*maps)

    def head_modules(self) -> Sequence[nn.Module]:
        return [self.head]


class _ResidualBlock(nn.Module):
    """x + twice (norm -> ReLU -> convolution)."""

    def __init__(self, channels: int, config: NetworkConfig):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            conv = nn.Conv3d(channels, channels, config.kernel, padding=config.kernel // 2)
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [make_norm(config.norm, channels), nn.ReLU(inplace=config.norm != "none"), conv]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)
