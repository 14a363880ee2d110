"""The stack of tensors that a reversible program works on, changed in place wherever that harms nobody."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from .fixed_point import decode, encode, shift_by
from .journal import Journal
from .recompute import RandomState, draws_random_numbers
from .roles import tell
from .slabs import depth_slabs

__all__ = ["State", "same_memory"]


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if both share a storage. By identity, because hollow tensors have no address."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


class State:
    """A stack of tensors; the current level's two halves (x1, x2) are on top, waiting levels lie beneath.

    A tensor that came from outside is never written to: the first change makes a new one, later changes are in
    place. This is what lets a caller keep and reuse its input (a skip connection, a raw image).
    fixed: the tensors are int16 on the grid of `fixed_point`; `state[i]` then gives a decoded copy.
    """

    def __init__(
        self, tensors: Iterable[torch.Tensor], owned: bool = False, journal: Journal | None = None, fixed: bool = False
    ):
        self.journal = journal or Journal()
        self.fixed = fixed
        self.tensors: list[torch.Tensor] = []
        self._owned: list[bool] = []
        for tensor in tensors:
            plain = tensor.contiguous()
            self.tensors.append(plain)
            self._owned.append(owned or plain is not tensor)
        tell("state", *self.tensors)

    def __getitem__(self, index: int) -> torch.Tensor:
        tensor = self.tensors[index]
        return decode(tensor, self.journal.dtype) if tensor.dtype == torch.int16 else tensor

    def __len__(self) -> int:
        return len(self.tensors)

    def add(self, index: int, value: torch.Tensor, sign: int = 1) -> None:
        """tensors[index] += sign * value, keeping the state's own dtype."""
        if self.fixed:
            for start, stop in depth_slabs(value.shape, self.journal.slab_elements):
                self.add_planes(index, start, stop, value[:, :, start:stop], sign)
        elif self._owned[index]:
            self.tensors[index].add_(value, alpha=sign)
        else:
            own = self.tensors[index]
            self.replace(index, torch.add(own, value.to(own.dtype), alpha=sign).contiguous())

    def add_planes(self, index: int, start: int, stop: int, value: torch.Tensor, sign: int = 1) -> None:
        """The same for the planes from `start` to before `stop`."""
        planes = self.writable(index)[:, :, start:stop]
        if not self.fixed:
            planes.add_(value, alpha=sign)
            return
        overflows = shift_by(planes, value, sign)
        if sign > 0:
            self.journal.count_overflows(overflows)

    def replace(self, index: int, value: torch.Tensor) -> None:
        """Puts a fresh tensor in place of tensors[index]."""
        self.tensors[index] = value
        tell("state", value)
        self._owned[index] = True

    def writable(self, index: int) -> torch.Tensor:
        """tensors[index], copied first if it came from outside."""
        if not self._owned[index]:
            self.replace(index, self.tensors[index].clone())
        return self.tensors[index]

    def push(self, value: torch.Tensor) -> None:
        """Puts a tensor on top; copied if it shares memory with another, which changing it in place would change."""
        if self.fixed and value.dtype != torch.int16:
            value, outside = encode(value)
            self.journal.count_overflows(outside)
        shared = value._is_view() or any(same_memory(t, value) for t in self.tensors)
        self.tensors.append(value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous())
        tell("state", self.tensors[-1])
        self._owned.append(True)

    def push_part(self, view: torch.Tensor) -> None:
        """Puts a view of a writable tensor of the stack on top: nobody reads that part of it until `view` is popped."""
        self.tensors.append(view)
        self._owned.append(True)

    def pop(self) -> torch.Tensor:
        """Takes the top tensor off."""
        self._owned.pop()
        return self.tensors.pop()

    def evaluate(self, module: nn.Module, *sources: torch.Tensor) -> Any:
        """module(*sources), noting where the random generators stood if the module draws from them."""
        self.note_random_numbers(module)
        return module(*sources)

    def note_random_numbers(self, module: nn.Module) -> None:
        if not self.journal.recording:
            return
        draws = draws_random_numbers(module)
        self.journal.random_states.append(RandomState.now(self.tensors[-1].device) if draws else None)

    def same_numbers(self) -> AbstractContextManager[None]:
        """Inside it, the last module noted (by `evaluate`, too) draws the same numbers; each call goes one back."""
        random_state = self.journal.random_states.pop()
        return nullcontext() if random_state is None else random_state.restored()
