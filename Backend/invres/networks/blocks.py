"""The ordinary, non-invertible parts: normalisation, convolution units, the functions N1 and N2 of a coupling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from ..networkconfig import NetworkConfig
from ..reversible import Bottleneck, Unit
from .inplace_norm import InPlaceBatchNorm, InPlaceGroupNorm
from .portable import Convolution, GroupNorm

__all__ = ["ConvUnit", "CouplingFunction", "DoubleConv", "MobileFunction", "make_norm", "normed"]

GROUP_CHANNELS = 8  # channels per group of group norm; chosen
_CONVOLUTIONS, _GROUP_NORMS = (nn.Conv3d, Convolution), (nn.GroupNorm, GroupNorm)
_PLAIN_NORMS: tuple[set[type], ...] = ({nn.GroupNorm}, {GroupNorm}, {nn.Identity})  # one kind in all places


def make_norm(kind: str, channels: int) -> nn.Module:
    """Affine normalisation over (D, H, W): "instance" (the paper's), "group", "batch" or "none".

    "auto", which networks settle before they build their parts, is "instance" here.
    """
    if kind in ("instance", "auto"):
        # Group norm with one channel a group is instance norm. torch's InstanceNorm3d returns a view, and an in-place
        # activation on a view makes autograd copy whole maps in backward (two half-width maps more at the peak).
        return GroupNorm(channels, channels)
    if kind == "group":
        return GroupNorm(_groups(channels), channels)
    if kind == "batch":
        return nn.BatchNorm3d(channels)
    return nn.Identity()


def _groups(channels: int) -> int:
    groups = max(1, channels // GROUP_CHANNELS)
    while channels % groups:
        groups -= 1
    return groups


def normed(channels: int, config: NetworkConfig) -> list[nn.Module]:
    """Norm and leaky ReLU of a convolution's output, both in place of it if `config.inplace_norm` says so.

    Two modules either way, so that weights fit both.
    """
    kind, slope = config.norm, config.negative_slope
    if not config.inplace_norm:
        return [make_norm(kind, channels), nn.LeakyReLU(slope, inplace=True)]
    if kind == "batch":
        return [InPlaceBatchNorm(channels, slope), nn.Identity()]
    return [InPlaceGroupNorm(_groups(channels) if kind == "group" else channels, channels, slope), nn.Identity()]


class ConvUnit(nn.Module):
    """norm -> leaky ReLU -> convolution, same size. Shapes (N, Cin, D, H, W) -> (N, Cout, D, H, W).

    The activation is in place on the norm's output, so one map per unit is kept for the backward pass, not two.
    """

    def __init__(self, in_channels: int, out_channels: int, config: NetworkConfig):
        super().__init__()
        self.norm = make_norm(config.norm, in_channels)
        # Without a norm the activation's input is the caller's tensor, which must not be overwritten.
        self.act = nn.LeakyReLU(config.negative_slope, inplace=config.norm != "none")
        self.dropout = nn.Dropout3d(config.dropout) if config.dropout > 0 else None
        self.conv = Convolution(in_channels, out_channels, config.kernel, padding=config.kernel // 2)
        nn.init.kaiming_normal_(self.conv.weight, a=config.negative_slope)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(x))
        if self.dropout is not None:
            x = self.dropout(x)
        return self.conv(x)

    def lean(self) -> Unit | None:
        """The same for the engine's own gradient, which leaves out batch norm, active dropout and changed layers."""
        norm: nn.GroupNorm | None = None
        if isinstance(self.norm, nn.GroupNorm) and type(self.norm) in _GROUP_NORMS:
            norm = self.norm
        elif type(self.norm) is not nn.Identity:
            return None
        if type(self.conv) not in _CONVOLUTIONS or type(self.act) is not nn.LeakyReLU:
            return None
        if self.dropout is not None and self.training:
            return None
        return Unit(norm, self.act.negative_slope, self.conv)


class CouplingFunction(nn.Sequential):
    """N1 or N2 of equation 1: units of constant width. Need not be invertible itself.

    kernels: of the units; None is `config.kernel`, `config.convolutions` times.
    """

    def __init__(self, channels: int, config: NetworkConfig, kernels: Sequence[int] | None = None):
        if kernels is None:
            kernels = (config.kernel,) * config.convolutions
        super().__init__(
            *(ConvUnit(channels, channels, dataclasses.replace(config, kernel=kernel)) for kernel in kernels)
        )

    def units(self) -> list[Unit] | None:
        """The units for the engine's own gradient, or None if it has none for one of them."""
        found = [part.lean() if type(part) is ConvUnit else None for part in self]
        return None if None in found else found  # type: ignore[return-value]


class MobileFunction(nn.Sequential):
    """An inverted bottleneck as N1 or N2: 1x1x1 to `expansion` times the width, depthwise, 1x1x1 back; always normed.

    Published for two dimensions (MobileNetV2, arXiv 1801.04381: linear at the narrow end, batch norm). Chosen: leaky
    ReLU.
    """

    def __init__(self, channels: int, config: NetworkConfig):
        wide = channels * config.expansion
        slope, kernel = config.negative_slope, config.kernel
        convolutions = (
            nn.Conv3d(channels, wide, 1),
            nn.Conv3d(wide, wide, kernel, padding=kernel // 2, groups=wide),
            nn.Conv3d(wide, channels, 1),
        )
        layers: list[nn.Module] = []
        for conv in convolutions:
            nn.init.kaiming_normal_(conv.weight, a=slope)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, make_norm(config.norm, conv.out_channels), nn.LeakyReLU(slope, inplace=True)]
        if config.dropout > 0:
            layers.insert(-3, nn.Dropout3d(config.dropout))
        super().__init__(*layers[:-1])  # the narrow end is linear

    def bottleneck(self) -> Bottleneck | None:
        """The same for the engine, which works on parts of its expanded channels; None where it cannot.

        It leaves out batch norm, active dropout and changed layers.
        """
        layers = [layer for layer in self if not isinstance(layer, nn.Dropout3d)]
        if len(layers) < len(self) and self.training:
            return None
        convolutions = [one for one in layers[0::3] if isinstance(one, nn.Conv3d) and type(one) in _CONVOLUTIONS]
        acts = [layer for layer in layers[2::3] if type(layer) is nn.LeakyReLU]
        norms = layers[1::3]
        if len(convolutions) < 3 or len(acts) < 2 or {type(norm) for norm in norms} not in _PLAIN_NORMS:
            return None
        expand, depthwise, project = convolutions
        return Bottleneck(expand, depthwise, project, (norms[0], norms[1], norms[2]), acts[0].negative_slope)


class DoubleConv(nn.Module):
    """Twice convolution -> norm -> leaky ReLU, as in the 3D U-Net (arXiv 1606.06650) with the paper's instance norm.

    middle: width between the two; None for `out_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, config: NetworkConfig, middle: int | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        middle = middle or out_channels
        for before, after in ((in_channels, middle), (middle, out_channels)):
            conv = Convolution(before, after, config.kernel, padding=config.kernel // 2)
            nn.init.kaiming_normal_(conv.weight, a=config.negative_slope)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, *normed(after, config)]
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout3d(config.dropout) if config.dropout > 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(x)
        return x if self.dropout is None else self.dropout(x)
