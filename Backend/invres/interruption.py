"""Stops that wait for a good moment: of an import of torch, which an exception would end with an abort, and of a verb
that saves first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["end_wanted", "postponed", "stop_when_saved", "stoppable", "terminable"]

_end = threading.Event()
_stop: ContextVar[Callable[[], None] | None] = ContextVar("stop", default=None)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block by KeyboardInterrupt, as SIGINT does, so that the end is told and nothing is left half
    written; where it is ignored or handled otherwise that stays so."""
    plain = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not plain:
        yield
        return

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def postponed() -> Iterator[None]:
    """SIGINT and SIGTERM are acted on when the block ends, by KeyboardInterrupt; ignored ones stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def remember(number: int, _frame: Any) -> None:
        nonlocal asked
        asked = True
        if number == signal.SIGTERM:
            _end.set()

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    previous = {number: handler for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if asked:
            raise KeyboardInterrupt


def end_wanted() -> bool:
    """Whether SIGTERM came meanwhile: for a process that would go on with something else."""
    return _end.is_set()


@contextmanager
def stoppable(ask: Callable[[], None]) -> Iterator[None]:
    """Inside, `stop_when_saved` of this thread calls `ask`, which must not raise."""
    token = _stop.set(ask)
    try:
        yield
    finally:
        _stop.reset(token)


def stop_when_saved() -> bool:
    """Asks the verb that is at work in this thread to save and stop; False where none listens. May be called again."""
    ask = _stop.get()
    if ask is not None:
        ask()
    return ask is not None
