"""Has the data doctor of the backend look at training cases: those of the scene are written to disk for it first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from .CaseExport import CaseExport, directDataSet, layoutOf, stampOf
from .CaseFindings import lackingAdvice
from .LabelMapping import LabelConflict
from .TrainingCases import MISSING_CHANNEL, MISSING_LABEL, CaseRow, Finding, TrainingCases, dataSetOf

__all__ = ["CaseExamination"]

OnProgress = Callable[[str, int, int], None]
OnDone = Callable[[Path | None, str, str], None]


class CaseExamination:
    """One at a time; nothing blocks. onProgress(what, done, total), onDone(data set or None, message, hint).

    message is "" after a success; a cancelled one says so.
    """

    def __init__(self, cases: TrainingCases, backend: Any, export: CaseExport) -> None:
        self._cases, self._backend, self._export = cases, backend, export
        self._requestId: int | None = None

    @property
    def running(self) -> bool:
        """Whether something is written or looked at."""
        return self._export.running or self._requestId is not None

    def cancel(self) -> None:
        """Stops; the list stays as it is."""
        self._export.cancel()
        if self._requestId is not None:
            self._backend.cancel(self._requestId)

    def addDataSet(self, path: str, onProgress: OnProgress, onDone: OnDone) -> None:
        """Adds the cases of a data set on disk, with what the doctor finds."""

        def finished(result: dict | None, message: str, hint: str) -> None:
            if result is None:
                onDone(None, message, hint)
                return
            try:
                dataSet, cases = dataSetOf(path, result)
            except (KeyError, TypeError, ValueError):
                onDone(None, _("The answer of the backend was not understood."), _("Install the extension again."))
                return
            if not cases:
                onDone(None, _("{name} has no case with a label to learn from.").format(name=dataSet.name), "")
                return
            rows = self._cases.addDataSet(dataSet, cases)
            whole = _findings(result, {row.name: row for row in rows})
            for row in rows:
                row.examined = ("on disk",)
            self._cases.tell()
            onDone(Path(path), "", " ".join(whole))

        self._ask(path, onProgress, finished)

    def examine(self, model: Any, onProgress: OnProgress, onDone: OnDone) -> None:
        """Writes the used cases of the scene and looks at all that were not looked at as they are now."""
        if direct := directDataSet(self._cases, model):
            onDone(Path(direct), "", "")
            return
        rows = self._cases.used
        try:
            layout = layoutOf(self._cases, model)
        except LabelConflict as conflict:
            onDone(None, str(conflict), "")
            return
        stamps = {row.key: stampOf(self._cases, row, model, layout) for row in rows}

        def written(outcome) -> None:
            if outcome.state != "done":
                message = _("Cancelled.") if outcome.state == "cancelled" else outcome.message
                onDone(None, message, outcome.hint)
            elif all(row.ofDataSet or row.examined == stamps[row.key] for row in rows):
                onDone(outcome.dataset, "", "")
            else:
                self._ask(str(outcome.dataset), onProgress, lambda *found: examined(outcome.dataset, *found))

        def examined(dataset: Path, result: dict | None, message: str, hint: str) -> None:
            if result is None:
                onDone(None, message, hint)
                return
            for row in rows:
                row.findings, row.examined = [], stamps[row.key]
            whole = _findings(result, {row.code: row for row in rows})
            self._cases.tell()
            onDone(dataset, "", " ".join(whole))

        def progress(done: int, total: int, name: str) -> None:
            onProgress(_("Writing {name}").format(name=name) if name else _("Writing the cases"), done, total)

        self._export.start(self._cases, model, progress, written)

    def _ask(self, path: str, onProgress: OnProgress, onFinished: Callable) -> None:
        def onEvent(event: dict) -> None:
            if event.get("event") == "progress" and event.get("stage") == "check.cases":
                onProgress(_("Looking at the cases"), int(event.get("done") or 0), int(event.get("total") or 0))

        def finished(outcome) -> None:
            self._requestId = None
            if outcome.state == "done":
                onFinished(outcome.result, "", "")
            elif outcome.state == "cancelled":
                onFinished(None, _("Cancelled."), "")
            else:
                onFinished(None, outcome.message, outcome.hint)

        onProgress(_("Looking at the cases"), 0, 0)
        self._requestId = self._backend.request(["check", "--data", path], onEvent, finished)


def _findings(result: dict, rows: dict[str, CaseRow]) -> list[str]:
    """Puts the doctor's findings into the rows; returns those on the data set as a whole that matter, in words."""
    whole = []
    for found in result.get("findings") or []:
        sentence = f"{found.get('message', '')} {found.get('action', '')}".strip()
        row = rows.get(found.get("case"))
        if row is not None and found.get("code") == MISSING_CHANNEL and _lacksOne(row, result):
            continue  # whether the model can do without it is said by `CaseFindings`
        if row is not None and not row.ofDataSet and found.get("code") == MISSING_LABEL:
            # The doctor speaks to somebody who has a label file to correct.
            advice = lackingAdvice(row) if found.get("severity") == "warning" else ""
            sentence = f"{found.get('message', '')} {advice}".strip()
        if row is not None:
            sentence = sentence.replace(row.code, row.name)
            row.findings.append(Finding(found.get("severity") or "note", sentence, found.get("code") or ""))
        elif found.get("severity") in ("error", "warning"):
            whole.append(sentence)
    return whole


def _lacksOne(row: CaseRow, result: dict) -> bool:
    """Whether the list knows that the case has not all of the channels."""
    if row.ofDataSet:
        return None in row.files["images"]
    had = row.channels if row.stored is None else row.stored.images
    return len(had) < len((result.get("contents") or {}).get("channels") or ())
