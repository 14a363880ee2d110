"""Where a backward pass collects the gradients of parameters."""

from __future__ import annotations

import torch

from .roles import tell

__all__ = ["GradientSink"]


class GradientSink:
    """Collects parameter gradients by identity, so that a block used twice gets the sum."""

    def __init__(self) -> None:
        self._gradients: dict[int, torch.Tensor] = {}

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        known = self._gradients.get(id(parameter))
        self._gradients[id(parameter)] = total = gradient if known is None else known + gradient
        tell("gradients", total)

    def get(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return self._gradients.get(id(parameter))
