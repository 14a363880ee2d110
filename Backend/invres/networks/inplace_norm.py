"""In-place activated normalisation: norm, affine map and leaky ReLU in the memory of their input.

Rota Bulò, Porzi, Kontschieder, In-Place Activated BatchNorm (arXiv 1712.02616), and the same for instance and group
norm, which Wang, Oda and Mori (Memory-Efficient FCN, 2020) name as future work. Plain torch: nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import InvresError

__all__ = ["SMALLEST_SCALE", "InPlaceBatchNorm", "InPlaceGroupNorm"]

SMALLEST_SCALE = 1e-3
"""|gamma| is taken to be this at least, with gamma's sign; chosen.

The way back divides by gamma: what rounding does to z, it does to x_hat divided by gamma. The original takes
|gamma| + 1e-5, which is never negative; with the sign kept, ordinary weights give what they give in the ordinary norm.
The gradient goes to gamma as if there were no bound, so that it can leave it."""
PARTS = 16  # a map is worked on in about so many parts; what one of them needs is small beside the map
PART_ELEMENTS = 2**16  # but a smaller part would take longer to start than to compute


class _Norm(NamedTuple):
    """What is normalised together: all samples or each by itself, so many groups of channels; the rest is numbers."""

    over_batch: bool
    groups: int
    slope: float
    eps: float


class InPlaceGroupNorm(nn.GroupNorm):
    """Group norm (instance norm: as many groups as channels), then leaky ReLU: overwrites its (N, C, D, H, W).

    The input must be what nobody else needs, like the output of a convolution. Where autograd can tell that somebody
    does, there is an error: at once for a leaf that wants a gradient, in backward for an operator that has saved it.
    Raises InvresError for such a leaf and for a slope that has no inverse.
    """

    def __init__(self, groups: int, channels: int, slope: float):
        super().__init__(groups, channels)
        self.slope = _checked(slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = _Norm(False, self.num_groups, self.slope, self.eps)
        return _apply(x, self.weight, self.bias, norm, None)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope}"


class InPlaceBatchNorm(nn.BatchNorm3d):
    """Batch norm and leaky ReLU, else as `InPlaceGroupNorm`; running statistics are torch's."""

    def __init__(self, channels: int, slope: float):
        super().__init__(channels)
        self.slope = _checked(slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        norm = _Norm(True, self.num_features, self.slope, self.eps)
        if not self.training:
            return _apply(x, self.weight, self.bias, norm, (self.running_mean, self.running_var))[0]
        count = x.numel() // max(1, x.shape[1])
        if count < 2:
            raise InvresError(f"Batch norm needs two values a channel or more while training, got {tuple(x.shape)}.")
        x, mean, variance = _apply(x, self.weight, self.bias, norm, None)
        assert self.running_mean is not None and self.running_var is not None  # as in every one made here
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.view(-1), self.momentum)
            self.running_var.lerp_(variance.view(-1) * (count / (count - 1)), self.momentum)
        return x

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope}"


def _checked(slope: float) -> float:
    if not slope > 0:
        raise InvresError(
            f"In-place normalisation needs a leaky ReLU with a slope above 0, got {slope}.",
            hint="Backward recovers the input from the output, which a slope of 0 has cut off; 0.01 is usual.",
        )
    return slope


def _apply(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    norm: _Norm,
    known: tuple[torch.Tensor | None, torch.Tensor | None] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x itself, overwritten, and the mean and variance it was normalised with. known: both, if they are not x's own."""
    if x._is_view() or (torch.is_grad_enabled() and x.is_leaf and x.requires_grad):
        what = "a view of another tensor" if x._is_view() else "a leaf that wants a gradient"
        raise InvresError(
            f"In-place normalisation would overwrite {what}.",
            hint="Give it the output of a convolution, or a clone.",
        )
    return _Normalise.apply(x, gamma, beta, norm, known)


class _Normalise(torch.autograd.Function):
    """Forward: z = leaky_relu(gamma x_hat + beta) over x. Backward: x_hat from z, then the gradient of the norm."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, norm: _Norm, known: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        map_ = _grouped(x, norm)
        dtype = _exact(x)
        scale, shift = _grouped_weights(gamma, beta, norm, dtype)
        size = (1 if norm.over_batch else x.shape[0], norm.groups, 1, 1, 1, 1)
        if known is None:
            mean, variance = (torch.empty(size, dtype=dtype, device=x.device) for _ in range(2))
        else:
            mean, variance = (one.to(dtype).view(size) for one in known)
        for part in _parts(map_, norm):
            whole, groups = map_[part], part[1]
            if known is None:
                variance[part], mean[part] = _variance_and_mean(whole, _slabs(whole, map_), norm, dtype)
            factor = scale[:, groups] * (variance[part] + norm.eps).rsqrt_()
            for slab in _slabs(whole, map_):
                piece = whole[slab]
                work = piece.to(dtype)  # in single and double precision the map itself
                work.sub_(mean[part]).mul_(factor).add_(shift[:, groups])
                functional.leaky_relu_(work, norm.slope)
                if work.dtype != piece.dtype:
                    piece.copy_(work)
        ctx.norm, ctx.own_statistics = norm, known is None
        ctx.mark_dirty(x)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, (variance + norm.eps).rsqrt_(), gamma, beta)
        return x, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_z: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if of_z is None:
            return (None,) * 5
        z, rstd, gamma, beta = ctx.saved_tensors
        norm, dtype = ctx.norm, _exact(z)
        wants_x = ctx.needs_input_grad[0]
        of_x = torch.empty_like(z) if wants_x else None
        scale, shift = _grouped_weights(gamma, beta, norm, dtype)
        of_scale, of_shift = torch.zeros_like(scale), torch.zeros_like(scale)
        map_, of_map = _grouped(z, norm), _grouped(of_z, norm)
        count = map_[:, 0].numel() if norm.over_batch else map_[0, 0].numel()
        each = (0, 3, 4, 5) if norm.over_batch else (3, 4, 5)
        for part in _parts(map_, norm):
            whole, of_whole, groups = map_[part], of_map[part], part[1]
            factor, offset = scale[:, groups], shift[:, groups]
            slabs = _slabs(whole, map_)
            sums = products = torch.zeros((), dtype=dtype, device=z.device)
            for slab in slabs:
                of_y, x_hat = _before_activation(of_whole[slab], whole[slab], factor, offset, norm, dtype)
                sums = sums + of_y.sum(each, keepdim=True)
                products = products + (of_y * x_hat).sum(each, keepdim=True)
            of_shift[:, groups] += sums.sum(0, keepdim=True)
            of_scale[:, groups] += products.sum(0, keepdim=True)
            if of_x is None:
                continue
            mean, product = ((t * factor).sum(2, keepdim=True).div_(count) for t in (sums, products))
            target = _grouped(of_x, norm)[part]
            for slab in slabs:
                if len(slabs) > 1:
                    of_y, x_hat = _before_activation(of_whole[slab], whole[slab], factor, offset, norm, dtype)
                of_y.mul_(factor)
                if ctx.own_statistics:
                    of_y.sub_(mean).addcmul_(x_hat, product, value=-1)
                target[slab] = of_y.mul_(rstd[part])
        return of_x, of_scale.view(-1).to(gamma.dtype), of_shift.view(-1).to(beta.dtype), None, None


def _exact(x: torch.Tensor) -> torch.dtype:
    """The type that is computed in: 16 bits would be too few for statistics."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _grouped(x: torch.Tensor, norm: _Norm) -> torch.Tensor:
    """(N, C, D, H, W) as a view (N, groups, channels of each, D, H, W), whatever its memory format."""
    return x.unflatten(1, (norm.groups, -1))


def _grouped_weights(
    gamma: torch.Tensor, beta: torch.Tensor, norm: _Norm, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma, bounded below, and beta as (1, groups, channels of each, 1, 1, 1)."""
    scale, shift = (t.detach().to(dtype).view(1, norm.groups, -1, 1, 1, 1) for t in (gamma, beta))
    bound = torch.full_like(scale, SMALLEST_SCALE).copysign_(scale)
    return torch.where(scale.abs() < SMALLEST_SCALE, bound, scale), shift


def _parts(map_: torch.Tensor, norm: _Norm) -> Iterator[tuple[slice, slice]]:
    """Indices (samples, groups) of a grouped map, of parts that each hold whole groups."""
    together = map_.shape[0] if norm.over_batch else 1
    step = max(1, _wanted(map_) // max(1, together * map_[0, 0].numel()))
    for sample in range(0, map_.shape[0], together):
        for group in range(0, norm.groups, step):
            yield slice(sample, sample + together), slice(group, group + step)


def _slabs(part: torch.Tensor, map_: torch.Tensor) -> list[tuple[slice, ...]]:
    """Indices into a part of `map_`: slabs of depth, where a single group is large."""
    depth = part.shape[3]
    step = max(1, _wanted(map_) * depth // max(1, part.numel()))
    return [(slice(None),) * 3 + (slice(first, first + step),) for first in range(0, depth, step)]


def _wanted(map_: torch.Tensor) -> int:
    """Elements that are worked on at a time."""
    return max(PART_ELEMENTS, map_.numel() // PARTS)


def _variance_and_mean(
    part: torch.Tensor, slabs: list[tuple[slice, ...]], norm: _Norm, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a part that is normalised together; those of its slabs are joined without rounding away a large mean."""
    axes = (0, 2, 3, 4, 5) if norm.over_batch else (2, 3, 4, 5)
    found = [torch.var_mean(part[slab].to(dtype), axes, correction=0, keepdim=True) for slab in slabs]
    shares = [part[slab].shape[3] / part.shape[3] for slab in slabs]
    mean = torch.stack([share * m for share, (_, m) in zip(shares, found, strict=True)]).sum(0)
    spread = [share * (v + (m - mean).square()) for share, (v, m) in zip(shares, found, strict=True)]
    return torch.stack(spread).sum(0), mean


def _before_activation(
    of_z: torch.Tensor, z: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor, norm: _Norm, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of factor x_hat + offset, and x_hat, both fresh, from z and its gradient."""
    z = z.to(dtype)
    of_y = torch.ops.aten.leaky_relu_backward(of_z.to(dtype), z, norm.slope, True)
    return of_y, functional.leaky_relu(z, 1 / norm.slope).sub_(offset).div_(factor)
