"""A U-Net of reversible mobile inverted bottlenecks: additive couplings whose functions are mostly depthwise."""

from __future__ import annotations

from torch import nn

from ..networkconfig import NetworkConfig
from .blocks import MobileFunction
from .partially_invres import PartiallyInvRes

__all__ = ["MBConvUNet"]


class MBConvUNet(PartiallyInvRes):
    """Memory Efficient 3D U-Net with Reversible Mobile Inverted Bottlenecks (Pendse et al., BrainLes 2020).

    Published (in the abstract): a 3D U-Net, reversible blocks, inverted bottlenecks with an intermediate expansion and
    a depthwise convolution. Chosen: group norm (which it cites), levels and changes of resolution as in
    Partially-InvRes with twice its width, an expansion of 6 (MobileNetV2's).
    """

    widths = (32, 64, 128, 256, 512)
    counts = (1, 1, 2, 2, 2)
    decoder_counts = (1, 1, 2, 2)
    norm = "group"

    def function(self, width: int, config: NetworkConfig) -> nn.Module:
        return MobileFunction(width, config)
