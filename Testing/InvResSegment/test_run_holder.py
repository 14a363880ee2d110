"""Which process holds a run folder: told from a later one of the same number, on systems with locks and without."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from InvResSegmentLib import RunHolder as module
from InvResSegmentLib.RunHolder import holderOf, isHeld, startOf


@pytest.fixture
def locked(tmp_path):
    """Writes the lock of a folder: the number of this process, and when it is said to have begun."""

    def write(began=None):
        (tmp_path / "lock").write_text(f"{os.getpid()}" if began is None else f"{os.getpid()}\n{began}")
        return tmp_path

    return write


def test_the_start_of_a_process_is_told_in_seconds_since_1970():
    before = time.time()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert before - 1.5 <= startOf(process.pid) <= time.time() + 1.5
    finally:
        process.kill()
        process.wait()
    assert startOf(process.pid) is None


def test_a_process_is_certain_only_where_its_start_is_that_of_the_lock(locked, tmp_path):
    began = startOf(os.getpid())
    assert holderOf(locked(began + 0.4)).certain and holderOf(tmp_path).pid == os.getpid()
    assert not holderOf(locked(began - 60)).certain, "the number was given to another process since"
    assert holderOf(locked()).pid == os.getpid() and not holderOf(tmp_path).certain, "an older one says no start"
    (tmp_path / "lock").write_text("what?\n12")
    assert holderOf(tmp_path).pid == 0 and not holderOf(tmp_path).certain
    assert holderOf(tmp_path / "nowhere").pid == 0


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_without_locks_the_start_tells_and_where_none_is_said_the_process(locked, monkeypatch):
    import fcntl

    assert not isHeld(locked()), "nobody has the lock, whatever number it says"

    def refuse(*_arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    began = startOf(os.getpid())
    assert isHeld(locked(began)) and isHeld(locked()) and not isHeld(locked(began - 60))


def test_windows_is_asked_for_the_locked_byte_and_not_only_for_the_process(locked, monkeypatch):
    asked, taken = [], []

    def locking(descriptor, mode, count):
        asked.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if taken:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2, LK_UNLCK=0))
    monkeypatch.setattr(module, "_alive", lambda pid: True)
    monkeypatch.setattr(module, "os", SimpleNamespace(name="nt"))
    assert not isHeld(locked()), "a number that another process has since the computer was started again"
    assert asked == [(1024, 2, 1), (1024, 0, 1)], "and what was tried is given back"
    taken.append(True)
    assert isHeld(locked())
    monkeypatch.setattr(module, "_alive", lambda pid: False)
    assert not isHeld(locked())
