"""The files of a model package: safe reading from a folder or a zip, and writing that never leaves half a package."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from . import InvresError
from .events import format_bytes

__all__ = [
    "AGAIN",
    "ENDING",
    "EXPORT",
    "LOG",
    "MANIFEST",
    "PICKLES",
    "WEIGHTS",
    "aside",
    "check_weights",
    "copy",
    "member",
    "publish",
    "remove",
    "sizes_of",
    "stored_at",
    "temporary_folder",
]

ENDING = ".invres"
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"
LOG = "training.jsonl"
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
AGAIN = "Copy or download the package again."
EXPORT = "Ask its sender for a package written by `invres models export`."

_NAMES = (MANIFEST, WEIGHTS, LOG, "LICENSE.txt", "README.md", "preview.png")
_MAX_BYTES = 2 * 1024**3
_MAX_HEADER_BYTES = 16 * 1024**2
# Weights hardly compress; a larger expansion is an attack on the disk.
_MAX_EXPANSION = 200
_CHUNK = 1024**2
_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def aside(path: Path) -> Path:
    """Where a folder stands while its successor takes its place."""
    return path.parent / f".{path.name}.replaced"


def stored_at(path: Path) -> Path:
    """`path`, or the set-aside folder if a replacement was killed between its two renames."""
    return aside(path) if not path.exists() and aside(path).is_dir() else path


def sizes_of(path: Path) -> dict[str, int]:
    """Bytes of each file of the package.

    Raises InvresError if it lacks manifest or weights, is too large, or holds what has no place in a package.
    """
    with _opening(path):
        stored = stored_at(path)
        if stored.is_dir():
            sizes = {name: (stored / name).stat().st_size for name in _NAMES if (stored / name).is_file()}
            pickles = sorted(entry.name for entry in stored.iterdir() if entry.suffix.lower() in PICKLES)
            if pickles and WEIGHTS not in sizes:
                raise InvresError(
                    f"{path.name} is refused: {pickles[0]!r} is a pickle, which could run code.", hint=EXPORT
                )
        else:
            with zipfile.ZipFile(stored) as archive:
                _check_archive(path, archive)
                sizes = {info.filename: info.file_size for info in archive.infolist()}
    for name in (MANIFEST, WEIGHTS):
        if name not in sizes:
            raise InvresError(f"{path.name} is no model package: it lacks {name}.", hint=EXPORT)
    if sum(sizes.values()) > _MAX_BYTES:
        raise InvresError(f"{path.name} is refused: a package may have {format_bytes(_MAX_BYTES)}.", hint=EXPORT)
    return sizes


@contextlib.contextmanager
def member(path: Path, name: str) -> Iterator[IO[bytes]]:
    """One file of a package, from its folder or its zip. Raises InvresError if it is damaged."""
    with contextlib.ExitStack() as stack:
        with _opening(path):
            stored = stored_at(path)
            if stored.is_dir():
                stream: IO[bytes] = stack.enter_context(open(stored / name, "rb"))
            else:
                archive = stack.enter_context(zipfile.ZipFile(stored))
                _check_archive(path, archive)
                stream = stack.enter_context(archive.open(name))
        # What the reader's own files raise (a full disk) is not this package's fault and passes.
        with _undamaged(path):
            yield stream


def check_weights(stream: IO[bytes], size: int, path: Path) -> None:
    """Checks a safetensors header against the file's size: no tensor may be missing, cut or overlapping.

    Raises InvresError; pickles and archives under that name are called so.
    """
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    text = stream.read(length) if length <= min(size - 8, _MAX_HEADER_BYTES) else b""
    if not text.startswith(b"{"):
        if start.startswith(b"PK") or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
            raise InvresError(
                f"{path.name} is refused: its {WEIGHTS} is a pickle or an archive, which could run code.", hint=EXPORT
            )
        raise InvresError(f"The weights in {path.name} are truncated or no safetensors file.", hint=AGAIN)
    try:
        end = _end_of_data(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InvresError(f"The weights in {path.name} have a damaged header.", hint=AGAIN) from None
    if end != size - 8 - length:
        raise InvresError(
            f"The weights in {path.name} are truncated or damaged: {size} bytes where {8 + length + end} belong.",
            hint=AGAIN,
        )


def copy(source: IO[bytes], target: IO[bytes] | None) -> str:
    """Copies to the end (None: only reads) and returns the SHA-256 of what went by."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target`, gone afterwards. Raises InvresError where the disk refuses."""
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise InvresError(
            f"The model package {target} cannot be written: {error.strerror or error}.",
            hint="Check free space and the right to write there.",
            code="write_failed",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Puts the finished `folder` in the place of `target`, as one zip if that is what its name says.

    At every moment one whole package can be opened under the name of `target`, if there was one before.
    Raises InvresError rather than delete something that is no package.
    """
    if target.suffix.lower() == ENDING:
        packed = folder / "packed"
        _pack(folder, packed)
        _to_disk(packed)
        os.replace(packed, target)
        return
    for path in folder.iterdir():
        _to_disk(path)
    if target.exists():
        _check_replaceable(target)
        _clear(aside(target))
        os.rename(target, aside(target))
    elif target.is_symlink():  # to what is no more
        target.unlink()
    try:
        os.rename(folder, target)
    except OSError:
        if stored_at(target) != target:
            os.rename(aside(target), target)
        raise
    _clear(aside(target))


def _clear(path: Path) -> None:
    """Removes a folder, or a link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes a package, as a whole or not at all; of one that is a link only the link.

    Raises InvresError for a folder that holds more than a package, and where the disk refuses.
    """
    stored = stored_at(path)
    try:
        if stored.is_dir() and not stored.is_symlink():
            _check_only_a_package(stored, "deleted", "Move the other files away first.")
            doomed = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
            os.rename(stored, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            stored.unlink()
    except OSError as error:
        raise InvresError(
            f"The model package {path} cannot be deleted: {error.strerror or error}.",
            hint="Close programs that use it, and check that you may write to its folder.",
        ) from error


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InvresError(f"{path.name} is truncated or damaged ({error}).", hint=AGAIN) from None


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    try:
        with _undamaged(path):
            yield
    except OSError as error:
        raise InvresError(f"{path} cannot be read: {error.strerror or error}.", hint=AGAIN) from None


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses, before anything is read, each entry for which a package has no use."""
    names: set[str] = set()
    for info in archive.infolist():
        reason = _objection(info)
        if info.orig_filename in names:
            reason = f"it holds {info.orig_filename!r} twice"
        if reason:
            raise InvresError(f"{path.name} is refused: {reason}.", hint=EXPORT)
        names.add(info.orig_filename)


def _objection(info: zipfile.ZipInfo) -> str:
    """Why an archive's entry is refused, or ""."""
    name = info.orig_filename
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return f"its entry {name!r} is an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return f"its entry {name!r} leads out of the package"
    if stat.S_ISLNK(info.external_attr >> 16):
        return f"its entry {name!r} is a link"
    if name.lower().endswith(PICKLES):
        return f"its entry {name!r} is a pickle, which could run code"
    if name not in _NAMES:
        return f"it holds {name!r}, but only {', '.join(_NAMES)} belong in a package"
    if info.flag_bits & 1:
        return f"its entry {name!r} is encrypted"
    if info.file_size > _MAX_BYTES:
        return f"its entry {name!r} has {format_bytes(info.file_size)}, of {format_bytes(_MAX_BYTES)} allowed"
    if info.file_size > max(_CHUNK, _MAX_EXPANSION * info.compress_size):
        return f"its entry {name!r} unpacks to more than {_MAX_EXPANSION} times its size"
    return ""


def _end_of_data(header: dict) -> int:
    """Where the last tensor ends. Raises ValueError, TypeError, KeyError or AttributeError for a wrong header."""
    header.pop("__metadata__", None)
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        count = _ELEMENT_BYTES[entry["dtype"]]
        for extent in entry["shape"]:
            if type(extent) is not int or extent < 0:
                raise ValueError
            count *= extent
        if entry["data_offsets"] != [end, end + count]:
            raise ValueError
        end += count
    return end


def _pack(folder: Path, packed: Path) -> None:
    """One zip of the package's files: fixed order, date and rights, no compression, so equal input is equal output."""
    with zipfile.ZipFile(packed, "w") as archive:
        for name in _NAMES:
            if (folder / name).is_file():
                info = zipfile.ZipInfo(name)
                info.create_system = 3
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                info.file_size = (folder / name).stat().st_size
                with open(folder / name, "rb") as source, archive.open(info, "w") as target:
                    shutil.copyfileobj(source, target, _CHUNK)


def _check_replaceable(target: Path) -> None:
    if not target.is_dir():
        raise InvresError(f"{target} is a file, no folder.", hint=f"Choose a folder, or a name ending in {ENDING}.")
    _check_only_a_package(target, "replaced", "Choose another folder.")


def _check_only_a_package(folder: Path, what: str, hint: str) -> None:
    strangers = sorted(e.name for e in folder.iterdir() if e.name not in _NAMES and not e.name.startswith("."))
    if strangers:
        raise InvresError(
            f"{folder} is not {what}: it holds {strangers[0]!r}, which is no part of a package.", hint=hint
        )


def _to_disk(path: Path) -> None:
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())
