"""Layers that are the same under mixed precision wherever they run: on a card, on the CPU, and where oneDNN errs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Convolution", "GroupNorm", "interpolate"]


class Convolution(nn.Conv3d):
    """A convolution, padded by hand where oneDNN's gradient would be wrong.

    In bfloat16 on a CPU, torch 2.13 returns memory that nobody wrote as the gradient of a kernel that is deeper than
    the map (from two planes of depth on). Without padding along the depth it is right.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        depth, kernel = input.shape[2], self.kernel_size[0]
        if not (1 < depth < kernel and isinstance(self.padding, tuple) and self.padding[0] and _half_on_cpu(input)):
            return super()._conv_forward(input, weight, bias)
        margin, *rest = self.padding
        padded = functional.pad(input, (0, 0, 0, 0, margin, margin))
        padding = (0, *rest)
        return functional.conv3d(padded, weight, bias, self.stride, padding, self.dilation, self.groups)


class GroupNorm(nn.GroupNorm):
    """Group norm of a map in 16 bits is one in 16 bits (its sums are in float32 all the same).

    Autocast on a card would make it float32, which doubles what a network keeps for backward.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        if kind == "cpu" or not torch.is_autocast_enabled(kind):
            return super().forward(input)
        scale, shift = (None if part is None else part.to(input.dtype) for part in (self.weight, self.bias))
        with torch.autocast(kind, enabled=False):
            return functional.group_norm(input, self.num_groups, scale, shift, self.eps)


def interpolate(
    x: torch.Tensor, size: Sequence[int] | None = None, scale_factor: Sequence[float] | None = None
) -> torch.Tensor:
    """Trilinear interpolation of (N, C, D, H, W), in the precision of the map on every device."""
    with torch.autocast(x.device.type, enabled=False):
        return functional.interpolate(x, size, scale_factor, mode="trilinear", align_corners=False)


def _half_on_cpu(x: torch.Tensor) -> bool:
    if x.device.type != "cpu":
        return False
    return x.dtype == torch.bfloat16 or (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
