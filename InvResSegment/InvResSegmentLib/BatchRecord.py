"""The file beside the results of a batch that remembers its cases and settings until tomorrow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from .BatchCase import (
    ACCEPTED,
    DONE,
    EDITED,
    ENDINGS,
    FAILED,
    RESULT_SUFFIX,
    RUNNING,
    WAITING,
    BatchCase,
    correctedPath,
)
from .SegmentWays import AS_THE_MODEL, SegmentWays
from .WholeFile import loadJson, writeJson

__all__ = [
    "RECORD",
    "BatchSettings",
    "UnreadableRecord",
    "readBatch",
    "readMade",
    "readSettings",
    "readTable",
    "writeBatch",
]

RECORD = "batch.json"


@dataclass(frozen=True)
class BatchSettings:
    """What a batch was started with last. model: SHA-256; ending: of the files of its results."""

    model: str = ""
    ways: SegmentWays = AS_THE_MODEL
    ending: str = RESULT_SUFFIX


class UnreadableRecord(Exception):
    """A folder has a record, and what it says cannot be known; the text says why."""


def writeBatch(folder: Path, cases: Sequence[BatchCase], settings: BatchSettings | None, table: str) -> None:
    """Remembers the cases of files in the folder of their results. table: the file name of their volumes, "" for none.

    settings: None where none is known. Raises OSError, and UnreadableRecord: that one is never written over.
    """
    entries = [
        {
            "name": case.name,
            "files": {channel: str(path) for channel, path in case.files.items()},
            "state": WAITING if case.state == RUNNING else case.state,
            "message": case.message,
            "notes": case.notes,
            "result": case.fileName,
            "model_sha256": case.model,
            "ways": case.ways.toJson(),
            "confidence": case.confidence,
            "volumes_ml": case.volumesMl,
            "review": case.review,
            "patient": case.patient,
        }
        for case in cases
        if not case.inScene
    ]
    # Of cases that were taken off the list, too: what no batch has made, or of other images, must not be written over.
    done = {case.fileName: case.identity for case in cases if case.state == DONE and not case.inScene}
    made = {name: dict(owner or ()) for name, owner in sorted({**readMade(folder), **done}.items())}
    content: dict[str, Any] = {"format": 1, "cases": entries, "made": made, "table": table}
    if settings is not None:
        ways = settings.ways.toJson()
        content["settings"] = {"model_sha256": settings.model, "ways": ways, "ending": settings.ending}
    folder.mkdir(parents=True, exist_ok=True)
    writeJson(folder / RECORD, content)


def readMade(folder: Path) -> dict[str, tuple | None]:
    """The names of the results that batches have written into a folder -> the `identity` of what they were made of.

    None where that is not known: records were lists of names alone at first. Raises UnreadableRecord.
    """
    record = _read(folder)
    made = record.get("made")
    found = {str(name): None for name in made} if isinstance(made, list) else {}
    if isinstance(made, dict):
        found = {str(name): _owner(files) for name, files in made.items()}
    for entry in record.get("cases") or []:
        if isinstance(entry, dict) and entry.get("result"):
            found[str(entry["result"])] = _owner(entry.get("files"))
    return found


def _read(folder: Path) -> dict[str, Any]:
    try:
        record = loadJson(folder / RECORD)
    except OSError as error:
        raise UnreadableRecord((error.strerror or str(error)).lower()) from None
    except ValueError:
        raise UnreadableRecord(_("it is damaged")) from None
    if not isinstance(record.get("cases") or [], list):
        raise UnreadableRecord(_("it is damaged"))
    return record


def _owner(files: Any) -> tuple | None:
    if not files or not isinstance(files, dict):
        return None
    return BatchCase("", files={str(channel): Path(str(path)) for channel, path in files.items()}).identity


def readTable(folder: Path) -> str:
    """The file name of the table of volumes that batches write in a folder, "" for none yet.

    Raises UnreadableRecord.
    """
    return Path(str(_read(folder).get("table") or "")).name


def readSettings(folder: Path) -> BatchSettings | None:
    """What the batch of a folder was started with last; None where that is not known. Raises UnreadableRecord."""
    found = _read(folder).get("settings")
    if not isinstance(found, dict):
        return None
    ending = found.get("ending") if found.get("ending") in ENDINGS else RESULT_SUFFIX
    return BatchSettings(str(found.get("model_sha256") or ""), SegmentWays.fromJson(found.get("ways")), str(ending))


def readBatch(folder: Path) -> list[BatchCase]:
    """The cases that a folder of results remembers; what is damaged is left out, what is gone is waiting again.

    Raises UnreadableRecord.
    """
    found = []
    for entry in _read(folder).get("cases") or []:
        try:
            case = BatchCase(
                name=str(entry["name"]),
                files={str(channel): Path(path) for channel, path in entry["files"].items()},
                state=entry["state"] if entry["state"] in (DONE, FAILED) else WAITING,
                message=str(entry.get("message") or ""),
                notes=str(entry.get("notes") or ""),
                fileName=Path(str(entry.get("result") or "")).name,
                model=str(entry.get("model_sha256") or ""),
                ways=SegmentWays.fromJson(entry.get("ways")),
                confidence=_number(entry.get("confidence")),
                volumesMl=_volumes(entry.get("volumes_ml")),
                review=entry["review"] if entry.get("review") in (EDITED, ACCEPTED) else "",
                patient=str(entry.get("patient") or ""),
            )
        except (KeyError, TypeError, AttributeError):
            continue
        kept = (folder / case.fileName).is_file() or (case.review and correctedPath(folder, case).is_file())
        if case.state == DONE and not kept:
            case.waitAgain()
            case.review = ""
        found.append(case)
    return found


def _number(value: Any) -> float | None:
    isNumber = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if isNumber else None


def _volumes(content: Any) -> dict[str, float]:
    found = {str(name): _number(value) for name, value in content.items()} if isinstance(content, dict) else {}
    return {name: value for name, value in found.items() if value is not None}
