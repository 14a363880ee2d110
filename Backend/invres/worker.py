"""A process that stays: requests as JSON lines on stdin, events as JSON lines on stdout, the loaded network kept.

A request is {"id": 7, "arguments": ["segment", ...]}; every event of it carries its id, the first is "accepted", and
the last {"event": "finished", "id": 7, "exit_code": 0}. {"cancel": 7} stops it at its next step, or drops it while it
waits. Requests run one at a time in their order. When stdin ends, the process ends.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import platform
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from . import Cancelled, InvresError, __version__
from .events import JsonReporter, Reporter
from .interruption import end_wanted

__all__ = ["serve"]

RunCommand = Callable[[Sequence[str], Reporter], int]

# How long a running request may take to stop and tidy up when nobody is there any more.
GRACE_S = 0.5


@dataclass(frozen=True)
class _Request:
    id: int
    arguments: list[str]


def serve(run_command: RunCommand) -> None:
    """Answers requests until stdin ends. run_command: runs one command line and returns its exit code.

    From here on stdin and stdout belong to the protocol: what else reads gets nothing, what else prints goes to
    stderr.
    """
    requests, events = _take_standard_streams()
    _Worker(run_command, requests, events, _lead_own_group()).run()


class _Worker:
    def __init__(self, run_command: RunCommand, requests: IO[bytes], events: JsonReporter, leads_group: bool):
        self._run_command = run_command
        self._requests = requests
        self._events = events
        self._leads_group = leads_group
        self._queue: queue.Queue[_Request | None] = queue.Queue()
        self._lock = threading.Lock()
        self._current: int | None = None
        self._cancelled: set[int] = set()
        self._ended = False

    def run(self) -> None:
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        ready = {"event": "ready", "pid": os.getpid(), "version": __version__, "python": platform.python_version()}
        self._events.emit(ready)
        while (request := self._queue.get()) is not None:
            exit_code = self._answer(request)
            self._events.emit({"event": "finished", "id": request.id, "exit_code": exit_code})
            if end_wanted():
                break
            _release_memory(thoroughly=exit_code != 0)
        # Taking torch down in good order takes seconds, and nobody is there who would wait for it.
        if self._leads_group:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for what a request may have left running, not for itself
            os.killpg(0, signal.SIGTERM)
        self._leave(0)

    def _answer(self, request: _Request) -> int:
        report = _RequestReporter(self._events, request.id, self._is_cancelled)
        with self._lock:
            dropped = self._ended or request.id in self._cancelled
            self._current = None if dropped else request.id
        try:
            if dropped:
                report.error("cancelled", "Cancelled before it began.")
                return Cancelled.exit_code
            if "worker" in request.arguments[:1]:
                report.error("usage", "A worker does not start another worker.", "Send the request to this one.")
                return InvresError.exit_code
            return self._run_command(request.arguments, report)
        except SystemExit as end:  # --help and --version
            return end.code if isinstance(end.code, int) else 0
        except KeyboardInterrupt:  # between two commands, where none of them catches it
            return Cancelled.exit_code
        finally:
            with self._lock:
                self._current = None
                self._cancelled.discard(request.id)

    def _is_cancelled(self, identity: int) -> bool:
        # A verb that listens for the signal (training) was told by it and ends when all is saved.
        return (self._ended or identity in self._cancelled) and not _listens()

    # --- the thread that reads -------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):  # a pipe that breaks has ended
                for line in self._requests:
                    if line.strip():
                        self._take(line)
        finally:
            self._end()

    def _end(self) -> None:
        """Whatever ended the reading: a worker that hears nothing any more must not stay."""
        with self._lock:
            self._ended = True
            busy = self._current is not None
        self._queue.put(None)
        if busy:
            self._interrupt()
            threading.Event().wait(GRACE_S)
            # Nobody reads the answer. Finished files stand under their names, unfinished ones do not.
            if self._leads_group:
                os.killpg(0, signal.SIGKILL)  # with all that the request has started
            self._leave(Cancelled.exit_code)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            if "cancel" in message:
                self._cancel(int(message["cancel"]))
                return
            request = _Request(int(message["id"]), list(message["arguments"]))
            if not all(isinstance(argument, str) for argument in request.arguments):
                raise TypeError
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            self._events.error(
                "protocol",
                f"A request was not understood: {line[:80].decode('utf-8', 'replace').strip()!r}.",
                'Send {"id": 1, "arguments": ["devices"]} in one line.',
            )
        else:
            # Tells a slow request from one that a launcher in between did not pass on.
            self._events.emit({"event": "accepted", "id": request.id})
            self._queue.put(request)

    def _cancel(self, identity: int) -> None:
        with self._lock:
            self._cancelled.add(identity)
            running = identity == self._current
        if running:
            self._interrupt()

    def _interrupt(self) -> None:
        if _listens():
            signal.raise_signal(signal.SIGINT)

    @staticmethod
    def _leave(exit_code: int) -> NoReturn:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


class _RequestReporter(JsonReporter):
    """Marks every event with its request; at a progress event a cancelled request ends."""

    def __init__(self, events: JsonReporter, identity: int, is_cancelled: Callable[[int], bool]):
        super().__init__()
        self._events, self._id, self._is_cancelled = events, identity, is_cancelled

    def emit(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress" and self._is_cancelled(self._id):
            raise Cancelled()
        self._events.emit({"event": event["event"], "id": self._id, **event})


def _take_standard_streams() -> tuple[IO[bytes], JsonReporter]:
    """The protocol's own handles on stdin and stdout; the standard ones then lead to nothing and to stderr.

    On Windows a library that is loaded while a thread reads from standard input waits for that read, for ever.
    """
    requests = os.fdopen(os.dup(0), "rb")
    events = os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n")
    sys.stdout.flush()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, JsonReporter(events)


def _lead_own_group() -> bool:
    """So that this process and all that it starts can be ended together, and Ctrl+C in a terminal is not for it.

    False on Windows, and where a shell has made it the leader of a group that others may be in.
    """
    if hasattr(os, "setsid"):
        with contextlib.suppress(OSError):
            os.setsid()
            return True
    return False


def _listens() -> bool:
    """Whether a verb has taken SIGINT into its own hands."""
    return signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, signal.SIG_DFL, signal.SIG_IGN, None)


def _release_memory(thoroughly: bool) -> None:
    """Gives back what a request left behind; the network that is kept stays."""
    if thoroughly:  # a failure may leave arrays in a cycle with its traceback
        gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and getattr(torch, "cuda", None) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
