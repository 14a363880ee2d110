"""The networks: `build` makes one from its configuration."""

from __future__ import annotations

import dataclasses

from .. import InvresError
from ..networkconfig import NETWORKS, NetworkConfig
from .autoencoder_unet import AutoencoderUNet
from .base import Network, NetworkOutput, SegmentationNetwork
from .compact_fcn import CompactFCN
from .ensemble import ANY, INTENSITIES, Ensemble
from .espcn import BORDER, ESPCN, ElongatedESPCN, shuffle, unshuffle
from .fully_invres import FullyInvRes
from .mbconv_unet import MBConvUNet
from .naming import STEMS, is_head, is_rim
from .no_new_net import NoNewNet
from .partially_invres import PartiallyInvRes
from .unet3d import UNet3D

__all__ = [
    "ANY",
    "BORDER",
    "ESPCN",
    "INTENSITIES",
    "STEMS",
    "Ensemble",
    "Network",
    "NetworkOutput",
    "SegmentationNetwork",
    "build",
    "build_any",
    "build_enhancer",
    "build_predictor",
    "is_head",
    "is_rim",
    "shuffle",
    "unshuffle",
    "with_patch",
]

_CLASSES: dict[str, type[SegmentationNetwork]] = {
    "unet3d": UNet3D,
    "partially_invres": PartiallyInvRes,
    "fully_invres": FullyInvRes,
    "mbconv_unet": MBConvUNet,
    "no_new_net": NoNewNet,
    "autoencoder_unet": AutoencoderUNet,
    "compact_fcn": CompactFCN,
}
_ENHANCERS: dict[str, type[ESPCN]] = {"espcn": ESPCN, "espcn_rn": ElongatedESPCN}


def build(config: NetworkConfig, engine: str = "auto", memory: str = "low") -> SegmentationNetwork:
    """The segmentation network that `config` describes, freshly initialised.

    engine: "auto" takes `reversible` where the network has an inverse, else `stored`.
    memory: how far that engine goes: "low", "lower" or "lowest".
    Raises InvresError if widths, blocks or engine do not fit the architecture, and for an enhancement network.
    """
    if config.enhances:
        raise InvresError(
            f"{config.name} enhances images; it does not segment them.",
            hint=f"The networks that segment are {', '.join(NETWORKS)}.",
        )
    return _CLASSES[config.name](config, engine, memory)


def build_enhancer(config: NetworkConfig, engine: str = "auto", memory: str = "low") -> ESPCN:
    """The enhancement network that `config` describes, freshly initialised; parameters and errors as `build`."""
    if not config.enhances:
        raise InvresError(
            f"{config.name} segments images; it does not enhance them.",
            hint=f"The networks that enhance are {', '.join(_ENHANCERS)}.",
        )
    return _ENHANCERS[config.name](config, engine, memory)


def build_any(config: NetworkConfig, members: int = 1) -> Network:
    """The network that a package has the weights of, whatever it gives; members: see `build_predictor`."""
    if config.enhances:
        return build_enhancer(config)
    return build(config) if members == 1 else build_predictor(config, members)


def build_predictor(config: NetworkConfig, members: int = 1) -> SegmentationNetwork:
    """The network that a model segments with, freshly initialised: without the VAE branch, which only trains.

    members: so many of them, whose logits are averaged (`Ensemble`).
    """
    config = dataclasses.replace(config, vae=None)
    return build(config) if members == 1 else Ensemble([build(config) for _ in range(members)])


def with_patch(config: NetworkConfig, patch: tuple[int, int, int]) -> NetworkConfig:
    """The same network with the VAE branch, if it has one, built for training patches of this size."""
    if config.vae is None:
        return config
    return dataclasses.replace(config, vae=dataclasses.replace(config.vae, patch=patch))
