"""BackendProcess on the interpreter of the tests, with a memory of what it was asked for."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import standins
import warm_python

standins.install()

from InvResSegmentLib.BackendProcess import BackendProcess  # noqa: E402 (needs the stand-in of qt)

__all__ = ["RecordingBackend"]

BACKEND = Path(__file__).resolve().parents[2] / "Backend"


class RecordingBackend(BackendProcess):
    """requests: the arguments of each; cancelled: ids; log: what the worker wrote beside its events.

    file_bytes: no file that the worker writes may be larger, as on a full disk.
    """

    def __init__(self, file_bytes: int | None = None):
        command = [warm_python.program(), "-m", "invres", "worker"]
        if file_bytes is not None:
            code = (
                "import resource, runpy, sys; "
                f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, resource.RLIM_INFINITY)); "
                "sys.argv = ['invres', 'worker']; runpy.run_module('invres', run_name='__main__')"
            )
            command = [sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": str(BACKEND), "OMP_NUM_THREADS": "1"}
        self.requests: list[list[str]] = []
        self.cancelled: list[int] = []
        self.log: list[str] = []
        super().__init__(lambda: command, environment, self.log.append)

    def request(self, arguments, onEvent, onFinished):
        self.requests.append(list(arguments))
        return super().request(arguments, onEvent, onFinished)

    def cancel(self, requestId):
        self.cancelled.append(requestId)
        super().cancel(requestId)

    def crash(self) -> None:
        """The worker dies, as by a fault or by the operating system."""
        os.kill(self.pid, signal.SIGKILL)
