"""Small files of text that are there as a whole or as they were before."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

__all__ = ["loadJson", "readJson", "writeJson", "writeWhole"]


def writeWhole(path: Path, text: str) -> None:
    """Writes under a temporary name and renames. Raises OSError, and leaves nothing half-written then."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def writeJson(path: Path, content: Any) -> None:
    """Writes JSON that people can read, as `writeWhole` does."""
    writeWhole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def readJson(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, or it is damaged."""
    try:
        return loadJson(path)
    except (OSError, ValueError):
        return {}


def loadJson(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file. Raises OSError, or ValueError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content
