"""Changes of resolution: the invertible squeeze and its learnable mixing, and the pooling that has no inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from ..reversible import State, Step, same_memory
from ..reversible.differentiation import evaluate_and_differentiate
from ..reversible.slabs import depth_slabs
from ..reversible.steps import GradientSink, Stack
from .haar import Lifting, haar, lift, lift_in_place
from .portable import interpolate

__all__ = ["Interpolate", "Mix", "Pool", "SqueezeDown", "SqueezeUp", "squeeze", "unsqueeze"]

Triple = tuple[int, int, int]


def squeeze(x: torch.Tensor, stride: Triple) -> torch.Tensor:
    """(N, C, D, H, W) -> (N, C * s, D / s0, H / s1, W / s2), s = s0 * s1 * s2: pixel shuffle downwards; a permutation.

    The s phases of one channel are neighbours in the result.
    """
    n, c, d, h, w = x.shape
    sd, sh, sw = stride
    x = x.reshape(n, c, d // sd, sd, h // sh, sh, w // sw, sw)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, c * sd * sh * sw, d // sd, h // sh, w // sw)


def unsqueeze(x: torch.Tensor, stride: Triple) -> torch.Tensor:
    """The exact inverse of `squeeze`."""
    n, c, d, h, w = x.shape
    sd, sh, sw = stride
    x = x.reshape(n, c // (sd * sh * sw), sd, sh, sw, d, h, w)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, c // (sd * sh * sw), d * sd, h * sh, w * sw)


class SqueezeDown(Step):
    """Splits each half (x1, x2) by channel; the last `moved` channels are squeezed and pushed, the others wait beneath.

    This is the encoder's split of figure 3: one part goes down, the other is the skip connection. What goes down stays
    in the memory that it has, its voxels sorted anew there: the state of a program has one size from end to end.
    wavelet: the phases are Haar-transformed, so that what comes down are means and differences of neighbours.
    """

    def __init__(self, moved: int, stride: Triple, wavelet: bool = False):
        super().__init__()
        self.moved = moved
        self.stride = stride
        self.wavelet = wavelet

    def forward(self, stack: Stack) -> Stack:
        return _split(stack, self.moved, self.stride, self.wavelet, self.on_grid)

    def inverse(self, stack: Stack) -> Stack:
        return _join(stack, self.stride, self.wavelet, self.on_grid)

    def advance(self, state: State) -> None:
        _push_squeezed(state, self.moved, self.stride, haar(self.stride) if self.wavelet else (), count=True)

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        # A squeeze is a permutation: its transpose is its inverse, for values and gradients alike.
        back = haar(self.stride, inverse=True) if self.wavelet else ()
        _pop_unsqueezed(state, self.moved, self.stride, back)
        transposed = haar(self.stride, transposed=True) if self.wavelet else ()
        _pop_unsqueezed(gradients, self.moved, self.stride, transposed)


class SqueezeUp(Step):
    """The inverse of `SqueezeDown`: the top pair is unsqueezed and joined with the skip channels beneath it."""

    def __init__(self, moved: int, stride: Triple, wavelet: bool = False):
        super().__init__()
        self.moved = moved
        self.stride = stride
        self.wavelet = wavelet

    def forward(self, stack: Stack) -> Stack:
        return _join(stack, self.stride, self.wavelet, self.on_grid)

    def inverse(self, stack: Stack) -> Stack:
        return _split(stack, self.moved, self.stride, self.wavelet, self.on_grid)

    def advance(self, state: State) -> None:
        back = haar(self.stride, inverse=True) if self.wavelet else ()
        _pop_unsqueezed(state, self.moved, self.stride, back, count=True)

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        _push_squeezed(state, self.moved, self.stride, haar(self.stride) if self.wavelet else ())
        transposed = haar(self.stride, inverse=True, transposed=True) if self.wavelet else ()
        _push_squeezed(gradients, self.moved, self.stride, transposed)


def _split(stack: Stack, moved: int, stride: Triple, wavelet: bool, on_grid: bool) -> Stack:
    *beneath, x1, x2 = stack
    kept = x1.shape[1] - moved
    down = [squeeze(x[:, kept:], stride) for x in (x1, x2)]
    if wavelet:
        down = [lift(x, stride, haar(stride), on_grid) for x in down]
    return (*beneath, x1[:, :kept], x2[:, :kept], *down)


def _join(stack: Stack, stride: Triple, wavelet: bool, on_grid: bool) -> Stack:
    *beneath, k1, k2, d1, d2 = stack
    if wavelet:
        d1, d2 = (lift(d, stride, haar(stride, inverse=True), on_grid) for d in (d1, d2))
    return (*beneath, *(torch.cat([k, unsqueeze(d, stride)], dim=1) for k, d in ((k1, d1), (k2, d2))))


def _push_squeezed(state: State, moved: int, stride: Triple, steps: Sequence[Lifting], count: bool = False) -> None:
    """count: note how many values of a fixed-point state leave its range."""
    for index in (len(state) - 2, len(state) - 1):
        x = state.writable(index)
        part, phases = x[:, x.shape[1] - moved :], math.prod(stride)
        view = _squeezed_view(part, stride)
        for run in _channel_runs(part, state.journal.slab_elements):
            view[:, run.start * phases : run.stop * phases] = _apart(squeeze(part[:, run], stride), x)
        _lift_by_slabs(state, view, stride, steps, count)
        state.push_part(view)


def _pop_unsqueezed(state: State, moved: int, stride: Triple, steps: Sequence[Lifting], count: bool = False) -> None:
    d2, d1 = state.pop(), state.pop()
    for index, d in ((-2, d1), (-1, d2)):
        x = state.writable(index)
        part, phases = x[:, x.shape[1] - moved :], math.prod(stride)
        if steps and not same_memory(d, x):
            d = d.clone()  # it may be the caller's
        _lift_by_slabs(state, d, stride, steps, count)
        for run in _channel_runs(part, state.journal.slab_elements):
            part[:, run] = _apart(unsqueeze(d[:, run.start * phases : run.stop * phases], stride), x)


def _lift_by_slabs(state: State, x: torch.Tensor, stride: Triple, steps: Sequence[Lifting], count: bool) -> None:
    """The steps applied in x's own memory; gradients in 16 bits are rounded once, at the end."""
    if not steps:
        return
    for start, stop in depth_slabs(x.shape, state.journal.slab_elements):
        slab = x[:, :, start:stop]
        wide = slab.float() if slab.dtype in (torch.bfloat16, torch.float16) else slab
        overflows = lift_in_place(wide, stride, steps)
        if wide is not slab:
            slab.copy_(wide)
        if count and state.fixed:
            state.journal.count_overflows(overflows)


def _squeezed_view(x: torch.Tensor, stride: Triple) -> torch.Tensor:
    """The same memory in the shape that `squeeze` gives: each channel's voxels become its phases' voxels."""
    n, c, d, h, w = x.shape
    sd, sh, sw = stride
    return x.view(n, c * sd * sh * sw, d // sd, h // sh, w // sw)


def _channel_runs(x: torch.Tensor, elements: int) -> list[slice]:
    """Channels of x in runs of about so many elements: what is sorted anew at a time."""
    size = max(1, elements // max(1, x[:, :1].numel()))
    return [slice(start, min(start + size, x.shape[1])) for start in range(0, x.shape[1], size)]


def _apart(piece: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A squeeze along one axis may be a mere view, which must not be copied onto its own memory."""
    return piece.clone() if same_memory(piece, x) else piece


class Mix(Step):
    """Learnable invertible resampling: an orthogonal matrix mixes the `phases` that a squeeze made of each channel.

    Q = (I - A)(I + A)^-1 with A skew-symmetric (Cayley transform, as in iUNets, arXiv 2005.05220), one Q per squeezed
    channel and half, the identity at the start (chosen: training starts from the fixed resampling in front of it).
    transpose=True applies Q^T, the upward direction.
    """

    fits_grid = False

    def __init__(self, channels: int, phases: int, transpose: bool = False):
        super().__init__()
        self.halves = nn.ModuleList(_CayleyMix(channels // phases, phases, transpose) for _ in range(2))

    def forward(self, stack: Stack) -> Stack:
        *beneath, x1, x2 = stack
        return (*beneath, self.halves[0](x1), self.halves[1](x2))

    def inverse(self, stack: Stack) -> Stack:
        *beneath, y1, y2 = stack
        return (*beneath, self.halves[0].inverse(y1), self.halves[1].inverse(y2))  # type: ignore[operator]

    def advance(self, state: State) -> None:
        for index, half in zip((-2, -1), self.halves, strict=True):
            state.replace(index, half(state[index]))

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        for index, half in zip((-2, -1), self.halves, strict=True):
            with torch.no_grad():
                state.replace(index, half.inverse(state[index]))  # type: ignore[operator]
            (found,) = evaluate_and_differentiate(half, [state[index]], [gradients[index]], sink)
            gradients.replace(index, found)


class _CayleyMix(nn.Module):
    """y = Q x over the phases of each channel; shapes (N, C * P, D, H, W) in and out."""

    def __init__(self, channels: int, phases: int, transpose: bool):
        super().__init__()
        self.phases = phases
        self.transpose = transpose
        self.free = nn.Parameter(torch.zeros(channels, phases, phases))

    def matrix(self) -> torch.Tensor:
        skew = self.free - self.free.transpose(1, 2)
        eye = torch.eye(self.phases, dtype=skew.dtype, device=skew.device).expand_as(skew)
        q = torch.linalg.solve(eye + skew, eye - skew)
        return q.transpose(1, 2) if self.transpose else q

    def _apply_matrix(self, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        n, c, d, h, w = x.shape
        # An orthogonal matrix rounded to bfloat16 is not orthogonal: the mixing stays in the state's own precision.
        with torch.autocast(x.device.type, enabled=False):
            parts = x.reshape(n, c // self.phases, self.phases, d * h * w)
            return torch.matmul(q.to(x.dtype), parts).reshape(n, c, d, h, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._apply_matrix(x, self.matrix())

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self._apply_matrix(y, self.matrix().transpose(1, 2))


class Pool(nn.Module):
    """Max pooling of both halves, then a 1x1x1 convolution across them to the next width (Partially-InvRes, down)."""

    def __init__(self, in_channels: int, out_channels: int, stride: Triple):
        super().__init__()
        self.stride = stride
        self.convs = nn.ModuleList(nn.Conv3d(in_channels, out_channels // 2, 1) for _ in range(2))

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.combine(self.shrink(x1), self.shrink(x2))

    def shrink(self, half: torch.Tensor) -> torch.Tensor:
        """One half of the state, pooled."""
        return functional.max_pool3d(half, self.stride)

    def combine(self, pooled1: torch.Tensor, pooled2: torch.Tensor) -> Sequence[torch.Tensor]:
        """Both halves at the coarser level."""
        pooled = torch.cat([pooled1, pooled2], dim=1)
        return [conv(pooled) for conv in self.convs]


class Interpolate(nn.Module):
    """A 1x1x1 convolution to the finer width, then trilinear interpolation (Partially-InvRes, up)."""

    def __init__(self, in_channels: int, out_channels: int, stride: Triple):
        super().__init__()
        self.scale = tuple(float(s) for s in stride)
        self.conv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> Sequence[torch.Tensor]:
        return [self.widen(half) for half in self.narrow(x1, x2)]

    def narrow(self, x1: torch.Tensor, x2: torch.Tensor) -> Sequence[torch.Tensor]:
        """Both halves at the finer width, still coarse."""
        return self.conv(torch.cat([x1, x2], dim=1)).chunk(2, dim=1)

    def widen(self, half: torch.Tensor) -> torch.Tensor:
        """One half at the finer resolution."""
        return interpolate(half, scale_factor=self.scale)
