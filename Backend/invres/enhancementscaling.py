"""The scale of a network's input and output in image quality transfer, channel by channel, and the way back from it."""

from __future__ import annotations

import torch

from .enhancementconfig import EnhancementPlan
from .interpolation import interpolated
from .networks import shuffle, unshuffle

__all__ = ["restored", "scaled_input", "scaled_target"]

Triple = tuple[int, int, int]


def scaled_input(low: torch.Tensor, plan: EnhancementPlan) -> torch.Tensor:
    """Patches (N, C, d, h, w) in the unit of a pair (see `imagepairs.ImagePair`) as the network takes them."""
    return (low - _channels(plan.input_mean, low)) / _channels(plan.input_std, low)


def scaled_target(high: torch.Tensor, low: torch.Tensor, plan: EnhancementPlan, factor: Triple) -> torch.Tensor:
    """What the network has to give for `low`, `unshuffle`d, in units of `plan.target_std`.

    low: (N, C, d, h, w), high: its middle without `BORDER`, (N, C, (d - 4) * f0, ...); both in the unit of a pair.
    """
    return unshuffle((high - _base(low, plan, factor)) / _channels(plan.target_std, high), factor)


def restored(output: torch.Tensor, low: torch.Tensor, plan: EnhancementPlan, factor: Triple) -> torch.Tensor:
    """The inverse of `scaled_target`: the network's output for `low` as high resolution in the unit of a pair."""
    return shuffle(output, factor) * _channels(plan.target_std, low) + _base(low, plan, factor)


def _base(low: torch.Tensor, plan: EnhancementPlan, factor: Triple) -> torch.Tensor:
    """What the network's output is added to. The interpolation takes the target's mean with it."""
    return interpolated(low, factor) if plan.residual else _channels(plan.target_mean, low)


def _channels(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
