"""The tab that segments many cases in the background, and steps through the results."""

import logging
from pathlib import Path

import ctk
import qt
import slicer
from slicer.i18n import tr as _

from . import Settings
from .BatchCase import ACCEPTED, DONE, EDITED, ENDINGS, FAILED, RUNNING, WAITING
from .BatchIntake import BatchIntake
from .BatchQueue import BatchQueue
from .Models import locatorFor
from .Notice import GOOD, INFORMATION, WARNING, Notice
from .ReviewQueue import ReviewQueue
from .ReviewSection import ReviewSection
from .SegmentWays import WayBoxes
from .Table import setUpTable
from .Text import bullets, confidenceInWords, escape

__all__ = ["BatchTab"]

STEPS = 1000  # of the progress bar
FAILURES_SHOWN = 3


class BatchTab:
    """What the panel (`Panel`) expects of every tab: title, widget, setParameterNode, setModels, enter, cleanup."""

    def __init__(self, services) -> None:
        self.title = _("Batch")
        self._services = services
        self.widget = slicer.util.loadUI(services.resourcePath("UI/BatchTab.ui"))
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self._models: list = []
        self._wasRunning = False
        self._filled: list[tuple] = []  # what the rows of the table show
        self._notice = Notice(self.ui, "batchNotice")
        self.queue = BatchQueue(services.backend, slicer.util.tempDirectory)
        self.queue.changed.append(self._update)
        self.queue.progress = self._onProgress
        self.queue.log = services.log
        self.review = ReviewQueue(self.queue, services.cases, self._modelOf)
        self._review = ReviewSection(self.ui, self.review, self._update)
        self._intake = BatchIntake(
            self.ui, services.backend, self._notice, lambda: self.model, self.queue.add, self._update
        )
        self.ui.folderEdit.filters = ctk.ctkPathLineEdit.Dirs
        titles = [_("Case"), _("Channels"), _("State"), _("Confidence"), _("Review")]
        setUpTable(self.ui.casesTable, titles, stretched=(0,))
        self._ways = WayBoxes(self.ui, self._updateButtons)
        for kind, ending in zip((_("Slicer segmentation"), _("label map")), ENDINGS, strict=True):
            self.ui.endingBox.addItem(_("{kind} ({ending})").format(kind=kind, ending=ending))
        for button, action in (
            (self.ui.removeButton, self._onRemove),
            (self.ui.clearButton, self._onClear),
            (self.ui.startButton, self._onStart),
        ):
            button.connect("clicked()", action)
        self.ui.folderEdit.connect("currentPathChanged(QString)", self._onResultsFolder)
        self.ui.modelBox.connect("currentIndexChanged(int)", lambda _index: self._update())
        self.ui.endingBox.connect("currentIndexChanged(int)", lambda _index: self._updateButtons())
        self.ui.casesTable.connect("itemSelectionChanged()", self._updateButtons)
        self.ui.casesTable.connect("cellDoubleClicked(int,int)", self._onDoubleClick)
        self._update()

    # ---------------------------------------------------------------- what the panel calls

    def setParameterNode(self, parameters) -> None:
        """None while a scene is being closed: its cases go with it."""
        if parameters is None:
            self._saveReview()
            self.review.forget()
            self.queue.forgetScene()

    def setModels(self, models: list, emptyText: str) -> None:
        """The models that were found; emptyText says why there are none."""
        before, self._models = self.model, list(models)
        self._filled = []  # how sure a model should be is its own affair
        box = self.ui.modelBox
        wasBlocked = box.blockSignals(True)
        box.clear()
        for model in self._models:
            box.addItem(_("{name} {version}").format(name=model.name, version=model.version))
        box.setCurrentIndex(self._preferred(before))
        box.blockSignals(wasBlocked)
        if before is None:
            self._takeUpSettings()
        self._update()

    def setupChanged(self) -> None:
        """What is installed has changed."""
        self._update()

    def enter(self) -> None:
        """The panel is shown: a person may come back from the Segment Editor, or have put the folder right."""
        self.queue.setFolder(self.queue.folder)
        self._update()

    def cancel(self) -> None:
        """Stop the batch, and looking for cases; what is done is kept."""
        self._intake.cancel()
        self.queue.cancel()

    def cleanup(self) -> None:
        """Nothing is shown any more; what was changed in the open case is saved."""
        self._saveReview()
        self.review.forget()
        self._intake.cancel()
        self.queue.changed.clear()
        self.queue.progress = lambda text, fraction: None
        self.queue.log = lambda text: None

    def _preferred(self, before) -> int:
        """The row of the model that was chosen before, or of the version that has taken its place; else the first."""
        rows = {model.sha256: row for row, model in enumerate(self._models)}
        if before is not None and before.sha256 in rows:
            row = rows[before.sha256]
            if before.active and not self._models[row].active:
                heirs = [at for at, one in enumerate(self._models) if one.active and one.name == before.name]
                return heirs[0] if heirs else row
            return row
        active = [row for row, model in enumerate(self._models) if model.active]
        return next(iter([*active, *rows.values()]), -1)

    def _saveReview(self) -> None:
        try:
            self.review.save()
        except OSError:
            logging.exception("InvResSegment: the changes of the case under review could not be saved")

    @property
    def onFiles(self) -> bool:
        """Whether a case of files is being segmented, which needs nothing of the scene."""
        return self.queue.running and not self.queue.current.inScene

    @property
    def model(self):
        """The chosen `ModelInfo`, or None."""
        index = self.ui.modelBox.currentIndex
        return self._models[index] if 0 <= index < len(self._models) else None

    @property
    def _ending(self) -> str:
        """Of the files of results."""
        return ENDINGS[max(0, self.ui.endingBox.currentIndex)]

    # ---------------------------------------------------------------- the list

    def _onResultsFolder(self, path: str) -> None:
        # While a path is being typed it names no folder yet.
        if path and Path(path).is_dir() and self._review.leave():
            self._notice.clear()  # it was of the folder before
            self.queue.setFolder(Path(path))
            self._takeUpSettings()

    def _takeUpSettings(self) -> None:
        """What the batch of the folder was begun with: going on with it must not make anew what is done."""
        settings = self.queue.settings
        if settings is None:
            return
        row = next((row for row, model in enumerate(self._models) if model.sha256 == settings.model), None)
        if row is not None:
            self.ui.modelBox.setCurrentIndex(row)
        self._ways.choose(settings.ways)
        self.ui.endingBox.setCurrentIndex(ENDINGS.index(settings.ending))
        anew = self.queue.anew(self.model, self._ways.ways(self.model), self._ending) if self.model is not None else 0
        if row is None and anew:
            text = _(
                "The model that made these results is not among the models any more. Start makes {count} of them anew "
                "with {name}; what was edited or accepted stays."
            )
            self._notice.show(WARNING, text.format(count=anew, name=self.model.name))

    def _onRemove(self) -> None:
        self._removeCases(self._selected)

    def _onClear(self) -> None:
        self._removeCases(list(self.queue.cases))

    def _removeCases(self, cases: list) -> None:
        if self.review.current not in cases or self._review.leave():
            self.queue.remove(cases)

    # ---------------------------------------------------------------- the run

    def _onStart(self) -> None:
        if self._intake.reading:
            self._intake.cancel()
            self._update()
        elif self.queue.running:
            self.ui.startButton.enabled = False
            self.ui.startButton.text = _("Cancelling...")
            self.queue.cancel()
        else:
            self._notice.clear()
            locator = locatorFor(self.model, self._models)
            self.queue.start(self.model, Settings.device(), locator, self._ways.ways(self.model), self._ending)

    def _onProgress(self, text: str, fraction: float) -> None:
        self.ui.batchText.text = escape(text)
        self.ui.batchProgress.value = round(STEPS * fraction)

    def _onDoubleClick(self, row: int) -> None:
        case = self.queue.cases[row] if row < len(self.queue.cases) else None
        if case is not None and case.state == DONE:
            self._review.open(case)

    # ---------------------------------------------------------------- what is shown

    @property
    def _selected(self) -> list:
        rows = sorted({index.row() for index in self.ui.casesTable.selectionModel().selectedRows()})
        return [self.queue.cases[row] for row in rows if row < len(self.queue.cases)]

    def _update(self) -> None:
        """Bring table, texts and buttons in line with the cases."""
        self._fillTable()
        running = self.queue.running
        self.ui.batchProgress.visible = self.ui.batchText.visible = running
        if not running:
            self.ui.batchProgress.value = 0
            self.ui.batchText.text = ""
        if self.queue.problem:
            self._notice.show(WARNING, self.queue.problem)
        elif self._wasRunning and not running:
            self._showEnd()
        self._wasRunning = running
        self._review.update()
        self._updateButtons()

    def _showEnd(self) -> None:
        """What became of the run: each failure in a sentence, as far as there is room."""
        failed = [case for case in self.queue.cases if case.state == FAILED]
        count = len(self.queue.cases)
        if failed:
            texts = [_("{name}: {reason}").format(name=case.name, reason=case.message) for case in failed]
            if len(failed) > FAILURES_SHOWN:
                more = _("{count} more failed; point at a row to see why.").format(count=len(failed) - FAILURES_SHOWN)
                texts[FAILURES_SHOWN:] = [more]
            self._notice.show(WARNING, *texts)
        elif not self.queue.left:
            self._notice.show(GOOD, _("All cases are done; see Review below."))
        else:
            text = _("Stopped: {done} of {count} cases are done.").format(done=count - self.queue.left, count=count)
            self._notice.show(INFORMATION, text)

    def _fillTable(self) -> None:
        """Rows whose case has changed: with a thousand cases the others would take longer than the panel may wait."""
        table = self.ui.casesTable
        known = [_shown(case, case is self.review.current) for case in self.queue.cases]
        wasBlocked = table.blockSignals(True)
        table.setRowCount(len(known))
        for row, case in enumerate(self.queue.cases):
            if row >= len(self._filled) or self._filled[row] != known[row]:
                self._fillRow(table, row, case)
        self._filled = known
        table.blockSignals(wasBlocked)

    def _fillRow(self, table, row: int, case) -> None:
        states = {WAITING: _("waiting"), RUNNING: _("running"), DONE: _("done"), FAILED: _("failed")}
        reviews = {"": "", EDITED: _("edited"), ACCEPTED: _("accepted")}
        icons = {DONE: qt.QStyle.SP_DialogApplyButton, FAILED: qt.QStyle.SP_MessageBoxCritical}
        sure = "" if case.confidence is None else f"{case.confidence:.2f}"
        channels = ", ".join({**case.files, **case.nodes})
        told = "\n".join(filter(None, (case.message, case.notes, *self._findings(case))))
        for column, text in enumerate((case.name, channels, states[case.state], sure, reviews[case.review])):
            item = table.item(row, column)
            if item is None:
                item = qt.QTableWidgetItem()
                table.setItem(row, column, item)
            item.setText(text)
            item.setToolTip(told or text)
            if column == 2:
                kind = qt.QStyle.SP_MessageBoxWarning if case.state == DONE and case.message else None
                kind = kind or icons.get(case.state)
                item.setIcon(table.style().standardIcon(kind) if kind else qt.QIcon())
            font = item.font()
            font.setBold(case is self.review.current)
            item.setFont(font)

    def _modelOf(self, case):
        """The `ModelInfo` that made the result of a case, or None: not the one that is chosen by now."""
        return next((model for model in self._models if model.sha256 == case.model), None)

    def _findings(self, case) -> list[str]:
        """What is known of a result: how sure the model was, and its volumes."""
        if case.confidence is None:
            return []
        made = self._modelOf(case)
        sentence = confidenceInWords(case.confidence, made.leastConfidence if made is not None else 0.0)
        volumes = [
            _("{segment}: {volume} mL").format(segment=name, volume=f"{volume:.2f}")
            for name, volume in case.volumesMl.items()
        ]
        return [sentence, *volumes]

    def _updateButtons(self) -> None:
        model, running = self.model, self.queue.running
        problem = self._services.problem()
        reading = self._intake.reading
        self._intake.update(model is not None and not running)
        self._ways.show(model)
        self.ui.removeButton.enabled = bool(self._selected)
        self.ui.clearButton.enabled = bool(self.queue.cases) and not running
        for widget in (self.ui.modelBox, self.ui.folderEdit, self.ui.optionsRow):
            widget.enabled = not running
        missing, anew = [problem] if problem else [], 0
        if model is None:
            missing += self.queue.missing(None)
        else:
            asked = model, self._ways.ways(model), self._ending
            missing += self.queue.missing(*asked)
            anew = self.queue.anew(*asked)
        button = self.ui.startButton
        button.text = _("Cancel") if running or reading else _("Start")
        button.enabled = running or reading or not missing
        button.toolTip = _("Segments the cases one after the other; you can go on working.")
        if running or reading:
            button.toolTip = _("Stops; what is done is kept.")
        elif anew and not missing:
            text = _("{count} results were made by another model or with other options, and are made anew.")
            button.toolTip += " " + text.format(count=anew)
        elif missing:
            button.toolTip = bullets(_("Before starting:"), missing)


def _shown(case, isOpen: bool) -> tuple:
    """What the row of a case is made of."""
    found = (case.confidence, case.volumesMl, case.model)
    return (case, case.state, case.message, case.notes, *found, case.review, isOpen)
