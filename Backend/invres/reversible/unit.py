"""A norm - leaky ReLU - convolution unit with its gradient written out by hand, in slabs, with few live maps.

Plain autograd keeps the normalised map, and makes the gradients of convolution, activation and norm one after the
other, each a whole map. Here every map but one exists in slabs of depth only: the convolution is evaluated on a slab
with a border of its neighbours' planes, the statistics of the norm are those of the whole map, exactly. The one is the
gradient in front of the convolution, which the norm's backward has to see as a whole; it is held for a part of the
channels at a time if the memory setting says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .journal import Journal
from .recompute import AutocastState
from .sink import GradientSink
from .slab_convolution import convolve, convolve_backward
from .slabs import channel_parts, depth_slabs, load

__all__ = ["Unit", "apply_units", "differentiate_units"]

UsePlanes = Callable[[int, int, torch.Tensor], None]
ALL = slice(None)


@dataclass(frozen=True)
class Unit:
    """The layers of one unit. norm: group norm with affine parameters (instance norm: a channel a group), or None.

    conv: of odd kernel, padded to keep the size, stride 1, one group.
    """

    norm: nn.GroupNorm | None
    slope: float
    conv: nn.Conv3d

    @property
    def border(self) -> int:
        """Planes on each side that a slab needs from its neighbours."""
        return self.conv.kernel_size[0] // 2


@dataclass
class _Normalised:
    """act(norm(x)) of a source map, made piece by piece. mean, rstd, scale, shift: (N, C, 1, 1, 1) or None."""

    unit: Unit
    source: torch.Tensor
    dtype: torch.dtype
    mean: torch.Tensor | None = None
    rstd: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @staticmethod
    def of(unit: Unit, source: torch.Tensor, journal: Journal) -> _Normalised:
        norm = unit.norm
        if norm is None:
            return _Normalised(unit, source, journal.dtype)
        n, c = source.shape[:2]
        per_group = c // norm.num_groups
        found = torch.empty((2, n, norm.num_groups), dtype=journal.dtype, device=source.device)
        parts = 1 if source.dtype == journal.dtype else -(-source.numel() // journal.slab_elements)
        for part in channel_parts(c, per_group, parts):
            piece = load(source, (ALL, part), journal.dtype).to(journal.dtype).unflatten(1, (-1, per_group))
            groups = slice(part.start // per_group, part.stop // per_group)
            found[1, :, groups], found[0, :, groups] = torch.var_mean(piece, dim=(2, 3, 4, 5), correction=0)
            del piece
        mean, variance = found.repeat_interleave(per_group, dim=2).view(2, n, c, 1, 1, 1)
        rstd = variance.add_(norm.eps).rsqrt_()
        scale = rstd * norm.weight.view(1, c, 1, 1, 1)
        return _Normalised(unit, source, journal.dtype, mean, rstd, scale, norm.bias.view(1, c, 1, 1, 1) - mean * scale)

    def before_activation(self, channels: slice, start: int, stop: int) -> torch.Tensor:
        """norm(x): a fresh tensor, or a view of the source where there is no norm."""
        x = load(self.source, (ALL, channels, slice(start, stop)), self.dtype)
        if self.scale is None or self.shift is None:
            return x
        return torch.addcmul(self.shift[:, channels], x, self.scale[:, channels])

    def planes(self, channels: slice, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """act(norm(x)) from plane `start` to before `stop`, zero outside the map, as the convolution pads it."""
        n, c, depth, height, width = self.source[:, channels].shape
        first, last = max(start, 0), min(stop, depth)
        result = torch.empty((n, c, stop - start, height, width), dtype=dtype, device=self.source.device)
        result[:, :, : first - start].zero_()
        result[:, :, last - start :].zero_()
        inside = result[:, :, first - start : last - start]
        if dtype == self.dtype and self.scale is not None and self.shift is not None:
            x = load(self.source, (ALL, channels, slice(first, last)), self.dtype)
            torch.addcmul(self.shift[:, channels], x, self.scale[:, channels], out=inside)
        else:
            inside.copy_(self.before_activation(channels, first, last))
        nn.functional.leaky_relu_(inside, self.unit.slope)
        return result


def _compute_dtype(autocast: AutocastState, journal: Journal) -> torch.dtype:
    return autocast.dtype if autocast.enabled and journal.dtype == torch.float32 else journal.dtype


def _convolved_planes(
    normalised: _Normalised, journal: Journal, dtype: torch.dtype, use: UsePlanes, shape: Sequence[int]
) -> None:
    """conv(act(norm(x))) slab by slab, each handed to `use`."""
    conv, border = normalised.unit.conv, normalised.unit.border
    weight = conv.weight.to(dtype)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    padding = (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
    for start, stop in depth_slabs(shape, journal.slab_elements):
        planes = normalised.planes(ALL, start - border, stop + border, dtype)
        result = convolve(planes, weight, bias, padding)
        del planes
        use(start, stop, result)


def apply_units(
    units: Sequence[Unit], source: torch.Tensor, journal: Journal, use: UsePlanes, autocast: AutocastState
) -> None:
    """units[-1](... units[0](source)) slab by slab, each slab handed to `use(start, stop, planes)`.

    source: (N, C, D, H, W), floating point or fixed point. Autocast itself MUST be off: `autocast` says what it was.
    """
    dtype = _compute_dtype(autocast, journal)
    for map_ in _inner_maps(units, source, journal, dtype):
        source = map_
    _convolved_planes(_Normalised.of(units[-1], source, journal), journal, dtype, use, source.shape)


def _inner_maps(
    units: Sequence[Unit], source: torch.Tensor, journal: Journal, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The maps between the units, whole, in the dtype that plain autograd would have them in."""
    maps = []
    for unit in units[:-1]:
        n, _, *size = source.shape
        result = torch.empty((n, unit.conv.out_channels, *size), dtype=dtype, device=source.device)

        def write(start: int, stop: int, planes: torch.Tensor, result: torch.Tensor = result) -> None:
            result[:, :, start:stop] = planes

        _convolved_planes(_Normalised.of(unit, source, journal), journal, dtype, write, source.shape)
        maps.append(result)
        source = result
    return maps


def differentiate_units(
    units: Sequence[Unit],
    source: torch.Tensor,
    gradient: torch.Tensor,
    of_source: torch.Tensor,
    sink: GradientSink,
    journal: Journal,
    use: UsePlanes,
    autocast: AutocastState,
) -> None:
    """Evaluates the units again (slabs of the output go to `use`); adds the gradient of `source` to `of_source`.

    gradient: of the output. Parameter gradients go to `sink`. Each convolution is evaluated once.
    """
    dtype = _compute_dtype(autocast, journal)
    inner = _inner_maps(units, source, journal, dtype)
    sources = [source, *inner]
    del inner
    for index in reversed(range(len(units))):
        normalised = _Normalised.of(units[index], sources.pop(), journal)
        last = index == len(units) - 1
        inner_source = normalised.source
        target = of_source if index == 0 else torch.zeros_like(inner_source, dtype=dtype)
        _differentiate(normalised, gradient, target, sink, journal, use if last else None, dtype)
        gradient = target


def _differentiate(
    normalised: _Normalised,
    gradient: torch.Tensor,
    of_source: torch.Tensor,
    sink: GradientSink,
    journal: Journal,
    use: UsePlanes | None,
    dtype: torch.dtype,
) -> None:
    unit, source = normalised.unit, normalised.source
    group = 1 if unit.norm is None else source.shape[1] // unit.norm.num_groups
    parts = list(channel_parts(source.shape[1], group, -(-source.numel() // journal.part_elements)))
    if use is not None and len(parts) > 1:
        _convolved_planes(normalised, journal, dtype, use, source.shape)
        use = None
    conv = unit.conv
    of_weight = torch.zeros_like(conv.weight) if conv.weight.requires_grad else None
    of_norm = (
        None if unit.norm is None else torch.zeros((2, source.shape[1]), dtype=journal.dtype, device=source.device)
    )
    for index, part in enumerate(parts):
        inner = _through_convolution(normalised, part, gradient, of_weight, index == 0, sink, journal, use, dtype)
        _through_norm(normalised, part, inner, of_source, of_norm, journal)
        del inner
    if of_weight is not None:
        sink.add(conv.weight, of_weight)
    if unit.norm is not None and of_norm is not None:
        for parameter, found in zip((unit.norm.weight, unit.norm.bias), of_norm, strict=True):
            if parameter.requires_grad:
                sink.add(parameter, found.to(parameter.dtype))


def _through_convolution(
    normalised: _Normalised,
    part: slice,
    gradient: torch.Tensor,
    of_weight: torch.Tensor | None,
    first: bool,
    sink: GradientSink,
    journal: Journal,
    use: UsePlanes | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient in front of the convolution for the channels of `part`, as one map."""
    conv, border, source = normalised.unit.conv, normalised.unit.border, normalised.source
    depth = source.shape[2]
    weight = conv.weight[:, part].to(dtype).contiguous()
    bias = None if conv.bias is None else conv.bias.to(dtype)
    padding = (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
    of_bias = torch.zeros_like(conv.bias) if first and conv.bias is not None and conv.bias.requires_grad else None
    mask = [True, of_weight is not None, of_bias is not None]
    inner = torch.zeros(source[:, part].shape, dtype=dtype, device=source.device)
    for start, stop in depth_slabs(gradient.shape, journal.slab_elements):
        planes = normalised.planes(part, start - border, stop + border, dtype)
        if use is not None:
            use(start, stop, convolve(planes, weight, bias, padding))
        after = gradient[:, :, start:stop].to(dtype)
        of_planes, w, b = convolve_backward(after, planes, weight, padding, mask)
        del planes, after
        # A border plane belongs to two slabs: each adds its share.
        low, high = max(start - border, 0), min(stop + border, depth)
        assert of_planes is not None
        inner[:, :, low:high].add_(of_planes[:, :, low - start + border : high - start + border])
        del of_planes
        if of_weight is not None and w is not None:
            of_weight[:, part].add_(w)
        if of_bias is not None and b is not None:
            of_bias.add_(b)
    if of_bias is not None:
        sink.add(conv.bias, of_bias)  # type: ignore[arg-type]
    return inner


def _through_norm(
    normalised: _Normalised,
    part: slice,
    inner: torch.Tensor,
    of_source: torch.Tensor,
    of_norm: torch.Tensor | None,
    journal: Journal,
) -> None:
    """Adds the gradient of the source's channels `part` to `of_source`, given the one behind the activation."""
    unit, wide = normalised.unit, journal.dtype
    n, c = inner.shape[:2]
    elements = max(1, journal.slab_elements // 2)
    total = torch.zeros((n, c, 1, 1, 1), dtype=wide, device=inner.device)
    along = torch.zeros_like(total)
    for start, stop in depth_slabs(inner.shape, elements):
        planes = inner[:, :, start:stop]
        before = normalised.before_activation(part, start, stop).to(planes.dtype)
        planes.copy_(torch.ops.aten.leaky_relu_backward(planes, before, unit.slope, False))
        if normalised.mean is None:
            of_source[:, part, start:stop].add_(planes)
            continue
        del before
        centred = load(normalised.source, (ALL, part, slice(start, stop)), wide) - normalised.mean[:, part]
        total += planes.sum((2, 3, 4), keepdim=True, dtype=wide)
        along += centred.mul_(planes).sum((2, 3, 4), keepdim=True)
    if unit.norm is None or normalised.mean is None or normalised.rstd is None or of_norm is None:
        return
    mean, rstd = normalised.mean[:, part], normalised.rstd[:, part]
    of_norm[0, part] = (along * rstd).sum(0).flatten()
    of_norm[1, part] = total.sum(0).flatten()
    # dx = rstd * (gamma * du - mean(gamma * du) - xhat * mean(gamma * du * xhat)), the means over the group.
    gamma = unit.norm.weight[part].to(wide).view(1, c, 1, 1, 1)
    per_group = normalised.source.shape[1] // unit.norm.num_groups
    count = per_group * normalised.source[0, 0].numel()

    def group_mean(values: torch.Tensor) -> torch.Tensor:
        sums = (values * gamma).view(n, c // per_group, per_group).sum(2) / count
        return sums.repeat_interleave(per_group, dim=1).view(n, c, 1, 1, 1)

    slope = group_mean(along * rstd) * rstd * rstd
    offset = mean * slope - group_mean(total) * rstd
    for start, stop in depth_slabs(inner.shape, elements):
        x = load(normalised.source, (ALL, part, slice(start, stop)), wide)
        change = torch.addcmul(offset, x, slope, value=-1)
        change.addcmul_(inner[:, :, start:stop], rstd * gamma)
        of_source[:, part, start:stop].add_(change)
