"""Which process is at work in a run folder, and whether that is still the one that its lock names."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LOCK", "holderOf", "isHeld", "startOf"]

LOCK = "lock"
_BEYOND = 1024
"""The backend locks this byte on Windows, where nobody can read what is locked; what is told stands before it."""
_TOLD = 64  # bytes: a process id, and on a line of its own when that process began
_SAME_S = 2.0
"""So far apart may the start of one process be told twice: the system's own clocks count in whole seconds."""


@dataclass(frozen=True)
class Holder:
    """What a lock says. pid: 0 where it says nothing; began: seconds since 1970, None where it does not say."""

    pid: int = 0
    began: float | None = None

    @property
    def certain(self) -> bool:
        """Whether the process of this number is known to be the one that wrote the lock, and no later one."""
        if not self.pid or self.began is None:
            return False
        began = startOf(self.pid)
        return began is not None and abs(began - self.began) <= _SAME_S


def holderOf(folder: Path) -> Holder:
    """What the lock of a run folder says, also after its process has ended."""
    try:
        with open(folder / LOCK, "rb", buffering=0) as stream:
            return _told(stream)
    except OSError:
        return Holder()


def isHeld(folder: Path) -> bool:
    """Whether a process is at work in a run folder."""
    try:
        # Without a buffer, which would ask Windows for the locked byte, too, and be refused.
        with open(folder / LOCK, "rb", buffering=0) as stream:
            holder = _told(stream)
            # A process that is just beginning must find the lock free: it is tried only where its holder is alive.
            if holder.pid and not _alive(holder.pid):
                return False
            locked = _locked(stream)
            if locked is None:  # a file system without locks: the process is all that is known
                return holder.began is None or holder.certain
            return locked
    except OSError:
        return False


def _told(stream) -> Holder:
    lines = stream.read(_TOLD).split(b"\n")
    pid = int(lines[0]) if lines[0].strip().isdigit() else 0
    with contextlib.suppress(IndexError, ValueError):
        return Holder(pid, float(lines[1]))
    return Holder(pid)


def _locked(stream) -> bool | None:
    """Whether somebody has the lock; None where that cannot be told."""
    try:
        if os.name == "nt":
            import msvcrt

            stream.seek(_BEYOND)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
            stream.seek(_BEYOND)
            msvcrt.locking(stream.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    return False  # closing the file gives the lock back


def _alive(pid: int) -> bool:
    if os.name == "nt":
        handle = _opened(pid)
        if not handle:
            return False
        import ctypes

        code = ctypes.c_ulong()
        found = ctypes.windll.kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
        ctypes.windll.kernel32.CloseHandle(handle)
        return bool(found) and code.value == 259  # STILL_ACTIVE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def startOf(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
        if os.name == "nt":
            return _startOnWindows(pid)
        if os.path.isdir("/proc/self"):
            return _startFromProc(pid)
        environment = {**os.environ, "LC_ALL": "C"}
        command = ["/bin/ps", "-o", "lstart=", "-p", str(pid)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=1, env=environment).stdout
        return time.mktime(time.strptime(told.strip(), "%a %b %d %H:%M:%S %Y"))
    return None


def _startFromProc(pid: int) -> float:
    # pid (name) state parent ...; the name may hold spaces and brackets. The 22nd word: ticks since the system began.
    ticks = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    booted = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def _startOnWindows(pid: int) -> float | None:
    import ctypes

    handle = _opened(pid)
    if not handle:
        return None
    times = [ctypes.c_ulonglong() for _which in range(4)]  # created, ended, in the kernel, in the process
    found = ctypes.windll.kernel32.GetProcessTimes(handle, *map(ctypes.byref, times))
    ctypes.windll.kernel32.CloseHandle(handle)
    # In steps of 100 ns since 1601.
    return times[0].value / 1e7 - 11_644_473_600 if found else None


def _opened(pid: int):
    import ctypes

    kernel = ctypes.windll.kernel32
    kernel.OpenProcess.restype = ctypes.c_void_p
    kernel.GetExitCodeProcess.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    kernel.GetProcessTimes.argtypes = [ctypes.c_void_p] * 5
    kernel.CloseHandle.argtypes = [ctypes.c_void_p]
    return kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
