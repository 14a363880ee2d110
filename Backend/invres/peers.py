"""Other libraries' networks at the widths of our baseline, for the benchmarks; what is not installed is left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["PEERS", "Peer", "build_peer"]

Triple = tuple[int, int, int]
WIDTHS = (16, 32, 64, 128, 256)


class Peer(nn.Module):
    """A peer's network: (N, C, D, H, W) -> (logits, further loss or None).

    blocks: names of the classes whose insides are recomputed in backward, none = as the peer ships it.
    """

    def __init__(self, network: nn.Module, blocks: tuple[str, ...] = ()):
        super().__init__()
        self.network = network
        for module in network.modules():
            if type(module).__name__ in blocks:
                module.forward = _checkpointed(module.forward)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = self.network(image)
        return found if isinstance(found, tuple) else (found, None)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return run


def _monai_unet(channels: int, classes: int, patch: Triple) -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(3, channels, classes, WIDTHS, (2,) * (len(WIDTHS) - 1), num_res_units=2, norm="INSTANCE")


def _monai_segresnet_vae(channels: int, classes: int, patch: Triple) -> nn.Module:
    from monai.networks.nets import SegResNetVAE

    return SegResNetVAE(patch, init_filters=WIDTHS[0], in_channels=channels, out_channels=classes)


def _iunet(channels: int, classes: int, patch: Triple) -> nn.Module:
    from iunets import iUNet

    # The release on PyPI; its default doubles the width at each level, as WIDTHS do. Stem and head as in its README.
    inner = iUNet(in_channels=WIDTHS[0], architecture=(1,) * len(WIDTHS), dim=3, verbose=0)
    return nn.Sequential(nn.Conv3d(channels, WIDTHS[0], 3, padding=1), inner, nn.Conv3d(WIDTHS[0], classes, 1))


# name: (module to import, builder, classes to recompute)
PEERS: dict[str, tuple[str, Callable[[int, int, Triple], nn.Module], tuple[str, ...]]] = {
    "MONAI UNet": ("monai", _monai_unet, ()),
    "MONAI UNet, checkpointed": ("monai", _monai_unet, ("ResidualUnit",)),
    "MONAI SegResNetVAE": ("monai", _monai_segresnet_vae, ()),
    "MONAI SegResNetVAE, checkpointed": ("monai", _monai_segresnet_vae, ("ResBlock",)),
    "iUNet": ("iunets", _iunet, ()),
}


def build_peer(name: str, channels: int, classes: int, patch: Triple) -> Peer | None:
    """The peer's network, or None if its library is not installed."""
    module, make, blocks = PEERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            __import__(module)
        except ImportError:
            return None
        return Peer(make(channels, classes, patch), blocks)
