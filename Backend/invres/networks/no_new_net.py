"""No New-Net: the U-Net with which a well-kept training won second place in BraTS 2018; it became nnU-Net."""

from __future__ import annotations

from ..networkconfig import NetworkConfig
from .unet3d import UNet3D

__all__ = ["NoNewNet"]


class NoNewNet(UNet3D):
    """Isensee et al., arXiv 1809.10483, as far as its text tells.

    Published: a U-Net with 30 maps at full resolution, doubled at each of 5 levels, instance norm, leaky ReLU with
    slope 0.01, trilinear interpolation, and in the decoder fewer maps already before it. Chosen: max pooling.
    """

    widths = (30, 60, 120, 240, 480)
    narrows = True

    def bottom_width(self, config: NetworkConfig) -> int:
        return config.channels[-2]
