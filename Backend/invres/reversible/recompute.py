"""What must be the same when a function is evaluated a second time: autocast, random numbers, statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

__all__ = ["AutocastState", "RandomState", "draws_random_numbers", "frozen_statistics"]


class AutocastState(NamedTuple):
    """Mixed precision as it was when the forward ran; backward runs outside the caller's autocast block."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> AutocastState:
        kind = tensor.device.type
        if not torch.amp.is_autocast_available(kind):
            return AutocastState("cpu", False, torch.bfloat16)
        return AutocastState(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def restored(self) -> contextlib.AbstractContextManager[None]:
        # Autocast's cache would keep a cast copy of every recomputed map, which looks like a parameter to it.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)

    def suspended(self) -> contextlib.AbstractContextManager[None]:
        """Autocast off, for code that chooses its precision itself."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=False)


class RandomState(NamedTuple):
    """The generators' states in front of a random function, so that recomputing draws the same numbers."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None
    device: torch.device

    @staticmethod
    def now(device: torch.device) -> RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(torch.get_rng_state(), cuda, device)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        devices = [self.device] if self.cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


def draws_random_numbers(module: nn.Module) -> bool:
    """True if a dropout layer of `module` is active."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in module.modules())


class frozen_statistics:
    """BatchNorm layers update copies of their running statistics, which are thrown away: they were updated once.

    Copies, because `checkpoint` wants the same tensors saved as in the first evaluation. May be entered repeatedly.
    """

    def __init__(self, module: nn.Module):
        self._layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._buffers: list[tuple[nn.Module, str, torch.Tensor]] = []

    def __enter__(self) -> None:
        active = [layer for layer in self._layers if layer.training]
        self._buffers = [(layer, *item) for layer in active for item in layer.named_buffers(recurse=False)]
        for layer, name, buffer in self._buffers:
            setattr(layer, name, buffer.clone())

    def __exit__(self, *exception: object) -> None:
        for layer, name, buffer in self._buffers:
            setattr(layer, name, buffer)
