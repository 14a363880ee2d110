"""Counts live tensor bytes: every storage that Python or autograd can still reach, exactly, on any machine.

Outside the count are the allocator's rounding, the CUDA context and cuDNN's workspaces.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .hollow import HollowTensors
from .reversible.roles import ROLES, listening

__all__ = ["LiveBytes"]

UNSAID = "recompute"


class _Entry:
    """A storage that is known: its size, and what it is for."""

    __slots__ = ("reference", "role", "size")

    def __init__(self, reference: Any, size: int, role: str):
        self.reference = reference
        self.size = size
        self.role = role


class LiveBytes(TorchDispatchMode):
    """Context that follows the bytes of all live tensor storages: `current`, `peak`, and `peak_op` that reached it.

    Tensors made before the context are counted if given to `watch`. Works with real and with hollow tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.role = UNSAID
        self.peak = 0
        self.peak_op = ""
        self._bytes = 0
        self._known: dict[int, _Entry] = {}
        self._at_peak: list[tuple[_Entry, int]] = []
        self._is_at_peak = False  # the peak is now, and nobody has written down what it is made of

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `HollowTensors`

    def __enter__(self) -> LiveBytes:
        self._host = HollowTensors.active()
        self._listening = listening(self)
        self._listening.__enter__()
        if self._host is None:
            super().__enter__()
        else:
            self._host.watchers.append(self._look_at)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._host is None:
            super().__exit__(*exception)
        else:
            self._host.watchers.remove(self._look_at)
        self._listening.__exit__(None, None, None)

    def watch(self, tensors: Iterable[torch.Tensor], role: str = UNSAID) -> None:
        """Counts these tensors' storages too, each once."""
        for tensor in tensors:
            self._count(tensor, "", role)

    def note(self, role: str, tensors: tuple[torch.Tensor, ...]) -> None:
        """Says what these tensors are for, where nothing else was said."""
        for tensor in tensors:
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is not None and known.role == UNSAID:
                known.role = role

    @property
    def current(self) -> int:
        self._recount()
        return self._bytes

    def reset_peak(self) -> None:
        self.peak, self.peak_op = self.current, ""
        self._is_at_peak = True

    def peak_by_role(self) -> dict[str, int]:
        """Bytes at the peak by what they were for; the sum is the peak."""
        self._write_down_peak()
        found = dict.fromkeys(ROLES, 0)
        for entry, size in self._at_peak:
            found[entry.role] += size
        return found

    def _count(self, tensor: torch.Tensor, operator: Any, role: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        known = self._known.get(key)
        if known is not None and known.size == size:
            return
        growth = size if known is None else size - known.size
        if self._bytes + growth > self.peak:
            self._recount()
            known = self._known.get(key)
            growth = size if known is None else size - known.size
        if known is None:
            self._known[key] = _Entry(weakref.ref(storage, partial(self._forget, key)), size, role)
        else:
            self._write_down_peak()
            known.size = size
        self._bytes += growth
        if self._bytes > self.peak:
            self.peak, self.peak_op, self._is_at_peak = self._bytes, str(operator), True

    def _recount(self) -> None:
        """Storages may have been resized where no operator is seen: memcnn empties its inputs so."""
        # A copy, because collecting garbage may forget some in the middle; a list would allocate, and so collect.
        for entry in self._known.copy().values():
            storage = entry.reference()
            if storage is not None and storage.nbytes() != entry.size:
                self._write_down_peak()
                self._bytes += storage.nbytes() - entry.size
                entry.size = storage.nbytes()

    def _forget(self, key: int, _: Any) -> None:
        self._write_down_peak()
        self._bytes -= self._known.pop(key).size

    def _write_down_peak(self) -> None:
        """Called before anything that was alive at the peak goes."""
        if not self._is_at_peak:
            return
        known = self._known.copy()
        if self._is_at_peak:  # else garbage was collected meanwhile, and it has been written down for that
            self._is_at_peak = False
            self._at_peak = [(entry, entry.size) for entry in known.values()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._look_at(func, result)
        return result

    def _look_at(self, func: Any, result: Any) -> None:
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, torch.Tensor):
                self._count(value, func, self.role)
