"""A run's folder: held by one process at a time, with a record of its events for whoever comes back to it later."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from . import InvresError
from .events import Reporter, WhileHeard
from .faults import fault_of

__all__ = ["EVENTS", "RUN", "RecordingReporter", "held", "kind_of_run"]

EVENTS = "events.jsonl"
RUN = "run.json"
_LOCK = "lock"
_PROGRESS_EVERY_S = 1.0
# Names that `files.written_whole`, model packages, checkpoints and prepared cases give to what is not whole yet.
_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{12}(\..*)?|\..+\.[0-9a-f]{12}\.tmp|checkpoint\.pt\.tmp|.+-[0-9a-f]{16}\.tmp")
# Windows lets nobody read what is locked: the byte that is locked lies behind the number.
_BEYOND = 1024


def kind_of_run(folder: Path) -> Literal["training", "fine-tuning", ""]:
    """What was begun in a folder, by its run.json; "" where nothing was, and where nobody can tell."""
    try:
        content = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(content, dict):
        return ""
    return "fine-tuning" if "base_id" in content else "training" if "recipe" in content else ""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder`; the system lets go of it when this one ends, however it ends.

    What a killed process left half-written in it, or in a folder in it, is removed first. The lock's file has the
    number of the process and, on a line of its own, when it began (seconds since 1970): a number may be given again.
    It is empty once nobody is at work any more, unless that one was killed.
    Raises InvresError where another process has it.
    """
    with open(folder / _LOCK, "a+", encoding="ascii", newline="\n") as stream:
        if not _locked(stream):
            stream.seek(0)
            number = (stream.read().split() or [""])[0]
            raise InvresError(
                f"Another process{f' ({number})' if number.isdigit() else ''} is at work in {folder}.",
                hint="Wait for it, or stop it, before this run is resumed.",
                code="in_use",
            )
        _sweep(folder)
        with contextlib.suppress(OSError, psutil.Error):  # a full disk: only what is told here is missing then
            stream.truncate(0)
            stream.write(f"{os.getpid()}\n")
            stream.flush()
            stream.write(f"{psutil.Process().create_time():.2f}\n")
            stream.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                stream.truncate(0)


class RecordingReporter(Reporter):
    """Passes events on and appends them, with their time, to `events.jsonl`; progress once a second at most.

    A reader knows a process at work by the lock on the folder, and how far it is by the last lines. That nobody
    listens any more, or that the disk is full, does not end the run.
    """

    def __init__(self, report: Reporter, folder: Path):
        super().__init__()
        self._report, self._path = WhileHeard(report), folder / EVENTS
        self._last_progress: tuple[Any, float] = ("", 0.0)
        self._append({"event": "started", "pid": os.getpid()})

    def emit(self, event: dict[str, Any]) -> None:
        self._report.emit(event)
        if event["event"] == "progress":
            now, stage = time.monotonic(), event["stage"]
            before, then = self._last_progress
            if stage == before and now - then < _PROGRESS_EVERY_S and event["done"] < event["total"]:
                return
            self._last_progress = stage, now
        self._append(event)

    def ended(self, result: dict[str, Any] | BaseException) -> None:
        """Records how it ended; whoever called tells it to the reporter."""
        if isinstance(result, BaseException):
            fault = fault_of(result)
            hint = "" if fault.code == "internal" else fault.hint  # which speaks of lines in a terminal
            event = {"event": "error", "code": fault.code, "message": fault.message, "hint": hint}
        else:
            event = {"event": "result", **result}
        self._append(event)

    def _append(self, event: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        # A line that a killed process left half is ended by the first one of the next.
        line = json.dumps({"time": now, **event}, ensure_ascii=True, default=str)
        with contextlib.suppress(OSError), open(self._path, "a+b") as stream:
            if stream.tell() and event["event"] == "started":
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(line.encode("ascii") + b"\n")


def _sweep(folder: Path) -> None:
    for path in [*folder.glob(".*"), *folder.glob("*/.*"), *folder.glob("*/*.tmp")]:
        if _HALF_WRITTEN.fullmatch(path.name):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _locked(stream: IO[str]) -> bool:
    """Takes the lock, if it is free."""
    try:
        if os.name == "nt":
            import msvcrt

            stream.seek(_BEYOND)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Other errors say that this file system knows no locks: then there is no such protection.
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True
