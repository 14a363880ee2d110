"""Random numbers and smooth random fields, drawn from one CPU generator so that CPU and GPU see the same draws."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["happens", "log_uniform", "normal_noise", "smooth_field", "uniform"]

Triple = tuple[int, int, int]


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """One number between low and high."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def log_uniform(generator: torch.Generator, low: float, high: float) -> float:
    """One factor between low and high, so drawn that halving is as likely as doubling."""
    return math.exp(uniform(generator, math.log(low), math.log(high)))


def happens(generator: torch.Generator, probability: float) -> bool:
    """True with the given probability; draws a number in any case."""
    return torch.rand((), generator=generator).item() < probability


def normal_noise(generator: torch.Generator, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Independent standard normal numbers (float32) on `device`."""
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)


def smooth_field(control: Tensor, shape: Triple, device: torch.device) -> Tensor:
    """A smooth field (C, D, H, W) on `device` through the control values (C, d, h, w) of a coarse grid on the CPU.

    Catmull-Rom interpolation along each axis; the outermost control points lie on the outermost voxels. It passes
    through the control values (their standard deviation is kept there) and its slope is continuous, which trilinear
    interpolation lacks; as three small matrix products it is also the faster of the two.
    """
    field = control.to(device, torch.float32)
    along_d, along_h, along_w = (
        _interpolation_matrix(size, points).to(device) for size, points in zip(shape, control.shape[1:], strict=True)
    )
    with torch.autocast(device.type, enabled=False):
        field = along_h @ (field @ along_w.T)
        field = along_d @ field.flatten(2)
    return field.unflatten(2, shape[1:])


@functools.lru_cache(maxsize=64)
def _interpolation_matrix(size: int, points: int) -> Tensor:
    """Catmull-Rom weights (size, points); beyond the ends the end values are repeated."""
    place = torch.linspace(0, points - 1, size, dtype=torch.float64)
    distance = (place[:, None] - torch.arange(-1, points + 1, dtype=torch.float64)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance <= 1, near, torch.where(distance <= 2, far, torch.zeros_like(distance)))
    inner = weights[:, 1:-1].clone()
    inner[:, 0] += weights[:, 0]
    inner[:, -1] += weights[:, -1]
    return inner.float()
