"""The networks: `build` makes one from its configuration."""

from __future__ import annotations

import dataclasses

from ..config import NetworkConfig
from .autoencoder_unet import AutoencoderUNet
from .base import NetworkOutput, SegmentationNetwork
from .compact_fcn import CompactFCN
from .fully_invres import FullyInvRes
from .mbconv_unet import MBConvUNet
from .no_new_net import NoNewNet
from .partially_invres import PartiallyInvRes
from .unet3d import UNet3D

__all__ = ["NetworkOutput", "SegmentationNetwork", "build", "with_patch"]

_CLASSES: dict[str, type[SegmentationNetwork]] = {
    "unet3d": UNet3D,
    "partially_invres": PartiallyInvRes,
    "fully_invres": FullyInvRes,
    "mbconv_unet": MBConvUNet,
    "no_new_net": NoNewNet,
    "autoencoder_unet": AutoencoderUNet,
    "compact_fcn": CompactFCN,
}


def build(config: NetworkConfig, engine: str = "auto", memory: str = "low") -> SegmentationNetwork:
    """The network that `config` describes, freshly initialised.

    engine: "auto" takes `reversible` where the network has an inverse, else `stored`.
    memory: how far that engine goes: "low", "lower" or "lowest".
    Raises InvresError if widths, blocks or engine do not fit the architecture.
    """
    return _CLASSES[config.name](config, engine, memory)


def with_patch(config: NetworkConfig, patch: tuple[int, int, int]) -> NetworkConfig:
    """The same network with the VAE branch, if it has one, built for training patches of this size."""
    if config.vae is None:
        return config
    return dataclasses.replace(config, vae=dataclasses.replace(config.vae, patch=patch))
