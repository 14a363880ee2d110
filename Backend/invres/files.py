"""Files that appear whole or not at all, and names that any disk takes."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import InvresError

__all__ = [
    "HEADERS_ALONE",
    "SEGMENTATION",
    "WRITABLE_ENDINGS",
    "digest_of",
    "safe_name",
    "stamps_of",
    "write_changed",
    "write_json",
    "written_whole",
]

SEGMENTATION = ".seg.nrrd"
"""The ending of Slicer's segmentations."""

WRITABLE_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".mha")
"""Of volume files. They stand here so that a name can be refused before the libraries that write them are imported."""
HEADERS_ALONE = (".hdr", ".img", ".mhd", ".nhdr")
"""Of files that come with another one."""


@contextmanager
def written_whole(path: Path, ending: str | None = None) -> Iterator[Path]:
    """A temporary file name beside `path`; what the block writes there takes the place of `path` when it ends well.

    ending: of the temporary name, by which writers choose a format; that of `path` if None. A missing folder is made.
    On any error the temporary file is removed and an older `path` stays as it was.
    Raises OSError where the disk refuses.
    """
    # Short, as the full name may be as long as names can be.
    temporary = path.parent / f".{secrets.token_hex(6)}{path.suffix if ending is None else ending}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_changed(path: Path, text: str) -> None:
    """Writes the text as `written_whole` does, unless it stands there already: going on needs no room on the disk."""
    if not (path.is_file() and path.read_bytes() == text.encode()):
        with written_whole(path) as temporary:
            temporary.write_bytes(text.encode())


def write_json(path: Path, content: Mapping[str, Any], what: str) -> None:
    """Writes plain values as JSON, whole or not at all. what: the content, in words.

    Raises InvresError where the disk refuses; ValueError for a number that is not finite.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InvresError(f"The {what} cannot be written to {path}: {error.strerror or error}.") from None


def stamps_of(paths: Iterable[Path | None]) -> list[tuple[str, int, int]]:
    """(path, bytes, time) of each file that is there, and of those beside a header that may hold its voxels.

    Changes when any of them is written anew.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if path is not None and path.exists():
            files |= dict.fromkeys([path, *_beside_header(path)])
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def digest_of(path: Path) -> str:
    """The sha256 of a file; of a folder, and of a header with the files beside it, that of the lines that `sha256sum`
    prints for them, sorted by name.
    """
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path, *_beside_header(path)]
    listed = {file.name: _sha256(file) for file in files if not file.name.startswith(".")}
    if not path.is_dir() and len(listed) <= 1:
        return _sha256(path)
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(listed.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _beside_header(path: Path) -> list[Path]:
    """The files beside a header that may hold its voxels, itself among them; none of a file that is whole."""
    if path.suffix.lower() not in HEADERS_ALONE:
        return []
    return sorted(path.parent.glob(f"{glob.escape(path.name[: -len(path.suffix)])}.*"))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def safe_name(name: str) -> str:
    """The name as part of a file name; one that had to be changed is told from others by a checksum."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:80]
    return plain if plain == name else f"{plain}_{zlib.crc32(name.encode()):08x}"
