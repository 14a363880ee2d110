"""The stack of tensors that a reversible program works on, changed in place wherever that harms nobody."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from .recompute import RandomState, draws_random_numbers

__all__ = ["State"]


class State:
    """A stack of tensors; the current level's two halves (x1, x2) are on top, waiting levels lie beneath.

    A tensor that came from outside is never written to: the first change makes a new one, later changes are in
    place. This is what lets a caller keep and reuse its input (a skip connection, a raw image).
    """

    def __init__(self, tensors: Iterable[torch.Tensor], owned: bool = False):
        self.tensors = list(tensors)
        self._owned = [owned] * len(self.tensors)
        self.stash: list[torch.Tensor] = []
        self.random_states: list[RandomState | None] = []

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensors[index]

    def __len__(self) -> int:
        return len(self.tensors)

    def add(self, index: int, value: torch.Tensor, sign: int = 1) -> None:
        """tensors[index] += sign * value, keeping the state's own dtype."""
        if self._owned[index]:
            self.tensors[index].add_(value, alpha=sign)
        else:
            own = self.tensors[index]
            self.tensors[index] = torch.add(own, value.to(own.dtype), alpha=sign)
            self._owned[index] = True

    def replace(self, index: int, value: torch.Tensor) -> None:
        """Puts a fresh tensor in place of tensors[index]."""
        self.tensors[index] = value
        self._owned[index] = True

    def writable(self, index: int) -> torch.Tensor:
        """tensors[index], copied first if it came from outside."""
        if not self._owned[index]:
            self.replace(index, self.tensors[index].clone())
        return self.tensors[index]

    def push(self, value: torch.Tensor) -> None:
        """Puts a tensor on top; copied if it shares memory with another, which changing it in place would change."""
        storage = value.untyped_storage()._cdata
        shared = value._is_view() or any(t.untyped_storage()._cdata == storage for t in self.tensors)
        self.tensors.append(value.clone() if shared else value)
        self._owned.append(True)

    def pop(self) -> torch.Tensor:
        """Takes the top tensor off."""
        self._owned.pop()
        return self.tensors.pop()

    def evaluate(self, module: nn.Module, *sources: torch.Tensor) -> Any:
        """module(*sources), noting where the random generators stood if the module draws from them."""
        draws = draws_random_numbers(module)
        self.random_states.append(RandomState.now(sources[0].device) if draws else None)
        return module(*sources)

    def same_numbers(self) -> AbstractContextManager[None]:
        """Inside it, the last module that `evaluate` ran draws the same numbers again; each call goes one back."""
        random_state = self.random_states.pop()
        return nullcontext() if random_state is None else random_state.restored()
