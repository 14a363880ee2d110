"""Convolution of a slab, forward and backward, on the fast path of each device.

On a CPU, torch takes its fast kernel (oneDNN) in single precision for one volume only if channels x depth x height of
the input exceed 20480, and a kernel ten times slower below that. A thin slab of wide planes passes once its axes are
turned so that the thin one is last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["FAST_ABOVE", "convolve", "convolve_backward"]

FAST_ABOVE = 20480
_THIN_LAST, _BACK = (0, 1, 3, 4, 2), (0, 1, 4, 2, 3)

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def convolve(
    planes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: Sequence[int]
) -> torch.Tensor:
    """conv3d of stride 1. planes: (N, C, D, H, W)."""
    if not _turned(planes):
        return torch.conv3d(planes, weight, bias, padding=list(padding))
    d, h, w = padding
    planes, weight = (t.permute(_THIN_LAST).contiguous() for t in (planes, weight))
    return torch.conv3d(planes, weight, bias, padding=[h, w, d]).permute(_BACK)


def convolve_backward(
    after: torch.Tensor, planes: torch.Tensor, weight: torch.Tensor, padding: Sequence[int], mask: list[bool]
) -> Gradients:
    """Gradients of `planes`, `weight` and bias of `convolve` as far as `mask` asks for them. after: of its output."""
    turned = _turned(planes)
    d, h, w = padding
    if turned:
        after, planes, weight = (t.permute(_THIN_LAST).contiguous() for t in (after, planes, weight))
    of_planes, of_weight, of_bias = torch.ops.aten.convolution_backward(
        after.contiguous(),
        planes,
        weight,
        [weight.shape[0]],
        [1, 1, 1],
        [h, w, d] if turned else [d, h, w],
        [1, 1, 1],
        False,
        [0, 0, 0],
        1,
        mask,
    )
    if turned:
        of_planes, of_weight = (t if t is None else t.permute(_BACK) for t in (of_planes, of_weight))
    return of_planes, of_weight, of_bias


def _turned(planes: torch.Tensor) -> bool:
    n, c, d, h, w = planes.shape
    slow = planes.device.type == "cpu" and planes.dtype == torch.float32 and n == 1
    return slow and c * d * h <= FAST_ABOVE < c * h * w
