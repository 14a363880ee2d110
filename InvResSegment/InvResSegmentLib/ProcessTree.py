"""Ends a process together with everything that it has started; nothing but the standard library."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable

__all__ = ["descendants", "killGroup", "killTree"]


def descendants(pids: Iterable[int]) -> set[int]:
    """These processes and all that they have started, as far as they are there."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    left = [pid for pid in pids if pid > 1]
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, [])
    return found


def killTree(pids: Iterable[int]) -> None:
    """Ends these processes, their process groups and all that they have started, at once and without asking.

    The launcher PythonSlicer starts the real Python as its child, and that one leads a process group of its own;
    so both ways are gone: by parents, and by groups for what has lost its parent.
    """
    roots = [pid for pid in dict.fromkeys(pids) if pid and pid > 1 and pid != os.getpid()]
    if os.name == "nt":
        for pid in roots:
            _taskkill(pid)
        return
    doomed = descendants(roots) - {os.getpid()}
    for pid in doomed:
        with contextlib.suppress(OSError):
            # Only a group that one of them leads: the launcher is in Slicer's own.
            if os.getpgid(pid) == pid and pid != os.getpgrp():
                os.killpg(pid, signal.SIGKILL)
    for pid in doomed:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def killGroup(leader: int) -> None:
    """Ends what a process that has just ended left behind in its group."""
    if os.name != "nt" and leader > 1 and leader != os.getpgrp():
        with contextlib.suppress(OSError):
            os.killpg(leader, signal.SIGKILL)


def _parents() -> dict[int, int]:
    """Every process and its parent; empty on Windows, where taskkill follows the tree."""
    if os.name == "nt":
        return {}
    if os.path.isdir("/proc/self"):
        return _parentsFromProc()
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        listing = subprocess.run(["/bin/ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, timeout=1)
        return {int(pid): int(parent) for pid, parent in map(str.split, listing.stdout.splitlines())}
    return {}


def _parentsFromProc() -> dict[int, int]:
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as stream:
                # pid (name) state parent ...; the name may hold spaces and brackets.
                parents[int(name)] = int(stream.read().rpartition(b")")[2].split()[1])
    return parents


def _taskkill(pid: int) -> None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            ["taskkill", "/PID", str(pid), "/T", "/F"],
            capture_output=True,
            timeout=3,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
