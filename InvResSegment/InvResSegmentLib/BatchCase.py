"""The cases of a batch as plain data, and what the files of their results are called."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .SegmentWays import AS_THE_MODEL, SegmentWays

__all__ = [
    "ACCEPTED",
    "CORRECTED_SUFFIX",
    "DONE",
    "EDITED",
    "ENDINGS",
    "FAILED",
    "RESULT_SUFFIX",
    "RUNNING",
    "WAITING",
    "BatchCase",
    "correctedPath",
    "endingOf",
    "patientCode",
    "resultStem",
]

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
EDITED, ACCEPTED = "edited", "accepted"
"""What a review made of a result; "" before it."""
RESULT_SUFFIX, CORRECTED_SUFFIX = ".seg.nrrd", ".corrected.seg.nrrd"
ENDINGS = (RESULT_SUFFIX, ".nii.gz")
"""Of results: Slicer's segmentations with names and colours, or label maps, which any program reads."""


@dataclass(eq=False)
class BatchCase:
    """One examination. files: channel -> image; for a case of the scene `nodes`: channel -> volume instead.

    state: "waiting", "running", "done" or "failed". message: why it failed, or what to look at. notes: what is worth
    knowing of the result. fileName: of the result, without a folder. model: SHA-256 of the model that made the result.
    ways: in which it was made. confidence: the mean probability of what was found, None where it is not known;
    volumesMl: segment -> mL, of what a person made of the result where one did.
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
    ways: SegmentWays = AS_THE_MODEL
    confidence: float | None = None
    volumesMl: dict[str, float] = field(default_factory=dict)
    review: str = ""
    segmentation: Any = None
    patient: str = ""

    @property
    def inScene(self) -> bool:
        """Whether its images are nodes of the scene and not files."""
        return bool(self.nodes)

    @property
    def identity(self) -> tuple[tuple[str, str], ...]:
        """What it is made of, each channel with its file or node: cases of one identity are the same case."""
        nodes = {channel: node.GetID() for channel, node in self.nodes.items()}
        return tuple(sorted((channel, str(image)) for channel, image in {**self.files, **nodes}.items()))

    def pending(self, modelSha256: str, ways: SegmentWays = AS_THE_MODEL, ending: str = "") -> bool:
        """Whether this model has still to segment it, in these ways and into a file with this ending ("" = any).

        What a person has accepted or edited is never made anew.
        """
        if self.review:
            return False
        other = bool(ending) and not self.inScene and endingOf(self.fileName) != ending
        return self.state != DONE or self.model != modelSha256 or self.ways != ways or other

    def waitAgain(self) -> None:
        """Nothing is known of a result any more: it is to be made, or made anew."""
        self.state, self.message, self.notes, self.confidence, self.volumesMl = WAITING, "", "", None, {}


def patientCode(source: str, patient: str) -> str:
    """What tells the patients of a data set or database apart, and nobody who they are."""
    return hashlib.sha256(f"{source}\n{patient}".encode()).hexdigest()[:16]


def endingOf(fileName: str) -> str:
    """That of `ENDINGS` which a result has, written large or small; "" for another one."""
    return next((ending for ending in ENDINGS if fileName.lower().endswith(ending)), "")


def resultStem(fileName: str) -> str:
    """The name of a result without its ending."""
    return fileName[: len(fileName) - len(endingOf(fileName))]


def correctedPath(folder: Path, case: BatchCase) -> Path:
    """Where what a person made of a result is kept, beside what the model made."""
    return folder / (resultStem(case.fileName) + CORRECTED_SUFFIX)
