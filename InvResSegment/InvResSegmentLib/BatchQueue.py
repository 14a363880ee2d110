"""Segments a list of cases in the background, one after the other; one that fails does not keep the others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import qt
from slicer.i18n import tr as _

from .BatchCase import (
    DONE,
    EDITED,
    FAILED,
    RESULT_SUFFIX,
    RUNNING,
    WAITING,
    BatchCase,
    correctedPath,
    endingOf,
)
from .BatchRecord import (
    RECORD,
    BatchSettings,
    UnreadableRecord,
    readBatch,
    readMade,
    readSettings,
    readTable,
    writeBatch,
)
from .BatchTable import freeTableName, writeTable
from .ResultNames import ResultNames
from .SegmentationLogic import SegmentationLogic, SegmentationRequest
from .SegmentWays import AS_THE_MODEL, SegmentWays

__all__ = ["BatchQueue"]

KEPT_EVERY_S, KEPT_SHARE = 1.0, 0.05
"""How often the state is written while cases are running: at most this share of the time, and not more often."""


class BatchQueue:
    """The cases of one batch, run on the backend that the panel has: one request at a time, so others come between.

    Cases of files leave a result in `folder`, and beside them, as it goes, batch.json and a table of volumes; cases of
    the scene get a segmentation node. settings: what the batch of the folder was started with last. changed: functions
    to be called when a case or the run has changed. log: gets the warnings and notes of each case.
    """

    def __init__(self, backend: Any, temporaryFolder: Callable[[], str]) -> None:
        self._backend = backend
        self._logic = SegmentationLogic(backend, temporaryFolder)  # a second one: the Segment tab has its own run
        self._requestId: int | None = None
        self._current: BatchCase | None = None
        self._todo: list[BatchCase] = []  # by the run, the current one first; those that it did not come to stay
        self._before: dict[str, Any] = {}  # what was known of the current one
        self._cancelling = False
        self._model: Any = None
        self._locator: Any = None
        self._device = "auto"
        self._ways = AS_THE_MODEL
        self.settings: BatchSettings | None = None
        self.folder: Path | None = None
        self.cases: list[BatchCase] = []
        self.changed: list[Callable[[], None]] = []
        self.progress: Callable[[str, float], None] = lambda text, fraction: None
        self.log: Callable[[str], None] = lambda text: None
        self._keptUntil = 0.0  # monotonic time, s: what changes in the running meanwhile is written later
        self._asRead: dict[BatchCase, tuple] = {}  # cases that the folder remembered, and how they were
        self._unknown = ""  # why it is not known what batches have done in the folder, in words
        self.problem = ""  # that, or why batch.json or the table could not be written

    @property
    def running(self) -> bool:
        """Whether a case is being segmented."""
        return self._current is not None

    @property
    def current(self) -> BatchCase | None:
        """The case that is being segmented."""
        return self._current

    @property
    def left(self) -> int:
        """How many cases the run has still to do, or did not come to when it was cancelled."""
        return len(self._todo)

    # ---------------------------------------------------------------- the list

    def forgetScene(self) -> None:
        """The scene is gone, and its cases with it."""
        self.cases = [case for case in self.cases if not case.inScene]
        self.tell()

    def add(self, cases: Iterable[BatchCase]) -> int:
        """Appends the cases that are not there yet; returns how many those are."""
        known, new = {case.identity: case for case in self.cases}, []
        for case in cases:
            if (same := known.get(case.identity)) is None:
                new.append(case)
            else:
                self._asRead.pop(same, None)  # asked for, and not only remembered
                same.patient = same.patient or case.patient
        names = self._names(self.cases)
        for case in new:
            if not case.fileName and not case.inScene:
                names.take(case, RESULT_SUFFIX)
                self._takeUpCorrection(case)
            self.cases.append(case)
        self.tell()
        return len(new)

    def remove(self, cases: Iterable[BatchCase]) -> None:
        """Takes cases off the list; their files and nodes stay. The one that is running stays."""
        gone = [case for case in cases if case is not self._current]
        self.cases = [case for case in self.cases if case not in gone]
        self.tell()

    def setFolder(self, folder: Path | None) -> None:
        """Where results go; the cases that it remembers from before come to the list, as they were then.

        Those that only came from the folder before, and were not touched since, stay with that one. Where it cannot be
        read what a folder remembers, `problem` says so, and choosing it again tries again.
        """
        if self.running or (folder == self.folder and not self._unknown):
            return
        remembered, settings, self._unknown = [], None, ""
        if folder is not None:
            try:
                remembered, settings = readBatch(folder), readSettings(folder)
            except UnreadableRecord as error:
                self._unknown = _unreadable(folder, error)
        theirs = {case.identity for case in remembered}
        mine = [case for case in self.cases if self._asRead.get(case) != _state(case)]
        others = [case for case in mine if case.identity not in theirs]
        self._asRead = {case: _state(case) for case in remembered}
        self.folder, self.settings = folder, settings
        names = self._names(remembered)
        for case in others:
            if not case.inScene:  # their results, if any, lie in the folder from before
                case.waitAgain()
                case.model, case.review = "", ""
                names.take(case, endingOf(case.fileName) or RESULT_SUFFIX)
                self._takeUpCorrection(case)
                remembered.append(case)
        self.cases = [*remembered, *(case for case in others if case.inScene)]
        self.tell()

    def _names(self, cases: Sequence[BatchCase]) -> ResultNames:
        """Those that are taken in the folder of results. cases: whose names are taken, too."""
        made: dict[str, tuple | None] = {}
        if self.folder is not None:
            with contextlib.suppress(UnreadableRecord):  # then every result in it may be of anything
                made = readMade(self.folder)
        return ResultNames(self.folder, made, cases)

    def _takeUpCorrection(self, case: BatchCase) -> None:
        """A case that was corrected before, taken off the list and added again, is not segmented anew."""
        if self.folder is not None and correctedPath(self.folder, case).is_file():
            case.state, case.review = DONE, EDITED

    def tell(self, atOnce: bool = False) -> None:
        """Remembers the state on disk, and calls whoever listens. atOnce: also when that was done a moment ago."""
        # What is lost by a kill are at most results of this time, which are made again. Work of a person is not.
        began = time.monotonic()
        if atOnce or not self.running or began > self._keptUntil:
            self.problem = self._unknown
            if not self._unknown and self._worthKeeping:
                self._keep()
            ended = time.monotonic()
            self._keptUntil = ended + max(KEPT_EVERY_S, (ended - began) / KEPT_SHARE)
        for listener in list(self.changed):
            listener()

    def _keep(self) -> None:
        try:
            table = readTable(self.folder) or freeTableName(self.folder)
            writeBatch(self.folder, self.cases, self.settings, table)
        except UnreadableRecord as error:
            self.problem = _unreadable(self.folder, error)
        except OSError as error:
            self.problem = _("The state of the batch could not be written to {folder}: {reason}.").format(
                folder=self.folder, reason=(error.strerror or str(error)).lower()
            )
        else:
            self._writeTable(self.folder / table)

    def _writeTable(self, path: Path) -> None:
        if all(case.inScene or case.state not in (DONE, FAILED) for case in self.cases):
            return
        try:
            writeTable(path, self.cases)
        except OSError as error:  # on Windows a program that shows it keeps it from being replaced
            self.problem = _(
                "{path} could not be written: {reason}. If it is open in another program, close it."
            ).format(path=path, reason=(error.strerror or str(error)).lower())

    @property
    def _worthKeeping(self) -> bool:
        """A folder that was only chosen is left alone."""
        onFiles = [case for case in self.cases if not case.inScene]
        if self.folder is None:
            return False
        return any(case.state != WAITING for case in onFiles) or (self.folder / RECORD).is_file()

    # ---------------------------------------------------------------- the run

    def missing(self, model: Any, ways: SegmentWays = AS_THE_MODEL, ending: str = RESULT_SUFFIX) -> list[str]:
        """What keeps the batch from being started, one plain sentence each. ways, ending: as of `start`."""
        if model is None:
            return [_("Choose a model.")]
        if not self.cases:
            return [_("Add cases.")]
        sentences = []
        onFiles = [case for case in self.cases if not case.inScene]
        if self.folder is None and onFiles:
            sentences.append(_("Choose a folder for the results."))
        elif self._unknown and onFiles:
            sentences.append(self._unknown)
        elif ending != RESULT_SUFFIX and any(file.parent == self.folder for c in onFiles for file in c.files.values()):
            text = _("Choose another folder for the results: as {ending} they could be taken for images beside them.")
            sentences.append(text.format(ending=ending))
        if not any(case.pending(model.sha256, ways, ending) for case in self.cases):
            sentences.append(_("All cases are done with this model."))
        return sentences

    def anew(self, model: Any, ways: SegmentWays = AS_THE_MODEL, ending: str = RESULT_SUFFIX) -> int:
        """How many results, which are there, a start would make anew. ways, ending: as of `start`."""
        return sum(case.state == DONE and case.pending(model.sha256, ways, ending) for case in self.cases)

    def start(
        self,
        model: Any,
        device: str,
        locator: Any = None,
        ways: SegmentWays = AS_THE_MODEL,
        ending: str = RESULT_SUFFIX,
    ) -> None:
        """Segments what is still to be done; failed cases are tried again. A result is there until it is made anew.

        locator: the `ModelInfo` that finds the place in whole images for a model of crops; None for other models.
        ending: one of `ENDINGS`, of the results of cases of files.
        """
        if self.running or self.missing(model, ways, ending):
            return
        self._model, self._device, self._locator, self._cancelling = model, device, locator, False
        self._ways = ways
        self.settings = BatchSettings(model.sha256, ways, ending)
        self._todo = [case for case in self.cases if case.pending(model.sha256, ways, ending)]
        self._next()

    def cancel(self) -> None:
        """Ends the case that is running, which is then as it was before; what is done is kept."""
        if not self.running:
            return
        self._cancelling = True
        if self._requestId is not None:
            self._backend.cancel(self._requestId)
        elif self._logic.running:
            self._logic.cancel()

    def _next(self) -> None:
        listed = set(self.cases)
        self._todo = [case for case in self._todo if case in listed and not case.review]
        if self._cancelling or not self._todo:
            self._current, self._cancelling = None, False
            self.tell()
            return
        case = self._current = self._todo[0]
        self._before = {**vars(case), "written": self._written(case.fileName)}
        case.waitAgain()
        if not case.inScene and endingOf(case.fileName) != self.settings.ending:
            self._names(self.cases).take(case, self.settings.ending)
        case.state = RUNNING
        self.tell()
        if self._cancelling:  # by one of those who were told
            self._stopped(case)
        elif case.inScene:
            self._startInScene(case)
        else:
            self._startOnFiles(case)

    def _startOnFiles(self, case: BatchCase) -> None:
        wanted = [channel.name for channel in self._model.channels]
        problem = _channelProblem(case.files, self._model.channels)
        lost = [str(case.files[name]) for name in wanted if name in case.files and not case.files[name].exists()]
        if not problem and lost:
            problem = _("The file {path} is not there any more.").format(path=lost[0])
        if problem:
            self._ended(case, FAILED, problem)
            return
        arguments = ["segment", "--model", str(self._model.path)]
        for name in wanted:
            if name in case.files:
                arguments += ["--input", f"{name}={case.files[name]}"]
        arguments += ["--output", str(self.folder / case.fileName), "--device", self._device]
        arguments += self._ways.arguments
        if self._locator is not None:
            arguments += ["--locate", str(self._locator.path)]
        warnings: list[str] = []
        notes: list[str] = []

        def onEvent(event: dict) -> None:
            if event.get("event") == "progress" and event.get("stage") == "segment.tiles":
                self._report(case, event.get("done", 0) / max(1, event.get("total", 1)))
            elif event.get("event") == "warning" and event.get("message"):
                warnings.append(event["message"])
            elif event.get("event") == "note" and event.get("message"):
                notes.append(event["message"])

        def onFinished(outcome: Any) -> None:
            self._requestId = None
            found = outcome.result if outcome.state == "done" else {}
            if not case.review:  # while it ran, by a person who had it open
                case.confidence, case.volumesMl = found.get("confidence"), dict(found.get("volumes_ml") or {})
            self._finished(case, outcome, warnings, notes)

        self._requestId = self._backend.request(arguments, onEvent, onFinished)

    def _startInScene(self, case: BatchCase) -> None:
        problem = _channelProblem(case.nodes, self._model.channels)
        if problem:
            self._ended(case, FAILED, problem)
            return
        output = case.segmentation if case.segmentation is not None and case.segmentation.GetScene() else None
        request = SegmentationRequest(
            self._model, case.nodes, self._device, output, locator=self._locator, ways=self._ways
        )

        def onDone(outcome: Any) -> None:
            if outcome.state == "done":
                case.segmentation = outcome.segmentationNode
                if not case.review:
                    case.confidence, case.volumesMl = outcome.confidence, outcome.volumesMl
            self._finished(case, outcome, outcome.warnings, outcome.notes)

        self._logic.start(request, lambda text, fraction, eta_s: self._report(case, fraction), onDone)

    def _finished(self, case: BatchCase, outcome: Any, warnings: Sequence[str], notes: Sequence[str]) -> None:
        if outcome.state == "done" and not case.inScene:
            text = _("{file} beside it was made earlier, with other settings.")
            notes = [*notes, *(text.format(file=name) for name in self._names(self.cases).earlier(case))]
        for sentence in (*warnings, *notes):
            self.log(_("{name}: {sentence}").format(name=case.name, sentence=sentence))
        if outcome.state == "done":
            case.model, case.ways = self._model.sha256, self._ways
            case.notes = " ".join(notes)
            self._ended(case, DONE, " ".join(warnings))
        elif outcome.state == "cancelled":
            self._stopped(case)
        else:
            self._ended(case, FAILED, f"{outcome.message} {outcome.hint}".strip())

    def _report(self, case: BatchCase, fraction: float) -> None:
        count = max(1, len(self.cases))
        done = max(0, count - len(self._todo))
        text = _("{name} ({number} of {count})").format(name=case.name, number=done + 1, count=count)
        self.progress(text, (done + fraction) / count)

    def _stopped(self, case: BatchCase) -> None:
        # Whoever ended it, the scene or a person: the others are not begun.
        self._cancelling = True
        self._ended(case, WAITING, "")
        before = self._before
        untouched = self._written(before["fileName"]) == before["written"]
        # Else it was cancelled when it had just been made.
        if before["state"] == DONE and untouched and not case.review:
            for name in ("state", "message", "notes", "confidence", "volumesMl", "fileName"):
                setattr(case, name, before[name])

    def _written(self, fileName: str) -> tuple[int, int] | None:
        """What tells whether a result is another file by now: its time and size; None without one."""
        if self.folder is None or not fileName:
            return None
        try:
            found = (self.folder / fileName).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def _ended(self, case: BatchCase, state: str, message: str) -> None:
        # What a person has corrected meanwhile stands, whatever became of the run.
        case.state, case.message = DONE if case.review else state, message
        if state != WAITING:
            self._todo.remove(case)
        qt.QTimer.singleShot(0, self._next)  # not from within: a thousand lost files are no depth of calls


def _unreadable(folder: Path, error: UnreadableRecord) -> str:
    return _(
        "What batches have done in this folder cannot be read from {path} ({reason}): put that file right or move it "
        "away and choose the folder again, or choose another folder."
    ).format(path=folder / RECORD, reason=error)


def _state(case: BatchCase) -> tuple:
    return (case.state, case.message, case.model, case.review)


def _channelProblem(found: dict[str, Any], wanted: Sequence[Any]) -> str:
    missing = [channel.name for channel in wanted if channel.name not in found and not channel.optional]
    if not missing and not found:
        missing = [channel.name for channel in wanted]
    if not missing:
        return ""
    return _("No image was found for the channel {names}.").format(names=", ".join(missing))
