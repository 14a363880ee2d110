"""The Haar transform of the phases that a squeeze makes of a channel, in lifting steps: exact on whole numbers too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..reversible.fixed_point import halve_on_grid, shift_sixteen_bits

__all__ = ["Lifting", "haar", "lift", "lift_in_place"]

Triple = tuple[int, int, int]


class Lifting(NamedTuple):
    """phase `target` += factor * phase `source` along one axis. Undone by -factor, transposed by changing places."""

    axis: int
    target: int
    source: int
    factor: float


def haar(stride: Triple, inverse: bool = False, transposed: bool = False) -> tuple[Lifting, ...]:
    """The steps that turn two neighbours (a, b) along each axis into their mean and difference, ((a + b) / 2, b - a).

    inverse: the way back. transposed: what turns a gradient after the steps into one before them.
    """
    steps = []
    for axis in (axis for axis, step in enumerate(stride) if step == 2):
        steps += [Lifting(axis, 1, 0, -1.0), Lifting(axis, 0, 1, 0.5)]
    if inverse:
        steps = [step._replace(factor=-step.factor) for step in reversed(steps)]
    if transposed:
        steps = [step._replace(target=step.source, source=step.target) for step in reversed(steps)]
    return tuple(steps)


def lift(x: torch.Tensor, stride: Triple, steps: Sequence[Lifting], on_grid: bool = False) -> torch.Tensor:
    """The steps applied to the phases in x (N, C * P, D, H, W), P = product of stride; differentiable, out of place.

    on_grid: halves are rounded down on the grid of the fixed-point state, as its whole numbers are.
    """
    phases = list(_by_phase(x, stride).flatten(2, 4).unbind(2))
    for step in steps:
        for target, source in _pairs(stride, step):
            moved = phases[source]
            if abs(step.factor) != 1:
                moved = halve_on_grid(moved) if on_grid else 0.5 * moved
            phases[target] = phases[target] + moved if step.factor > 0 else phases[target] - moved
    return torch.stack(phases, dim=2).reshape(x.shape)


def lift_in_place(x: torch.Tensor, stride: Triple, steps: Sequence[Lifting]) -> torch.Tensor:
    """The same in x's own memory, without gradients. Returns how many sums left the range of int16 (0 for others)."""
    phases = _by_phase(x, stride).flatten(2, 4).unbind(2)
    overflows = torch.zeros((), dtype=torch.int64, device=x.device)
    for step in steps:
        for target, source in _pairs(stride, step):
            if x.dtype == torch.int16:
                overflows += shift_sixteen_bits(phases[target], phases[source], step.factor)
            else:
                phases[target].add_(phases[source], alpha=step.factor)
    return overflows


def _by_phase(x: torch.Tensor, stride: Triple) -> torch.Tensor:
    """A view (N, C, s0, s1, s2, D, H, W)."""
    n, c, *size = x.shape
    return x.view(n, c // (stride[0] * stride[1] * stride[2]), *stride, *size)


def _pairs(stride: Triple, step: Lifting) -> list[tuple[int, int]]:
    """(target, source) among the flattened phases, for every place along the other axes."""
    numbers = np.arange(stride[0] * stride[1] * stride[2]).reshape(stride)
    target, source = (numbers.take(place, step.axis).ravel().tolist() for place in (step.target, step.source))
    return list(zip(target, source, strict=True))
