"""The tab that fine-tunes: a model, the training cases, options, Start, and the run with its proof."""

from dataclasses import replace

import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

from .CaseChannels import imagesOf, usedChannels
from .CaseExamination import CaseExamination
from .CaseExport import CaseExport, layoutOf, stampOf
from .CaseFindings import findingsOf, labelNames, problems, summary, tableOf, wrongCases
from .CaseTable import LEVELS, CaseTable
from .ChannelPickers import ChannelPickers
from .LabelDialog import LabelDialog
from .LabelMapping import LabelConflict
from .Notice import GOOD, INFORMATION, WARNING, Notice
from .OptionsForm import OptionsForm
from .RunSection import RunSection
from .RunStart import RunStart
from .SceneCases import caseOf, casesOfScene
from .Text import bullets, escape

__all__ = ["FineTuneTab"]

UPDATE_DELAY = 200  # ms: many changes come together


class FineTuneTab(VTKObservationMixin):
    """What the panel (`Panel`) expects of every tab: title, widget, setParameterNode, setModels, enter, cleanup."""

    def __init__(self, services) -> None:
        super().__init__()
        self.title = _("Fine-tune")
        self._services = services
        self.cases = services.cases
        self.widget = slicer.util.loadUI(services.resourcePath("UI/FineTuneTab.ui"))
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self.widget.setMRMLScene(slicer.mrmlScene)
        self._parameters = None
        self._models: list = []
        self._emptyText = ""
        self._filling = self._closed = False
        self._findings: dict[str, list] = {}
        self.labelDialog = None

        self._export = CaseExport(slicer.util.tempDirectory)
        self._examination = CaseExamination(self.cases, services.backend, self._export)
        self._start = RunStart(self.cases, self._examination, self._export, self._onProgress)
        self._baseNotice = Notice(self.ui, "baseNotice")
        self._casesNotice = Notice(self.ui, "casesNotice")
        self._caseNotice = Notice(self.ui, "caseNotice")
        self._workNotice = Notice(self.ui, "workNotice")
        self._proofNotice = Notice(self.ui, "proofNotice")
        self._message = Notice(self.ui, "messageNotice")
        self._timer = qt.QTimer()
        self._timer.singleShot = True
        self._timer.interval = UPDATE_DELAY
        self._timer.connect("timeout()", self._update)
        self._table = CaseTable(self.ui.casesTable, self.cases, self._onSelected)
        self._pickers = ChannelPickers(self.ui.casePickers, self._onPicked)
        self._form = OptionsForm(self.ui, services.backend, self._schedule)
        self.run = RunSection(self.ui, services, self._onRunChanged)
        self.cases.changed.append(self._schedule)
        self._connect()
        self._showWork(False)
        self._update()

    def _connect(self) -> None:
        ui = self.ui
        for button, action in (
            (ui.addSceneButton, self._onAddScene),
            (ui.addFolderButton, self._onAddFolder),
            (ui.addJsonButton, self._onAddJson),
            (ui.labelsButton, self._onLabels),
            (ui.checkButton, self._onCheck),
            (ui.removeButton, self._onRemove),
            (ui.cancelButton, self._examination.cancel),
            (ui.startButton, self._onStart),
        ):
            button.connect("clicked()", action)
        ui.baseBox.connect("currentIndexChanged(int)", self._onBase)
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.NodeRemovedEvent, self._onNodeRemoved)
        self.addObserver(scene, scene.NodeAboutToBeRemovedEvent, self._onNodeAboutToBeRemoved, priority=100.0)

    # ---------------------------------------------------------------- what the panel calls

    @property
    def model(self):
        """The model to tune (a `ModelInfo`), or None."""
        index = self.ui.baseBox.currentIndex
        return self._models[index] if 0 <= index < len(self._models) else None

    @property
    def working(self) -> bool:
        """Whether cases are written, looked at, or a run is about to begin."""
        return self._examination.running or self._start.running

    def setParameterNode(self, parameters) -> None:
        """Show the choices of a scene; None while a scene is being closed."""
        if parameters is None:
            # Not later: what the views showed before is given back by ids, and another scene uses them again.
            self.run.view.leave()
        self._parameters = parameters
        self.cases.setNode(None if parameters is None else parameters.parameterNode)
        self._message.clear()
        self._workNotice.clear()
        self._showModels()
        self._schedule()

    def setModels(self, models: list, emptyText: str) -> None:
        """The models that were found; emptyText says why there are none."""
        self._models, self._emptyText = list(models), emptyText
        self._showModels()
        self._schedule()

    def chooseModel(self, sha256: str) -> None:
        """Choose the model to tune by the hash of its weights; one that is listed a moment later is chosen then."""
        if self._parameters is not None:
            self._parameters.baseModel = sha256
            self._showModels()

    def enter(self) -> None:
        """The panel, or this tab of it, is shown: cases may have changed, and runs may have ended, since."""
        self._form.forgetPlans()
        self._showModels()
        self.run.find()
        self._schedule()

    def setupChanged(self) -> None:
        """What is installed has changed."""
        self._schedule()

    def cancel(self) -> None:
        """Stop what is done to the cases; a run goes on, as it is a process of its own."""
        self._examination.cancel()

    def cleanup(self) -> None:
        """Let go of the scene; nothing is shown any more. A run goes on."""
        self._closed = True
        self._timer.stop()
        if self.labelDialog is not None:
            self.labelDialog.dialog.close()
        self.run.cleanup()
        self._export.cleanup()
        self._pickers.cleanup()
        self.cases.changed.clear()
        self.widget.setMRMLScene(None)
        self.removeObservers()

    # ---------------------------------------------------------------- the model

    def _showModels(self) -> None:
        self._filling = True
        box = self.ui.baseBox
        box.clear()
        for model in self._models:
            box.addItem(f"{model.name} {model.version}".strip())
        wanted = [self._parameters.baseModel, self._parameters.model] if self._parameters is not None else []
        known = [model.sha256 for model in self._models]
        places = [known.index(sha256) for sha256 in wanted if sha256 in known]
        box.currentIndex = places[0] if places else (0 if len(known) == 1 else -1)
        self._filling = False
        self._matchCases()

    def _onBase(self, _index: int) -> None:
        if self._filling or self._parameters is None or self.model is None:
            return
        self._parameters.baseModel = self.model.sha256
        self._matchCases()
        self._schedule()

    def _matchCases(self) -> None:
        """Find images for the channels of the model that cases of the scene lack, or call otherwise."""
        model = self.model
        self._pickers.setChannels(model.channels if model is not None else ())
        if model is None:
            return
        wanted = [channel.name for channel in model.channels]
        for row in self.cases.rows:
            if not row.inScene or row.segmentation is None or all(name in row.channels for name in wanted):
                continue
            images = {name: volume for name, volume in imagesOf(row, model).items() if name in wanted}
            found = caseOf(row.segmentation, model.channels)
            if found is not None or images:
                self.cases.setChannels(row, {**(found[1] if found is not None else {}), **images})

    # ---------------------------------------------------------------- the cases

    def _onAddScene(self) -> None:
        model = self.model
        if model is None:
            return
        known = [row.segmentation for row in self.cases.rows]
        found = [case for case in casesOfScene(slicer.mrmlScene, model.channels) if case[2] not in known]
        for case in found:
            self.cases.add(*case)
        if not found:
            self._workNotice.show(
                INFORMATION,
                _("There is no further segmentation in the scene that belongs to an image."),
                _("Segment a volume, or draw one in the Segment Editor, and correct it."),
            )
        else:
            self._workNotice.clear()

    def _onAddFolder(self) -> None:
        self._addDataSet(qt.QFileDialog.getExistingDirectory(self.widget, _("Add the cases of a data set"), ""))

    def _onAddJson(self) -> None:
        title = _("Add the cases of a dataset.json")
        self._addDataSet(qt.QFileDialog.getOpenFileName(self.widget, title, "", _("Data sets (*.json)")))

    def _addDataSet(self, path: str) -> None:
        if path and not self.working:
            self._showWork(True)
            self._examination.addDataSet(path, self._onProgress, self._onWorkDone)
            self._updateButtons()

    def _onCheck(self) -> None:
        if self.model is not None and not self.working:
            self._showWork(True)
            self._examination.examine(self.model, self._onProgress, self._onWorkDone)
            self._updateButtons()

    def _onRemove(self) -> None:
        self.cases.remove(self._table.selected)

    def _onLabels(self) -> None:
        names = list(dict.fromkeys(name for row in self.cases.rows for name in labelNames(self.cases, row)))
        labels = [label.name for label in self.model.labels]
        if names:
            self.labelDialog = LabelDialog(self.widget, names, labels, self.cases.choices, self.cases.choose)

    def _onProgress(self, what: str, done: int, total: int) -> None:
        self.ui.workProgress.maximum = total
        self.ui.workProgress.value = done if total else -1
        self.ui.workText.text = escape(_("{what}...").format(what=what))

    def _onWorkDone(self, dataset, message: str, hint: str) -> None:
        """After adding or checking: dataset None where that did not work; hint: what matters of the whole."""
        self._showWork(False)
        self._workNotice.show(WARNING, *([message, hint] if dataset is None else [hint]))
        self._schedule()

    def _showWork(self, working: bool) -> None:
        if working:
            self._workNotice.clear()
        self.ui.workRow.visible = working
        self.ui.workText.visible = working
        self._schedule()

    def _onSelected(self) -> None:
        self._showCase()
        self._updateButtons()

    def _onPicked(self) -> None:
        selected = self._table.selected
        if not self._filling and len(selected) == 1 and selected[0].inScene:
            self.cases.setChannels(selected[0], self._pickers.volumes())

    def _onRunChanged(self) -> None:
        if not self.run.active:
            self._message.clear()  # it said that a training has begun
            self._form.forgetPlans()
        self._schedule()

    # ---------------------------------------------------------------- what is shown

    def _schedule(self) -> None:
        if not self._closed:
            self._timer.start()

    def _update(self) -> None:
        """Bring everything in line with cases, options and the run."""
        self._timer.stop()
        model = self.model
        self._baseNotice.show(INFORMATION, "" if self._models else self._emptyText)
        self._findings, table = {}, ()
        if model is not None:
            self._forgetStale(model)
            asked, table, used = self._asked(model), tableOf(self.cases, model), usedChannels(self.cases, model)
            self._findings = {row.key: findingsOf(self.cases, row, asked, table, used) for row in self.cases.rows}
        self._table.show(self._findings, model, table)
        self._showSummary(model)
        self._showCase()
        self._updateButtons()
        # Only where somebody looks: the first plan imports torch.
        if self.widget.visible and not self._services.problem():
            self._form.showPlan(model)

    def _asked(self, model):
        """The model as it is asked for: one that learns to do without channels takes cases that lack some."""
        if not self._form.options.channelDropout:
            return model
        return replace(model, channels=tuple(replace(channel, optional=True) for channel in model.channels))

    def _forgetStale(self, model) -> None:
        """What the doctor said of a case that was changed since counts no more."""
        examined = [row for row in self.cases.rows if not row.ofDataSet and row.examined is not None]
        try:
            layout = layoutOf(self.cases, model) if examined else None
        except LabelConflict:
            layout = None
        for row in examined:
            there = layout is not None and (row.segmentation or row.stored) is not None
            if not there or stampOf(self.cases, row, model, layout) != row.examined:
                row.findings, row.examined = [], None

    def _showSummary(self, model) -> None:
        severity, sentences, proof = summary(self.cases, model, self._findings)
        self._casesNotice.show(LEVELS[severity], *sentences)
        self._proofNotice.show(WARNING if proof and proof[0] == "warning" else INFORMATION, *proof[1:])

    def _showCase(self) -> None:
        """The selected case: its findings in words, and its images."""
        selected = self._table.selected
        self.ui.caseDetails.visible = len(selected) == 1
        if len(selected) != 1:
            return
        (row,) = selected
        findings = self._findings.get(row.key, [])
        self.ui.caseTitle.text = f"<b>{escape(row.name)}</b>"
        level = LEVELS[self.cases.worst(findings)] if findings else GOOD
        good = _("Nothing is wrong with it.") if row.examined is not None else ""
        self._caseNotice.show(level, *([finding.sentence for finding in findings] or [good]))
        self.ui.casePickers.visible = row.inScene
        if row.inScene:
            self._filling = True
            self._pickers.setVolumes(row.channels)
            self._filling = False

    def _updateButtons(self) -> None:
        ui, idle = self.ui, not self.working
        hasModel = self.model is not None and self._parameters is not None
        for button in (ui.addSceneButton, ui.addFolderButton, ui.addJsonButton):
            button.enabled = idle and hasModel
        ui.labelsButton.enabled = idle and hasModel and bool(self.cases.rows)
        ui.removeButton.enabled = idle and bool(self._table.selected)
        ui.casesTable.enabled = ui.casePickers.enabled = ui.baseBox.enabled = idle
        missing = self._missing()
        unready = [self._services.problem()] if self._services.problem() else []
        unready += problems(self.cases, self.model, self._findings) if hasModel else [_("Choose the model to tune.")]
        ui.checkButton.enabled = idle and not unready
        said = _("Looks at all images and labels as the training will see them.")
        ui.checkButton.toolTip = bullets(_("Before they can be checked:"), unready) if unready else said
        ui.startButton.enabled = idle and not missing
        ui.startButton.toolTip = bullets(_("Before it can start:"), missing) if missing else _("Fine-tune the model.")
        self._form.setEnabled(idle)

    def _missing(self) -> list[str]:
        """Why Start cannot be pressed, one plain sentence each."""
        if self._services.problem():
            return [self._services.problem()]
        if self.model is None or self._parameters is None:
            return [_("Choose the model to tune.")]
        channels = usedChannels(self.cases, self.model)
        sentences = [*problems(self.cases, self.model, self._findings), *self._form.problems(self.model, channels)]
        if self.run.active:
            sentences.append(_("A training is under way; wait for it, or pause it."))
        return sentences

    # ---------------------------------------------------------------- starting

    def _onStart(self) -> None:
        self._update()  # a node may have been changed in another module without a word
        if self.working or self._missing():
            return
        self._message.clear()
        self._showWork(True)
        self._start.start(self.model, self._form.options, self._namesOfBad, self._onStarted)
        self._updateButtons()

    def _namesOfBad(self) -> list[str]:
        self._update()
        return wrongCases(self.cases, self._findings)

    def _onStarted(self, run, level: str, sentences) -> None:
        if run is not None:
            self.run.show(run, launched=True)
        self._showWork(False)
        self._message.show(level, *sentences)

    # ---------------------------------------------------------------- the scene

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeAboutToBeRemoved(self, _caller, _event, node) -> None:
        held, self._filling = self._filling, True  # the case is told when the node is gone
        self._pickers.release(node)
        self._filling = held

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeRemoved(self, _caller, _event, node) -> None:
        if self._parameters is not None:
            self.cases.nodeRemoved(node)
