"""The buttons that add cases to a batch: from the scene, a folder, a dataset.json, the DICOM database."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from . import BatchSources
from .BatchCase import BatchCase
from .NodeConversion import ConversionError
from .Notice import ERROR, INFORMATION, Notice

__all__ = ["BatchIntake"]


class BatchIntake:
    """`addButtons` of the Batch tab. model: gives the chosen one; nothing can be added without.

    onFound: gets cases, and tells how many of them are new. onChanged: called when reading begins and ends.
    """

    def __init__(
        self,
        ui,
        backend,
        notice: Notice,
        model: Callable[[], Any],
        onFound: Callable[[list[BatchCase]], int],
        onChanged: Callable[[], None],
    ) -> None:
        self._ui, self._backend, self._notice = ui, backend, notice
        self._model, self._onFound, self._onChanged = model, onFound, onChanged
        self._readingId: int | None = None  # of the request that lists a data set
        self._studies = None  # of the DICOM database, while they are being read
        self._found: list[BatchCase] = []
        ui.sceneButton.connect("clicked()", self._onScene)
        ui.datasetButton.connect("clicked()", self._onFolder)
        ui.jsonButton.connect("clicked()", self._onJson)
        ui.dicomButton.connect("clicked()", self._onDicom)

    @property
    def reading(self) -> bool:
        """Whether cases are being looked for."""
        return self._readingId is not None or self._studies is not None

    def cancel(self) -> None:
        """Stop looking for cases."""
        if self._studies is not None:
            self._studies = None
            self._notice.clear()
        if self._readingId is not None:
            self._backend.cancel(self._readingId)

    def update(self, possible: bool) -> None:
        """Enable the buttons. possible: a model is chosen, and nothing runs."""
        free = possible and not self.reading
        for button in (self._ui.sceneButton, self._ui.datasetButton, self._ui.jsonButton):
            button.enabled = free
        self._ui.dicomButton.enabled = free and getattr(slicer, "dicomDatabase", None) is not None

    def _add(self, find: Callable[[], list], nothing: str) -> None:
        try:
            found = find()
        except ConversionError as error:
            self._notice.show(ERROR, error.message, error.hint)
            return
        except OSError as error:
            self._notice.show(ERROR, str(error.strerror or error))
            return
        self._notice.clear()
        if not found:
            self._notice.show(INFORMATION, nothing)
        elif not self._onFound(found):
            self._notice.show(INFORMATION, _("These cases are in the list already."))

    def _onScene(self) -> None:
        channels = self._model().channels
        self._add(lambda: BatchSources.casesOfScene(channels), _("No loaded volume fits the channels of the model."))

    def _onFolder(self) -> None:
        self._read(qt.QFileDialog.getExistingDirectory(self._ui.sceneButton.window(), _("Folder of the cases"), ""))

    def _onJson(self) -> None:
        path = qt.QFileDialog.getOpenFileName(
            self._ui.sceneButton.window(), _("Data set"), "", _("Data sets (dataset.json *.json);;All files (*)")
        )
        self._read(path)

    def _onDicom(self) -> None:
        self._studies = BatchSources.casesOfDatabase(slicer.dicomDatabase, self._model().channels)
        self._found = []
        self._readStudy(self._studies)
        self._onChanged()

    def _readStudy(self, studies) -> None:
        """One study of the DICOM database, and the next one when Slicer has had its turn."""
        if studies is not self._studies:
            return  # cancelled
        try:
            done, count, case = next(studies)
        except StopIteration:
            self._studies = None
            text = _("No study of the DICOM database has series that fit the channels of the model.")
            self._add(lambda: self._found, text)
            self._onChanged()
            return
        if case is not None:
            self._found.append(case)
        self._notice.show(
            INFORMATION, _("Reading study {done} of {count} of the DICOM database...").format(done=done, count=count)
        )
        qt.QTimer.singleShot(0, lambda: self._readStudy(studies))

    def _read(self, path: str) -> None:
        """Asks the backend what lies there: a data set, or else scans for the chosen model."""
        if not path:
            return
        model = self._model()
        folder = Path(path)

        def onEvent(event: dict) -> None:
            if event.get("event") == "progress" and event.get("total"):
                text = _("Reading {path}: case {done} of {count}...")
                self._notice.show(INFORMATION, text.format(path=path, done=event["done"], count=event["total"]))

        def onDataset(outcome) -> None:
            if outcome.state == "done":
                contents = outcome.result.get("contents") or {}
                self._ended(lambda: BatchSources.casesOfDataset(contents, model.channels), path)
            elif outcome.state == "failed" and folder.is_dir() and not (folder / "dataset.json").is_file():
                arguments = ["segment", "--model", str(model.path), "--data", path, "--list"]
                self._readingId = self._backend.request(arguments, None, onListing)
            else:
                self._failed(outcome)

        def onListing(outcome) -> None:
            if outcome.state == "cancelled":
                self._failed(outcome)
                return
            listed = BatchSources.casesOfListing(outcome.result.get("cases") or [])
            self._ended(lambda: listed or BatchSources.casesOfFolder(folder, model.channels), path)

        self._notice.show(INFORMATION, _("Reading {path}...").format(path=path))
        self._readingId = self._backend.request(["check", "--data", path], onEvent, onDataset)
        self._onChanged()

    def _ended(self, find: Callable[[], list[BatchCase]], path: str) -> None:
        self._readingId = None
        self._add(find, _("No image was found in {path} that fits the channels of the model.").format(path=path))
        self._onChanged()

    def _failed(self, outcome) -> None:
        self._readingId = None
        if outcome.state == "cancelled":
            self._notice.clear()
        else:
            self._notice.show(ERROR, outcome.message, outcome.hint)
        self._onChanged()
