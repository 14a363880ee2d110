"""Deletes what may be gigabytes without letting anybody wait: renamed at once, deleted by a thread."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

__all__ = ["GONE", "dispose", "sweep"]

GONE = ".gone-"
"""What the name of a folder begins with that is being deleted."""


def dispose(paths: Iterable[Path], home: Path) -> None:
    """Deletes files and folders; they are gone from their places at once. home: a folder on the same disk.

    Raises OSError where one of them cannot be moved; the others are deleted all the same.
    """
    gone, problem = home / f"{GONE}{secrets.token_hex(6)}", None
    gone.mkdir()
    for number, path in enumerate(paths):
        try:
            os.replace(path, gone / str(number))
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = error
    _delete([gone])
    if problem is not None:
        raise problem


def sweep(home: Path) -> None:
    """Deletes what an earlier Slicer did not get done."""
    with contextlib.suppress(OSError):
        _delete(list(home.glob(f"{GONE}*")))


def _delete(folders: list[Path]) -> None:
    def work() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    if folders:
        threading.Thread(target=work, daemon=True).start()
