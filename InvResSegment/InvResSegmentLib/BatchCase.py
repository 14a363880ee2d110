"""The cases of a batch as plain data, and the file beside their results that remembers them until tomorrow."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .WholeFile import readJson, writeJson

__all__ = [
    "ACCEPTED",
    "DONE",
    "EDITED",
    "FAILED",
    "RECORD",
    "RESULT_SUFFIX",
    "RUNNING",
    "WAITING",
    "BatchCase",
    "correctedPath",
    "freeFileName",
    "patientCode",
    "readBatch",
    "readMade",
    "writeBatch",
]

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
EDITED, ACCEPTED = "edited", "accepted"
"""What a review made of a result; "" before it."""
RECORD = "batch.json"
RESULT_SUFFIX, CORRECTED_SUFFIX = ".seg.nrrd", ".corrected.seg.nrrd"
LONGEST_NAME = 60


@dataclass(eq=False)
class BatchCase:
    """One examination. files: channel -> image; for a case of the scene `nodes`: channel -> volume instead.

    state: "waiting", "running", "done" or "failed". message: why it failed, or what to look at. notes: what is worth
    knowing of the result. fileName: of the result, without a folder. model: SHA-256 of the model that made the result.
    review: "", "edited" or "accepted". segmentation: of a case of the scene, the node with the result. patient: a code
    that the cases of one person share, "" where that is not known.
    """

    name: str
    files: dict[str, Path] = field(default_factory=dict)
    nodes: dict[str, Any] = field(default_factory=dict)
    state: str = WAITING
    message: str = ""
    notes: str = ""
    fileName: str = ""
    model: str = ""
    review: str = ""
    segmentation: Any = None
    patient: str = ""

    @property
    def inScene(self) -> bool:
        """Whether its images are nodes of the scene and not files."""
        return bool(self.nodes)

    def pending(self, modelSha256: str) -> bool:
        """Whether this model has still to segment it; what a person has accepted or edited is never made anew."""
        if self.review:
            return False
        return self.state != DONE or self.model != modelSha256


def patientCode(source: str, patient: str) -> str:
    """What tells the patients of a data set or database apart, and nobody who they are."""
    return hashlib.sha256(f"{source}\n{patient}".encode()).hexdigest()[:16]


def freeFileName(name: str, taken: Iterable[str]) -> str:
    """A file name for the result of a case that no other case has, on any file system."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._")[:LONGEST_NAME] or "case"
    used = {one.casefold() for one in taken}
    candidate, number = plain, 1
    while f"{candidate}{RESULT_SUFFIX}".casefold() in used:
        number += 1
        candidate = f"{plain}_{number}"
    return f"{candidate}{RESULT_SUFFIX}"


def correctedPath(folder: Path, case: BatchCase) -> Path:
    """Where what a person made of a result is kept, beside what the model made."""
    return folder / (case.fileName.removesuffix(RESULT_SUFFIX) + CORRECTED_SUFFIX)


def writeBatch(folder: Path, cases: Sequence[BatchCase]) -> None:
    """Remembers the cases of files in the folder of their results. Raises OSError."""
    entries = [
        {
            "name": case.name,
            "files": {channel: str(path) for channel, path in case.files.items()},
            "state": WAITING if case.state == RUNNING else case.state,
            "message": case.message,
            "notes": case.notes,
            "result": case.fileName,
            "model_sha256": case.model,
            "review": case.review,
            "patient": case.patient,
        }
        for case in cases
        if not case.inScene
    ]
    # Of cases that were taken off the list, too: what no batch has made must not be written over.
    made = sorted({*readMade(folder), *(case.fileName for case in cases if case.state == DONE and not case.inScene)})
    content = {"format": 1, "cases": entries, "made": made}
    folder.mkdir(parents=True, exist_ok=True)
    writeJson(folder / RECORD, content)


def readMade(folder: Path) -> list[str]:
    """The names of the results that batches have written into a folder."""
    record = readJson(folder / RECORD)
    listed = [entry.get("result") for entry in record.get("cases") or [] if isinstance(entry, dict)]
    return [str(name) for name in (*(record.get("made") or []), *listed) if name]


def readBatch(folder: Path) -> list[BatchCase]:
    """The cases that a folder of results remembers; what is damaged is left out, what is gone is waiting again."""
    found = []
    for entry in readJson(folder / RECORD).get("cases") or []:
        try:
            case = BatchCase(
                name=str(entry["name"]),
                files={str(channel): Path(path) for channel, path in entry["files"].items()},
                state=entry["state"] if entry["state"] in (DONE, FAILED) else WAITING,
                message=str(entry.get("message") or ""),
                notes=str(entry.get("notes") or ""),
                fileName=Path(str(entry.get("result") or "")).name,
                model=str(entry.get("model_sha256") or ""),
                review=entry["review"] if entry.get("review") in (EDITED, ACCEPTED) else "",
                patient=str(entry.get("patient") or ""),
            )
        except (KeyError, TypeError, AttributeError):
            continue
        if case.state == DONE and not (folder / case.fileName).is_file():
            case.state, case.review, case.message, case.notes = WAITING, "", "", ""
        found.append(case)
    return found
