"""A state of 16-bit whole numbers on a grid of 2^-7: adding and subtracting are exact, so inversion is bit-exact.

A stream in bfloat16 loses the low bits of what it adds and cannot be inverted. On a fixed grid the increment is
rounded once, before it is added, and y = x + r(F) is undone by x = y - r(F) without any error at half the memory of
float32. The range is -256 to 256; sums beyond it wrap around, which is still invertible but wrong, and are counted.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["FRACTION_BITS", "decode", "encode", "halve_on_grid", "round_to_grid", "shift_by", "shift_sixteen_bits"]

FRACTION_BITS = 7
"""Chosen: instance norm keeps increments near 1, where a step of 2^-7 is bfloat16's, too. The differences that a Haar
transform makes grow from level to level, beyond 100 after four of them in real MR, and must stay within the range."""
_SCALE = float(2**FRACTION_BITS)
_LOWEST, _HIGHEST = -(2**15), 2**15 - 1


def encode(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values on the grid as int16, number of values outside the range, which are clamped). NaN becomes 0."""
    scaled = (values if values.dtype == torch.float64 else values.float()).mul(_SCALE).round_()
    outside = torch.count_nonzero(scaled.abs() > _HIGHEST) + torch.count_nonzero(scaled.isnan())
    return scaled.nan_to_num_(0.0).clamp_(_LOWEST, _HIGHEST).to(torch.int16), outside


def decode(state: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Grid values as floating point, exactly."""
    return state.to(dtype).mul_(1 / _SCALE)


def shift_by(state: torch.Tensor, increment: torch.Tensor, sign: int) -> torch.Tensor:
    """state += sign * rounded increment, in place. Returns how many sums left the range (they wrap around)."""
    scaled = (increment if increment.dtype == torch.float64 else increment.float()).mul(_SCALE).round_()
    # Twice the range is enough to see every overflow, and keeps the 32-bit sum itself from overflowing.
    total = scaled.nan_to_num_(0.0).clamp_(-(2.0**30), 2.0**30).to(torch.int32)
    del scaled
    total.mul_(sign).add_(state)
    state.copy_(total)  # keeps the low 16 bits: the sum modulo 2^16
    return torch.count_nonzero(total.sub_(state))


def shift_sixteen_bits(state: torch.Tensor, other: torch.Tensor, factor: float) -> torch.Tensor:
    """state += factor * other for two maps on the grid, in place; factor: 1, -1, or half of that, rounded down first.

    Returns how many sums left the range (they wrap around).
    """
    total = (other if abs(factor) == 1 else other >> 1).to(torch.int32)
    total.mul_(1 if factor > 0 else -1).add_(state)
    state.copy_(total)
    return torch.count_nonzero(total.sub_(state))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        wide = values if values.dtype == torch.float64 else values.float()
        return wide.mul(_SCALE).round_().mul_(1 / _SCALE)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def round_to_grid(values: torch.Tensor) -> torch.Tensor:
    """Values rounded to the grid, as float32 or float64; the gradient passes as if nothing had been rounded."""
    return _Round.apply(values)


class _Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.mul(_SCALE / 2).floor_().mul_(1 / _SCALE)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / 2


def halve_on_grid(values: torch.Tensor) -> torch.Tensor:
    """Half of values on the grid, rounded down to it; the gradient passes as if nothing had been rounded."""
    return _Halve.apply(values)
