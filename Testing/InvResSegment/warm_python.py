"""A Python on which `-m invres worker` begins at once: forked from a process that has imported torch already.

Every panel of a test starts a backend of its own, and most of such a test's time would go into importing torch. What
is started is the real worker, a process of its own with the pipes, the environment and the folder that it was given;
only what Python and libraries read of the environment when they start is that of this process. It stands behind a
program that waits for it, as the real Python stands behind PythonSlicer. Every other command line runs on this very
Python.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

__all__ = ["pids", "program"]

BACKEND = Path(__file__).resolve().parents[2] / "Backend"

# What runs in place of Python: hands over what it was given and ends as the worker ends.
PROGRAM = """
import array, json, os, socket, struct, sys
arguments = sys.argv[1:]
if arguments[:3] != ["-m", "invres", "worker"]:
    os.execv({python!r}, [{python!r}, *arguments])
given = json.dumps([arguments[1:], dict(os.environ), os.getcwd()]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendmsg([struct.pack("!I", len(given))],
                   [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    server.sendall(given)
    code = struct.unpack("!i", server.recv(4) or struct.pack("!i", 1))[0]
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""

_server: subprocess.Popen | None = None
_program = ""


def program() -> str:
    """The path to start; this Python's own where processes cannot be followed as here (they can on Linux)."""
    global _server, _program
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return sys.executable
    if not _program:
        folder = tempfile.TemporaryDirectory(prefix="warm-")
        address = os.path.join(folder.name, "socket")
        made, code = (Path(folder.name) / name for name in ("python", "program.py"))
        code.write_text(PROGRAM.format(python=sys.executable, address=address), encoding="utf-8")
        # By a shell, because the path in a first line may be neither long nor have spaces.
        words = shlex.join([sys.executable, "-SI", str(code)])
        made.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        made.chmod(0o755)
        command = [sys.executable, "-X", "utf8", "-u", __file__, address]
        environment = {**os.environ, "PYTHONPATH": str(BACKEND)}
        _server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        atexit.register(_end, _server, folder)
        with _server.stdout as said:
            assert said.readline() == b"ready\n", "the warm Python did not start"
        _program = str(made)
    return _program


def pids() -> set[int]:
    """The workers that it has started and that have not ended."""
    if _server is None:
        return set()
    return {child.pid for child in psutil.Process(_server.pid).children()}


def _end(server: subprocess.Popen, folder: tempfile.TemporaryDirectory) -> None:
    server.stdin.close()
    server.wait(30)
    folder.cleanup()


# ---------------------------------------------------------------- in the process that forks


class _Life:
    """A forked worker and the program that waits for it."""

    def __init__(self, waiting: socket.socket, pid: int) -> None:
        self.waiting, self.pid, self.end, self.ended = waiting, pid, os.pidfd_open(pid), False

    def over(self) -> None:
        self.ended = True
        _, status = os.waitpid(self.pid, 0)
        with contextlib.suppress(OSError):
            self.waiting.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
        os.close(self.end)
        self.waiting.close()


def _serve(address: str) -> None:
    _import_all()
    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(listening, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fd == 0:  # the tests have ended
                return
            if key.fileobj is listening:
                waiting, _ = listening.accept()
                given, descriptors = _received(waiting)
                if given:
                    life = _Life(waiting, _forked(given, descriptors))
                    for descriptor in (waiting, life.end):
                        selector.register(descriptor, selectors.EVENT_READ, life)
                for descriptor in descriptors:
                    os.close(descriptor)
            elif not (life := key.data).ended:
                # Either has ended. A program that was killed takes its worker along, as a killed Python would end.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(life.pid, signal.SIGKILL)
                for descriptor in (life.waiting, life.end):
                    selector.unregister(descriptor)
                life.over()


def _import_all() -> None:
    """What requests of the panel import; nothing is computed here, so that no thread is there to be forked."""
    for path in sorted((BACKEND / "invres").glob("*command*.py")):
        importlib.import_module(f"invres.{path.stem}")
    importlib.import_module("torch._dynamo")  # a plan of memory does


def _received(waiting: socket.socket) -> tuple[bytes, list[int]]:
    """What a program hands over, nothing where it was killed meanwhile; and its standard descriptors."""
    size, descriptors, _, _ = socket.recv_fds(waiting, 4, 3)
    with waiting.makefile("rb") as stream:
        length = struct.unpack("!I", size)[0] if size else 0
        given = stream.read(length)
    return (given if len(given) == length else b""), list(descriptors)


def _forked(given: bytes, descriptors: list[int]) -> int:
    """Starts the worker that is asked for; returns its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        arguments, environment, folder = json.loads(given)
        for descriptor, standard in zip(descriptors, range(3), strict=True):
            os.dup2(descriptor, standard)
        if str(BACKEND) not in environment.get("PYTHONPATH", "").split(os.pathsep):
            raise ModuleNotFoundError("No module named invres")  # as a Python that is started anew would have it
        os.closerange(3, 4096)  # the pipes of other workers, too, which would never be at their end
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = arguments
        runpy.run_module("invres", run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    _serve(sys.argv[1])
