"""The VAE branch: from the deepest features to a distribution, and from a sample of it back to the input volume."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .. import InvresError
from ..networkconfig import VAEConfig
from .portable import Convolution, GroupNorm, interpolate
from .resampling import unsqueeze

__all__ = ["VAEBranch", "VAEOutput"]

Triple = tuple[int, int, int]
FINEST_WIDTH = 16  # of the decoder, at half the input's resolution; doubles with every level below it


class VAEOutput(NamedTuple):
    """reconstruction (N, C, D, H, W), mean and log_variance (N, latent)."""

    reconstruction: torch.Tensor
    mean: torch.Tensor
    log_variance: torch.Tensor


class VAEBranch(nn.Module):
    """Reconstructs the input from the bottom of the encoder (Myronenko, arXiv 1810.11654, table 1). Training only.

    Published: group norm, ReLU, 3x3x3 convolution of stride 2 to 16 channels, a dense layer to 256 = 128 means and 128
    spreads, a dense layer back, then doubling of the resolution with halving width and a residual block per level.
    Chosen: the dense layer gives log-variances; the doubling stops one level short of the input, where a 1x1x1
    convolution and a pixel shuffle make the full-size volume, so that no wide map exists at full resolution
    (a plain decoder there costs more memory than the whole invertible network).
    """

    def __init__(self, config: VAEConfig, features: int, image_channels: int, strides: tuple[Triple, ...]):
        super().__init__()
        total = tuple(math.prod(s[axis] for s in strides) for axis in range(3))
        if min(config.patch) < 1:
            raise InvresError(
                "network.vae.patch is missing.", hint="Give the training patch, for example [64, 64, 64]."
            )
        self.patch = config.patch
        bottom = tuple(math.ceil(p / t) for p, t in zip(config.patch, total, strict=True))
        reduced = tuple(math.ceil(b / 2) for b in bottom)
        self.padded = tuple(b * t for b, t in zip(bottom, total, strict=True))
        self.bottom, self.reduced = bottom, reduced
        self.latent = config.latent
        self.norm = GroupNorm(math.gcd(8, features), features)
        self.reduce = nn.Conv3d(features, config.reduced_channels, 3, stride=2, padding=1)
        self.encode = nn.Linear(config.reduced_channels * math.prod(reduced), 2 * config.latent)
        self.decode = nn.Linear(config.latent, config.reduced_channels * math.prod(reduced))
        width = FINEST_WIDTH * 2 ** (len(strides) - 1)
        self.widen = nn.Conv3d(config.reduced_channels, width, 1)
        self.narrow, self.blocks = nn.ModuleList(), nn.ModuleList()
        self.strides = strides[::-1]
        for _ in self.strides[:-1]:
            self.narrow.append(nn.Conv3d(width, width // 2, 1))
            width //= 2
            self.blocks.append(_ResidualBlock(width))
        self.head = nn.Conv3d(width, image_channels * math.prod(self.strides[-1]), 1)

    def forward(self, features: torch.Tensor) -> VAEOutput:
        """features: (N, C, d, h, w) of the deepest level, for an input of size `patch`."""
        if tuple(features.shape[2:]) != self.bottom:
            raise InvresError(
                f"The VAE branch was built for patches of {list(self.patch)} voxels and got another size.",
                hint="Train with that patch, or set network.vae.patch to the patch in use.",
            )
        x = self.reduce(functional.relu(self.norm(features)))
        spread = self.encode(x.flatten(1))
        # Half precision overflows in exp(); float64 stays as it is.
        spread = spread if spread.dtype == torch.float64 else spread.float()
        mean, log_variance = spread.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 20)
        sample = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        x = functional.relu(self.decode(sample)).reshape(-1, x.shape[1], *self.reduced)
        x = interpolate(self.widen(x), size=self.bottom)
        for stride, narrow, block in zip(self.strides[:-1], self.narrow, self.blocks, strict=True):
            scale = tuple(float(s) for s in stride)
            x = block(interpolate(narrow(x), scale_factor=scale))
        d, h, w = self.patch
        reconstruction = unsqueeze(self.head(x), self.strides[-1])[:, :, :d, :h, :w]
        return VAEOutput(reconstruction, mean, log_variance)


class _ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), group norm of 8, as Myronenko's."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = (GroupNorm(math.gcd(8, channels), channels) for _ in range(2))
        self.conv1, self.conv2 = (Convolution(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(functional.relu(self.norm1(x)))
        return x + self.conv2(functional.relu(self.norm2(y)))
