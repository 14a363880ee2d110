"""The tab that segments: model, inputs, output, Apply and the result."""

from dataclasses import replace

import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

from . import GeometryDoctor, NodeConversion
from .ChannelPickers import ChannelPickers
from .DeviceChooser import DeviceChooser
from .ModelChooser import ModelChooser
from .Models import locatorFor
from .Notice import ERROR, GOOD, INFORMATION, WARNING, Notice
from .ResultView import ResultView
from .SegmentationLogic import SegmentationRequest
from .SegmentWays import WayBoxes
from .Text import bullets, escape, formatBytes, formatSeconds
from .VolumeDescription import frameOfReference
from .VolumeSequence import sequenceOf

__all__ = ["SegmentTab"]

UPDATE_DELAY = 250  # ms: a change of model empties and fills all pickers; the plan is asked for once
HEAD_MM = (192, 192, 160)  # superior, anterior, right
LINE_LENGTH = 500  # characters of a log line that are shown
_LEVELS = {"ok": GOOD, "note": INFORMATION, "warning": WARNING, "error": ERROR}
_ORDER = [GOOD, INFORMATION, WARNING, ERROR]


class SegmentTab(VTKObservationMixin):
    """What the panel (`Panel`) expects of every tab: title, widget, setParameterNode, setModels, enter, cleanup."""

    def __init__(self, services) -> None:
        super().__init__()
        self.title = _("Segment")
        self._services = services
        self.widget = slicer.util.loadUI(services.resourcePath("UI/SegmentTab.ui"))
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self.widget.setMRMLScene(slicer.mrmlScene)
        self._parameters = None
        self._connected, self._guiTag = None, None  # whose values the selectors show
        self._running = self._closed = False
        self._request = None  # of the run or the last one
        self._series = None  # that the chosen volumes show a frame of
        self._plan = None
        self._planNumber = 0
        self._planning = False
        self._failure = ""  # what the last run ended with, in words
        self._consentGiven = False
        self._unmatched: list[str] = []
        self._doubts: list[str] = []  # about a volume that was taken over from the model before

        self._matchNotice = Notice(self.ui, "matchNotice")
        self._geometry = Notice(self.ui, "geometryNotice")
        self._planNotice = Notice(self.ui, "planNotice")
        self._message = Notice(self.ui, "messageNotice")
        self._models = ModelChooser(self.ui, self._onModelChosen)
        self._pickers = ChannelPickers(self.ui.channelPickers, self._onChannelsChanged)
        self._devices = DeviceChooser(self.ui.deviceBox, self._scheduleUpdate)
        self._ways = WayBoxes(self.ui, self._scheduleUpdate)
        self._result = ResultView(self.ui, services.logic)

        self._timer = qt.QTimer()
        self._timer.singleShot = True
        self._timer.interval = UPDATE_DELAY
        self._timer.connect("timeout()", self._update)
        self.ui.matchButton.connect("clicked()", self._onMatch)
        self.ui.alignButton.connect("clicked()", self._onAlign)
        self.ui.applyButton.connect("clicked()", self._onApply)
        self.ui.trainingButton.connect("clicked()", self._onAddToTraining)
        self.ui.clearLogButton.connect("clicked()", self.ui.logText.clear)
        self.ui.locateBox.connect("toggled(bool)", self._scheduleUpdate)
        self.ui.framesBox.connect("toggled(bool)", self._scheduleUpdate)
        self.ui.outputSelector.connect("currentNodeChanged(vtkMRMLNode*)", self._scheduleUpdate)
        self.ui.roiSelector.connect("currentNodeChanged(vtkMRMLNode*)", self._scheduleUpdate)
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.NodeRemovedEvent, self._onNodeRemoved)
        # Before the selectors are told: as any combo box, they would go on to the neighbour of what is removed.
        self.addObserver(scene, scene.NodeAboutToBeRemovedEvent, self._onNodeAboutToBeRemoved, priority=100.0)
        self.ui.progressBar.visible = False
        self.ui.progressText.visible = False
        self._update()

    # ---------------------------------------------------------------- what the panel calls

    @property
    def running(self) -> bool:
        """Whether a segmentation is under way."""
        return self._running

    @property
    def idle(self) -> bool:
        """Whether nothing is under way: no run, no question to the backend, no update that is still to come."""
        return not self._running and not self._planning and not self._timer.active

    @property
    def models(self) -> list:
        """The models that can be chosen."""
        return self._models.models

    def setParameterNode(self, parameters) -> None:
        """Show the choices of a scene; None while a scene is being closed."""
        # Slicer's disconnectGui leaves an observer behind, so what is connected stays so while the scene does.
        same = parameters is not None and parameters is self._connected
        if not same and self._connected is not None:
            self._connected.disconnectGui(self._guiTag)
            self._connected, self._guiTag = None, None
        self._parameters = None
        self._observe([])
        if parameters is None:
            self._result.clear()
            self._message.clear()
            return
        self._models.choose(parameters.model)
        self._showChannels(parameters)
        if not same:
            # Not connectGui, which tells no tag to disconnect by.
            bound = {widget.property("SlicerParameterName"): widget for widget in vars(self.ui).values()}
            self._guiTag = parameters.connectParametersToGui({name: widget for name, widget in bound.items() if name})
            self._connected = parameters
        self._parameters = parameters
        self._chooseUsualModel()
        self._update()

    def setModels(self, models: list, emptyText: str) -> None:
        """The models that were found; emptyText says why there are none."""
        self._models.setModels(models, emptyText)
        if self._parameters is not None:
            self._showChannels(self._parameters)
            self._chooseUsualModel()
        self._update()

    def chooseModel(self, sha256: str) -> None:
        """Choose a model by the hash of its weights; one that is listed a moment later is chosen then."""
        if self._parameters is not None and not self._running:
            self._parameters.model = sha256
            self._models.choose(sha256)
            self._showChannels(self._parameters)
            self._update()

    def setDevices(self, devices: list[dict], automatic: str) -> None:
        """What the backend can compute on."""
        self._devices.setDevices(devices, automatic)
        self._scheduleUpdate()

    def enter(self) -> None:
        """The panel is shown: volumes may have come or moved since."""
        model = self._models.chosen
        if not self._running and model is not None and len(self._pickers.volumes()) < len(model.channels):
            self._unmatched = self._pickers.match(onlyEmpty=True)
        self._update()

    def setupChanged(self) -> None:
        """What is installed has changed."""
        self._update()

    def appendLog(self, text: str) -> None:
        """Add lines to the log, which keeps the last thousand."""
        for line in text.splitlines():
            self.ui.logText.appendPlainText(line[:LINE_LENGTH])

    def cancel(self) -> None:
        """Stop the run, if there is one; the scene is left as it was."""
        if self._running:
            self._services.logic.cancel()

    def cleanup(self) -> None:
        """Let go of the scene; nothing is shown any more."""
        self._closed = True  # letting go empties the pickers, which would call for an update
        self._timer.stop()
        self.setParameterNode(None)
        self._pickers.cleanup()
        self.widget.setMRMLScene(None)
        self.removeObservers()

    # ---------------------------------------------------------------- choices

    def _chooseUsualModel(self) -> None:
        usual = self._models.usual
        if usual is not None and not self._parameters.model:
            self._models.choose(usual.sha256)
            self._onModelChosen(usual)

    def _onModelChosen(self, model) -> None:
        if self._parameters is None:
            return
        kept = self._pickers.volumes()
        only = self._pickers.onlyVolume
        self._parameters.model = model.sha256
        self._pickers.setChannels(model.channels)
        self._pickers.setVolumes(kept)
        doubts = []
        if only is not None and len(model.channels) == 1 and not self._pickers.volumes():
            doubts = self._pickers.takeOver(only)
        self._unmatched = self._pickers.match(onlyEmpty=True)
        self._doubts = doubts  # what is chosen otherwise clears them
        self._message.clear()
        self._update()

    def _showChannels(self, parameters) -> None:
        """The pickers of the chosen model, with the volumes that the scene remembers."""
        stored = dict(parameters.channels.items())
        held, self._parameters = self._parameters, None  # showing is no change
        self._pickers.setChannels(self._models.chosen.channels if self._models.chosen else ())
        self._pickers.setVolumes({name: node for name, node in stored.items() if node is not None and node.GetScene()})
        self._parameters = held

    def _onChannelsChanged(self) -> None:
        self._consentGiven = False
        self._doubts = []
        if self._parameters is not None and self._models.chosen is not None:
            volumes = self._pickers.volumes()
            if volumes != dict(self._parameters.channels.items()):
                self._parameters.channels = volumes
        self._scheduleUpdate()

    def _onMatch(self) -> None:
        self._unmatched = self._pickers.match()
        self._update()

    def _onAlign(self) -> None:
        volumes = self._pickers.volumes()
        reference, *others = volumes.values()
        needed = [node for node in others if not self._onSameGrid(reference, node)]
        frame = frameOfReference(reference)
        checks = [GeometryDoctor.canAlign(node, reference, (frameOfReference(node), frame)) for node in needed]
        refused = [check.sentence for check in checks if not check.possible]
        if refused:
            self._message.show(ERROR, *refused)
            return
        asked = [check.sentence for check in checks if check.needsConsent]
        if asked and not self._consentGiven:
            self._consentGiven = True
            self._message.show(WARNING, *asked, _("Press the button again to align them all the same."))
            return
        try:
            aligned = {node: GeometryDoctor.align(node, reference) for node in needed}
        except NodeConversion.ConversionError as error:
            self._message.show(ERROR, error.message, error.hint)
            return
        self._pickers.setVolumes({name: aligned.get(node, node) for name, node in volumes.items()})
        names = ", ".join(node.GetName() for node in aligned.values())
        self._message.show(GOOD, _("Aligned: {names}. The originals are unchanged.").format(names=names))
        self._update()

    # ---------------------------------------------------------------- what is shown

    def _scheduleUpdate(self) -> None:
        if not self._closed:
            self._timer.start()

    def _update(self) -> None:
        """Bring buttons, findings and the plan in line with the choices."""
        if self._running:
            return
        volumes = self._pickers.volumes()
        region = self.ui.roiSelector.currentNode()
        self._observe([*volumes.values(), *([region] if region is not None else [])])
        empty = self._models.chosen is not None and len(volumes) < len(self._models.chosen.channels)
        self._matchNotice.show(INFORMATION, *(self._unmatched if empty else self._doubts))
        self._showFindings(list(volumes.values()))
        self._showLocating()
        self._showSeries(list(volumes.values()))
        self._ways.show(self._models.chosen)
        request = self._makeRequest()
        missing = [self._services.problem()] if self._services.problem() else []
        missing += self._missing(request)
        button = self.ui.applyButton
        button.text = _("Apply")
        button.enabled = not missing
        button.toolTip = bullets(_("Before segmenting:"), missing) if missing else _("Segment the chosen volumes.")
        self._askForPlan(None if missing else request)
        self._askForMemory()

    def _missing(self, request) -> list[str]:
        if request is not None:
            return self._services.logic.missing(request)
        return [_("Choose a model.")]

    def _makeRequest(self):
        model = self._models.chosen
        if model is None or self._parameters is None:
            return None
        return SegmentationRequest(
            model=model,
            channels=self._pickers.volumes(),
            device=self._devices.name,
            outputNode=self.ui.outputSelector.currentNode(),
            roiNode=self.ui.roiSelector.currentNode(),
            window=None,
            locator=self._locator if self.ui.locateBox.checked else None,
            ways=self._ways.ways(model),
            uncertainty=self.ui.uncertaintyBox.checked and not self._allFrames,
            series=self._series if self._allFrames else None,
        )

    @property
    def _locator(self):
        """The model that finds the place for the chosen one, where that wants a crop and has no region."""
        model = self._models.chosen
        if model is None or self.ui.roiSelector.currentNode() is not None:
            return None
        return locatorFor(model, self._models.models)

    def _showLocating(self) -> None:
        model, locator = self._models.chosen, self._locator
        box = self.ui.locateBox
        box.visible = model is not None and bool(model.cropAround)
        box.enabled = locator is not None
        if locator is not None:
            text = _("Find the {structure} with {model} first")
            box.text = text.format(structure=model.cropAround[0], model=locator.name)
        elif box.visible:
            box.text = _("Find the {structure} with another model first").format(structure=model.cropAround[0])

    @property
    def _allFrames(self) -> bool:
        return self._series is not None and self.ui.framesBox.checked

    def _showSeries(self, volumes: list) -> None:
        series = sequenceOf(volumes)
        if (series and series.node) != (self._series and self._series.node):
            self.ui.framesBox.checked = False
        self._series = series
        box = self.ui.framesBox
        box.visible = series is not None
        if series is not None:
            text = _("All {count} frames of {sequence}")
            box.text = text.format(count=series.count, sequence=series.node.GetName())
        self.ui.uncertaintyBox.enabled = not self._allFrames

    def _showFindings(self, volumes: list) -> None:
        self.ui.matchRow.visible = self._models.chosen is not None
        self.ui.alignRow.visible = False
        usable = [node for node in volumes if not NodeConversion.exportProblem(node)]
        if len(usable) < 2:
            self._geometry.clear()
            return
        findings = GeometryDoctor.examine(usable, [frameOfReference(node) for node in usable])
        worst = max((_LEVELS.get(finding.severity, WARNING) for finding in findings), key=_ORDER.index)
        self._geometry.show(worst, *(finding.sentence for finding in findings))
        self.ui.alignRow.visible = not all(self._onSameGrid(usable[0], node) for node in usable[1:])

    @staticmethod
    def _onSameGrid(reference, node) -> bool:
        geometries = [GeometryDoctor.describeGeometry(each) for each in (reference, node)]
        return GeometryDoctor.sameGrid(*geometries)

    def _askForPlan(self, request) -> None:
        self._planNumber += 1
        number = self._planNumber
        self._plan = None
        self._planning = request is not None
        if request is None:
            self._planNotice.clear()
            return
        self._planNotice.show(INFORMATION, _("Planning the memory..."))

        def onDone(plan, message: str) -> None:
            if number != self._planNumber or self._running:
                return  # the choices have changed meanwhile
            self._plan, self._planning = plan, False
            if plan is None:
                # What stands below the button already is not said twice.
                said = bool(self._message.text) and message == self._failure
                self._planNotice.show(WARNING, "" if said else message)
            else:
                sentences = [plan.sentence]
                if request.series is not None and plan.seconds:
                    words = {"count": request.series.count, "time": formatSeconds(plan.seconds * request.series.count)}
                    sentences.append(_("That is for one frame; all {count} take about {time}.").format(**words))
                self._planNotice.show(GOOD if plan.fits else WARNING, *sentences)

        self._services.logic.plan(request, onDone)

    def _askForMemory(self) -> None:
        """What the chosen model needs for a head, for its card: independent of the volumes that are loaded."""
        model = self._models.chosen
        if model is None or self._parameters is None:
            return
        if self._services.problem() or self._models.knowsMemoryOf(model):
            return
        self._models.setMemory(model.sha256, _("(being predicted)"))
        shape = [str(max(1, round(length / spacing))) for length, spacing in zip(HEAD_MM, model.spacingMm, strict=True)]
        arguments = ["plan", "--model", model.path, "--shape", *shape]
        arguments += ["--spacing", *(f"{spacing:.6f}" for spacing in model.spacingMm)]

        def onFinished(outcome) -> None:
            needed = outcome.result.get("predicted_bytes") if outcome.state == "done" else None
            size = " \u00d7 ".join(map(str, HEAD_MM))
            text = _("about {amount} for {size} mm").format(amount=formatBytes(needed), size=size) if needed else ""
            self._models.setMemory(model.sha256, text)

        self._services.backend.request(arguments, None, onFinished)

    # ---------------------------------------------------------------- the run

    def _onApply(self) -> None:
        if self._running:
            self.ui.applyButton.enabled = False
            self.ui.applyButton.text = _("Cancelling...")
            self._services.logic.cancel()
            return
        request = self._makeRequest()
        if request is None or self._missing(request):
            self._update()
            return
        if self._plan is not None and not self._plan.fits and all(self._plan.window):
            request = replace(request, window=self._plan.window)  # the largest that fits, where one does
        self._request = request
        self._planNumber += 1  # an answer that is still on its way comes too late
        self._planning = False
        self._setRunning(True)
        self._result.clear()
        self._message.clear()
        self._onProgress(_("Starting"), None, None)
        self._services.logic.start(request, self._onProgress, self._onDone)

    def _onProgress(self, stage: str, fraction: float | None, eta: float | None) -> None:
        bar = self.ui.progressBar
        bar.maximum = 0 if fraction is None else 1000
        bar.value = 0 if fraction is None else round(1000 * min(1.0, max(0.0, fraction)))
        left = formatSeconds(eta)
        text = _("{stage}, {time} left").format(stage=stage, time=left) if left else stage
        self.ui.progressText.text = escape(text)

    def _onDone(self, outcome) -> None:
        predicted = self._plan.predictedBytes if self._plan is not None else None
        self._failure = f"{outcome.message} {outcome.hint}".strip() if outcome.state == "failed" else ""
        self._setRunning(False)
        if outcome.state == "failed":
            self._message.show(ERROR, outcome.message, outcome.hint)
            self.appendLog(outcome.message)
        self._update()
        if self._parameters is not None and not self._services.problem():
            self._services.refreshDevices()  # their free memory is another one now
        if outcome.state == "done":
            first = next(iter(self._request.channels.values()), None)
            # What is usual is so for whole images; a region may have its edge anywhere.
            usual = self._request.model.leastConfidence if self._request.roiNode is None else 0.0
            self._result.show(outcome, first, predicted, usual)
            for sentence in (*outcome.warnings, *outcome.notes):
                self.appendLog(sentence)
            self.appendLog(
                _("Done in {time}, measured peak {peak}.").format(
                    time=formatSeconds(outcome.seconds), peak=formatBytes(outcome.measuredPeakBytes or None)
                )
            )
        elif outcome.state == "cancelled" and self._sceneIsThere:
            # Of a scene that is closed there is nothing to say.
            self._message.show(INFORMATION, outcome.message, _("The scene is as it was."))

    @property
    def _sceneIsThere(self) -> bool:
        """Whether the volumes of the last run still are in a scene."""
        return any(node.GetScene() is not None for node in self._request.channels.values())

    def _setRunning(self, running: bool) -> None:
        self._running = running
        ui = self.ui
        choices = (ui.searchBox, ui.modelList, ui.channelPickers, ui.matchRow, ui.alignRow, ui.roiRow, ui.framesBox)
        for widget in choices:
            widget.enabled = not running
        ui.outputSelector.enabled = not running
        ui.deviceBox.enabled = not running
        ui.progressBar.visible = running
        ui.progressText.visible = running
        ui.applyButton.enabled = True
        ui.applyButton.text = _("Cancel") if running else _("Apply")
        ui.applyButton.toolTip = _("Stop; the scene stays as it was.") if running else ""

    def _onAddToTraining(self) -> None:
        """The result, corrected or right as it is, becomes a case to learn from."""
        node, request = self.ui.show3DButton.segmentationNode(), self._request
        channels = {name: volume for name, volume in request.channels.items() if volume.GetScene() is not None}
        first = next(iter(channels.values()), None)
        if node is not None and first is not None:
            self._services.cases.add(first.GetName(), channels, node)
            self._services.showFineTuning()

    # ---------------------------------------------------------------- the scene

    def _observe(self, nodes: list) -> None:
        """Follow the volumes and the region, and nothing else."""
        observed = {entry[0] for entry in self.Observations if entry[2] == self._onInputChanged}
        events = (
            vtk.vtkCommand.ModifiedEvent,
            slicer.vtkMRMLTransformableNode.TransformModifiedEvent,
            slicer.vtkMRMLVolumeNode.ImageDataModifiedEvent,
            slicer.vtkMRMLMarkupsNode.PointModifiedEvent,
        )
        for node in observed - set(nodes):
            for event in events:
                self.removeObserver(node, event, self._onInputChanged)
        for node in set(nodes) - observed:
            for event in events:
                self.addObserver(node, event, self._onInputChanged)

    def _onInputChanged(self, _caller, _event) -> None:
        self._scheduleUpdate()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeAboutToBeRemoved(self, _caller, _event, node) -> None:
        self._pickers.release(node)
        for selector in (self.ui.outputSelector, self.ui.roiSelector):
            if selector.currentNode() == node:
                selector.setCurrentNode(None)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeRemoved(self, _caller, _event, node) -> None:
        self._result.onNodeRemoved(node)
