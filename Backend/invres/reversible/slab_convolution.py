"""Convolution of a slab, forward and backward, on the fast path of each device.

On a CPU, torch takes its fast kernel (oneDNN) in single precision for one volume only if channels x depth x height of
the input exceed 20480, and a much slower kernel below that. A thin slab of wide planes passes once its axes are
turned so that the thin one is last; what is too small for that passes as a batch of two halves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["convolve", "convolve_backward"]

FAST_ABOVE = 20480
_THIN_LAST, _BACK = (0, 1, 3, 4, 2), (0, 1, 4, 2, 3)

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def convolve(
    planes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: Sequence[int]
) -> torch.Tensor:
    """conv3d of stride 1. planes: (N, C, D, H, W)."""
    way = _way(planes, weight, padding)
    if way == "turned":
        d, h, w = padding
        planes, weight = (t.permute(_THIN_LAST).contiguous() for t in (planes, weight))
        return torch.conv3d(planes, weight, bias, padding=[h, w, d]).permute(_BACK)
    if way == "halved":
        first, second = torch.conv3d(_halves(planes, weight), weight, bias, padding=list(padding)).split(1)
        return torch.cat([first, second], dim=2)
    return torch.conv3d(planes, weight, bias, padding=list(padding))


def convolve_backward(
    after: torch.Tensor, planes: torch.Tensor, weight: torch.Tensor, padding: Sequence[int], mask: list[bool]
) -> Gradients:
    """Gradients of `planes`, `weight` and bias of `convolve` as far as `mask` asks for them. after: of its output."""
    way = _way(planes, weight, padding)
    if way == "turned":
        d, h, w = padding
        after, planes, weight = (t.permute(_THIN_LAST).contiguous() for t in (after, planes, weight))
        of_planes, of_weight, of_bias = _backward(after, planes, weight, [h, w, d], mask)
        return (
            None if of_planes is None else of_planes.permute(_BACK),
            None if of_weight is None else of_weight.permute(_BACK),
            of_bias,
        )
    if way == "halved":
        depth = planes.shape[2]
        of_halves, of_weight, of_bias = _backward(
            torch.cat(after.chunk(2, dim=2)), _halves(planes, weight), weight, padding, mask
        )
        if of_halves is None:
            return None, of_weight, of_bias
        of_planes = torch.zeros_like(planes)
        of_planes[:, :, : of_halves.shape[2]] = of_halves[:1]
        of_planes[:, :, depth - of_halves.shape[2] :].add_(of_halves[1:])
        return of_planes, of_weight, of_bias
    return _backward(after.contiguous(), planes, weight, padding, mask)


def _backward(
    after: torch.Tensor, planes: torch.Tensor, weight: torch.Tensor, padding: Sequence[int], mask: list[bool]
) -> Gradients:
    found: Gradients = torch.ops.aten.convolution_backward(
        after, planes, weight, [weight.shape[0]], [1, 1, 1], list(padding), [1, 1, 1], False, [0, 0, 0], 1, mask
    )
    return found


def _halves(planes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(1, C, D, H, W) -> (2, C, ...): the planes that each half of the output is made of."""
    depth, border = planes.shape[2], weight.shape[2] - 1
    length = (depth - border) // 2 + border
    return torch.cat([planes[:, :, :length], planes[:, :, depth - length :]])


def _way(planes: torch.Tensor, weight: torch.Tensor, padding: Sequence[int]) -> str:
    n, c, d, h, w = planes.shape
    kernel = weight.shape[2:]
    fast = planes.device.type != "cpu" or planes.dtype != torch.float32 or n > 1 or max(kernel) == 1
    if fast or c * d * h > FAST_ABOVE:
        return "plain"
    if c * h * w > FAST_ABOVE:
        return "turned"
    return "halved" if padding[0] == 0 and (d - kernel[0] + 1) % 2 == 0 else "plain"
