"""What a tensor is for, told to whoever counts memory at the moment; where nobody does, nothing happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch

__all__ = ["ROLES", "listening", "role", "tell"]

# recompute is the role of what nothing else is said of: maps that functions keep for backward, recompute, or work on.
ROLES = ("parameters", "gradients", "optimizer", "input", "state", "recompute", "loss")


class Listener(Protocol):
    """role: of the tensors that are made from now on."""

    role: str

    def note(self, role: str, tensors: tuple[torch.Tensor, ...]) -> None: ...


# Not a context variable: on a card, backward runs in a thread of its own.
_listeners: list[Listener] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside it, `listener` hears of all roles."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def role(name: str) -> Iterator[None]:
    """New tensors inside it have this role, unless another is told of them."""
    before = [(listener, listener.role) for listener in _listeners]
    for listener, _ in before:
        listener.role = name
    try:
        yield
    finally:
        for listener, old in before:
            listener.role = old


def tell(name: str, *tensors: torch.Tensor) -> None:
    """These tensors, made without a role of their own, have this one."""
    for listener in _listeners:
        listener.note(name, tensors)
