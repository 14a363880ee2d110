"""What is done in a folder of segmentations: a record for the next call, and a table of volumes for people."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from . import InvresError
from .files import safe_name, stamps_of, write_changed
from .volumestable import TableLine, write_table

__all__ = ["RECORD", "TABLE", "BatchRecord", "images_of", "result_name"]

RECORD = "segmentations.json"
TABLE = "volumes.csv"
_UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f]|^\.|[. ]$')

Stamps = list[list[Any]]


def result_name(case: str, ending: str) -> str:
    """The file name of a case's result: as its images are called, unless no disk takes that."""
    return f"{safe_name(case) if _UNSAFE.search(case) else case}{ending}"


class BatchRecord:
    """The record of one folder. begun: with what it is filled: model and settings, as JSON values.

    Every case that was begun has an entry: `output` (file name) and `images` (stamps of its files); once it is done its
    volumes and the like, and `stamp`, the state of the result as it was written. A case that failed keeps the stamp of
    its older result, and one that was begun and not ended says `pending`.

    Raises InvresError where the folder was filled otherwise, where its record is damaged, and where a table lies there
    that is not of this.
    """

    def __init__(self, folder: Path, begun: Mapping[str, Any]):
        self.folder, self._begun = folder, dict(begun)
        self._failed: dict[str, str] = {}
        self.cases: dict[str, dict[str, Any]] = {}
        path = folder / RECORD
        if path.is_file():
            self.cases = self._read(path)
        elif (folder / TABLE).exists():
            raise _not_ours(folder / TABLE)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            before = {key: record[key] for key in self._begun}
            cases = {str(name): dict(entry) for name, entry in record["cases"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InvresError(
                f"{path} is damaged, so nobody can tell what in {self.folder} is done.", hint="Give another --output."
            ) from None
        if before != self._begun:
            other = f"{before['model']} {before['model_version']}"
            same = before["model_sha256"] == self._begun["model_sha256"]
            raise InvresError(
                f"{self.folder} holds what {other} has segmented{' with other settings' if same else ''}.",
                hint="Give another --output.",
            )
        return cases

    def check(self, targets: Mapping[str, Path]) -> None:
        """Raises InvresError for a file in the place of a result that this has not written."""
        for name, target in targets.items():
            if target.exists() and self.cases.get(name, {}).get("output") != target.name:
                raise _not_ours(target)

    def state(self, case: str, target: Path, images: Stamps) -> Literal["new", "done", "edited"]:
        """edited: somebody has changed the result since, so that it stays, though its images are others now."""
        entry = self.cases.get(case)
        if entry is None or not target.is_file() or entry.get("pending"):
            return "new"
        if "volumes_ml" in entry and entry["images"] == images:
            return "done"
        return "new" if entry.get("stamp") in (None, _stamp(target)) else "edited"

    def begin(self, case: str, target: Path, images: Stamps) -> None:
        """Before a case is segmented: a result that a kill leaves without figures is known as one of ours."""
        before = self.cases.get(case, {})
        self.cases[case] = {"output": target.name, "images": images, "stamp": before.get("stamp"), "pending": True}
        self.write()

    def end(self, case: str, target: Path, figures: Mapping[str, Any]) -> None:
        """figures: volumes_ml, confidence and what else is known of the result."""
        entry = {key: self.cases[case][key] for key in ("output", "images")}
        self.cases[case] = {**entry, **figures, "stamp": _stamp(target)}
        self.write()

    def fail(self, case: str, reason: str) -> None:
        del self.cases[case]["pending"]
        self._failed[case] = reason
        self.write()

    def write(self) -> None:
        """The record, and a table with a line for each case that was done or has failed now."""
        write_changed(
            self.folder / RECORD,
            json.dumps({**self._begun, "cases": self.cases}, indent=1, ensure_ascii=False) + "\n",
        )
        lines = []
        done = {name: entry for name, entry in self.cases.items() if "volumes_ml" in entry}
        for name in sorted(done.keys() | self._failed.keys()):
            if name in self._failed:
                lines.append(TableLine([name], remarks=self._failed[name]))
            else:
                entry = done[name]
                remarks = " ".join(entry["warnings"])
                lines.append(TableLine([name], entry["volumes_ml"], entry["confidence"], remarks))
        write_table(self.folder / TABLE, ["case"], lines)


def images_of(paths: Iterable[Path]) -> Stamps:
    """Name, size and time of each file, also of those in a DICOM folder; not where they lie, which may change."""
    found: Stamps = []
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [[Path(name).name, size, time] for name, size, time in stamps_of(files)]
    return found


def _stamp(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _not_ours(path: Path) -> InvresError:
    return InvresError(
        f"{path} is there already, was not written by this command, and would be overwritten.",
        hint="Give another --output, or move the file away.",
        code="output_is_input",
    )
