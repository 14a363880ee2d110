"""The first step of a network's program: one convolution from the image to the two halves of the state."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .fixed_point import encode
from .recompute import AutocastState
from .sink import GradientSink
from .slab_convolution import convolve, convolve_backward
from .slabs import depth_slabs
from .state import State
from .steps import Stack, Step

__all__ = ["Lift"]


class Lift(Step):
    """(image,) -> (x1, x2) = the two halves of conv(image), in float32 whatever precision the convolution has.

    conv: of odd kernel, padded to keep the size, stride 1. It stays the caller's; a `Lift` is made for one run.
    The image is not recomputed but kept, as the caller keeps it anyway.
    """

    def __init__(self, conv: nn.Conv3d, on_grid: bool = False):
        super().__init__()
        self.conv = conv
        self.on_grid = on_grid

    def forward(self, stack: Stack) -> Stack:
        (image,) = stack
        start = self.conv(image)
        start = start if start.dtype == torch.float64 else start.float()
        return tuple(self.increment(half, half) for half in start.chunk(2, dim=1))

    def advance(self, state: State) -> None:
        image, journal = state.pop(), state.journal
        n, _, *size = image.shape
        half = self.conv.out_channels // 2
        journal.largest = n * half * image[0, 0].numel()
        if journal.recording:
            journal.stash.append(image)
        kind = torch.int16 if state.fixed else journal.dtype
        halves = [torch.empty((n, half, *size), dtype=kind, device=image.device) for _ in range(2)]
        border, padding = self._border, self._padding
        for start, stop in depth_slabs((n, 2 * half, *size), journal.slab_elements):
            planes = _padded_planes(image, start - border, stop + border)
            result = convolve(planes, self.conv.weight, self.conv.bias, padding)
            for target, part in zip(halves, result.chunk(2, dim=1), strict=True):
                if state.fixed:
                    part, outside = encode(part)
                    journal.count_overflows(outside)
                target[:, :, start:stop] = part
        for target in halves:
            state.push(target)

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        state.pop()
        state.pop()
        journal, conv = state.journal, self.conv
        image = journal.stash.pop()
        state.push_part(image)
        g2, g1 = gradients.pop(), gradients.pop()
        autocast = AutocastState.of(image)
        dtype = autocast.dtype if autocast.enabled and image.dtype == torch.float32 else conv.weight.dtype
        border, padding = self._border, self._padding
        weight = conv.weight.to(dtype)
        of_image = torch.zeros_like(image) if journal.wants_input_gradient else image.new_empty(0)
        of_weight = torch.zeros_like(conv.weight) if conv.weight.requires_grad else None
        of_bias = torch.zeros_like(conv.bias) if conv.bias is not None and conv.bias.requires_grad else None
        mask = [journal.wants_input_gradient, of_weight is not None, of_bias is not None]
        with autocast.suspended():
            slabs = depth_slabs((*g1.shape[:1], conv.out_channels, *g1.shape[2:]), journal.slab_elements)
            for start, stop in slabs if any(mask) else ():
                planes = _padded_planes(image, start - border, stop + border).to(dtype)
                after = torch.cat([g[:, :, start:stop].to(dtype) for g in (g1, g2)], dim=1)
                i, w, b = convolve_backward(after, planes, weight, padding, mask)
                if i is not None:
                    low, high = max(start - border, 0), min(stop + border, image.shape[2])
                    of_image[:, :, low:high].add_(i[:, :, low - start + border : high - start + border])
                if of_weight is not None and w is not None:
                    of_weight.add_(w)
                if of_bias is not None and b is not None:
                    of_bias.add_(b)
        gradients.push_part(of_image)
        sink.add(conv.weight, of_weight)
        if conv.bias is not None:
            sink.add(conv.bias, of_bias)

    @property
    def _border(self) -> int:
        return self.conv.kernel_size[0] // 2

    @property
    def _padding(self) -> tuple[int, int, int]:
        return 0, self.conv.kernel_size[1] // 2, self.conv.kernel_size[2] // 2


def _padded_planes(image: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Planes `start` to before `stop` of the image, zeros where these lie outside."""
    depth = image.shape[2]
    first, last = max(start, 0), min(stop, depth)
    return functional.pad(image[:, :, first:last], (0, 0, 0, 0, first - start, stop - last))
