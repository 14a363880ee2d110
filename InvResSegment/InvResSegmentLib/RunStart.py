"""From the training cases of the panel to a running process: examined, handed over, launched; nothing blocks."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from . import Settings
from .BackendPython import backendCommand, backendEnvironment
from .CaseExamination import CaseExamination
from .CaseExport import CaseExport, directDataSet
from .Disposal import dispose
from .FineTuneRun import FineTuneRun, newRunFolder
from .Notice import ERROR, GOOD, INFORMATION, WARNING
from .RunOptions import RunOptions
from .RunRecord import DATA
from .TrainingCases import TrainingCases

__all__ = ["RunStart"]


class RunStart:
    """One start at a time. onProgress(what, done, total); onDone(run or None, level of the notice, sentences).

    The run gets files of its own, so that cases can be changed while it learns.
    """

    def __init__(self, cases: TrainingCases, examination: CaseExamination, export: CaseExport, onProgress) -> None:
        self._cases, self._examination, self._export = cases, examination, export
        self._onProgress: Callable[[str, int, int], None] = onProgress
        self._onDone: Callable | None = None

    @property
    def running(self) -> bool:
        """Whether a run is about to begin."""
        return self._onDone is not None

    def start(self, model: Any, options: RunOptions, errorsOf: Callable[[], list[str]], onDone: Callable) -> None:
        """Begins. errorsOf: asked after the examination for the names of cases that cannot be learned from."""
        self._onDone = onDone

        def examined(dataset: Path | None, message: str, hint: str) -> None:
            if dataset is None:
                self._end(None, WARNING, message, hint)
            elif bad := errorsOf():
                text = _("The training was not started, because of {names}.").format(names=", ".join(bad))
                hint = _("Mend them, or give them the role left out; the table says what is wrong.")
                self._end(None, WARNING, text, hint)
            else:
                self._deliver(model, options, dataset)

        self._examination.examine(model, self._onProgress, examined)

    def _deliver(self, model: Any, options: RunOptions, dataset: Path) -> None:
        try:
            folder = newRunFolder(Path(Settings.runsFolder()), model.name)
            folder.mkdir()
        except OSError as error:
            self._end(None, ERROR, *_cannotWrite(error))
            return
        if directDataSet(self._cases, model):
            self._launch(folder, model, options, dataset)
            return

        def delivered(outcome) -> None:
            if outcome.state == "done":
                self._launch(folder, model, options, outcome.dataset)
                return
            _giveUp(folder)
            if outcome.state == "cancelled":
                self._end(None, INFORMATION, _("Cancelled."))
            else:
                self._end(None, ERROR, outcome.message, outcome.hint)

        def progress(done: int, total: int, _name: str) -> None:
            self._onProgress(_("Handing the cases over"), done, total)

        self._export.deliver(dataset, folder / DATA, progress, delivered)

    def _launch(self, folder: Path, model: Any, options: RunOptions, dataset: Path) -> None:
        record = {
            "arguments": options.arguments(model.path, dataset, folder),
            "model": options.name or model.name,
            "modelSha256": model.sha256,
            "memory": options.memory,
            "device": options.device,
            "cases": len(self._cases.used),
        }
        try:
            run = FineTuneRun.begin(folder, record)
            run.launch(backendCommand("-m", "invres"), backendEnvironment())
        except OSError as error:
            logging.exception("InvResSegment: a fine-tuning could not be started")
            _giveUp(folder)
            self._end(None, ERROR, *_cannotWrite(error))
            return
        self._end(run, GOOD, _("The training has begun. It goes on while you work, and when Slicer is closed."))

    def _end(self, run: FineTuneRun | None, level: str, *sentences: str) -> None:
        callback, self._onDone = self._onDone, None
        if callback is not None:
            callback(run, level, sentences)


def _giveUp(folder: Path) -> None:
    with contextlib.suppress(OSError):
        dispose([folder], folder.parent)


def _cannotWrite(error: OSError) -> tuple[str, str]:
    return (
        _("The training could not be started: {reason}.").format(reason=error.strerror or error),
        _("Free some space, or look at the Python in Setup."),
    )
