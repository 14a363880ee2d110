"""Ctrl-C while torch is being imported: an exception in the middle of that would end the process with an abort."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["end_wanted", "postponed", "terminable"]

_end = threading.Event()


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
