"""One segmentation from volume nodes to a segmentation node: checks, plan, run on the backend, import, undo."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import slicer
from slicer.i18n import tr as _

from . import GeometryDoctor, NodeConversion, SegmentationResult, UncertaintyMap
from .SegmentWays import AS_THE_MODEL, SegmentWays
from .SeriesResult import SegmentedFrames
from .VolumeSequence import VolumeSequence

__all__ = [
    "MemoryPlan",
    "SegmentationLogic",
    "SegmentationOutcome",
    "SegmentationRequest",
]

Triple = tuple[int, int, int]
NOTHING_TO_SEGMENT = "nothing_to_segment"  # code of the backend for an image that shows nothing
CROP_SLACK = 1.5  # `inference.SLACK` of the backend


@dataclass(frozen=True, eq=False)
class SegmentationRequest:
    """What a person chose. model: a ModelInfo; channels: its channel names -> volume nodes.

    outputNode: the segmentation to write into, None for a new one. roiNode: a markups ROI, or None for everything.
    window: voxels (D, H, W) of the sliding window, None for the model's own.
    locator: the ModelInfo that finds the place in a whole image for a model that was trained on crops; None without.
    ways: how it is done. uncertainty: whether a map of where the model is unsure is wanted.
    series: the sequence whose frames are all to be segmented, into a new sequence; None for what is shown now.
    """

    model: Any
    channels: dict[str, slicer.vtkMRMLScalarVolumeNode]
    device: str = "auto"
    outputNode: slicer.vtkMRMLSegmentationNode | None = None
    roiNode: slicer.vtkMRMLMarkupsROINode | None = None
    window: Triple | None = None
    locator: Any = None
    ways: SegmentWays = AS_THE_MODEL
    uncertainty: bool = False
    series: VolumeSequence | None = None

    @property
    def located(self) -> bool:
        """Whether another model finds the place first."""
        return self.locator is not None and self.roiNode is None

    @property
    def choices(self) -> list[str]:
        """The options of the backend that segmenting and its plan share."""
        arguments = ["--model", str(self.model.path), "--device", self.device]
        if self.window:
            arguments += ["--window", *map(str, self.window)]
        if self.located:
            arguments += ["--locate", str(self.locator.path)]
        return arguments


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will need. window: voxels (D, H, W), the largest that fits. freeBytes: 0 where it is not known."""

    predictedBytes: int
    freeBytes: int
    window: Triple
    seconds: float | None
    fits: bool
    sentence: str


@dataclass
class SegmentationOutcome:
    """How a run ended. state: "done", "failed" or "cancelled"; unless "done" the scene is as it was.

    warnings: what to look at, in sentences; notes: what is worth knowing and needs nothing done. confidence: the mean
    probability of what was found, 0 where nothing was, None where it is not known. volumesMl: label -> mL, on the grid
    of the file. frames: how many were segmented, 0 of a single image; the confidence is then the least of all.
    """

    state: str
    segmentationNode: slicer.vtkMRMLSegmentationNode | None = None
    tableNode: slicer.vtkMRMLTableNode | None = None
    message: str = ""
    hint: str = ""
    measuredPeakBytes: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    confidence: float | None = None
    volumesMl: dict[str, float] = field(default_factory=dict)
    frames: int = 0


@dataclass
class _Run:
    """What belongs to the segmentation that is running."""

    request: SegmentationRequest
    folder: Path
    onProgress: Callable[[str, float, float | None], None]
    onDone: Callable[[SegmentationOutcome], None]
    reference: slicer.vtkMRMLScalarVolumeNode  # on whose grid the result lies, also when it has left the scene
    inputs: tuple[SegmentationResult.InputRecord, ...]
    region: tuple[float, ...] = ()  # in mm in the frame of the reference; of all frames, wherever it is moved meanwhile
    frames: SegmentedFrames | None = None  # of a sequence
    peak: int = 0  # of its frames
    begun: float = field(default_factory=time.monotonic)
    requestId: int | None = None
    fraction: float = 0.0
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verdict: tuple[str, str, str] | None = None  # state, message, hint that this side decided on
    observers: list[tuple[Any, int]] = field(default_factory=list)

    def withNames(self, text: str) -> str:
        """What the backend says of its files, with the names of the volumes instead."""
        for index, volume in enumerate(self.inputs):
            text = text.replace(str(self.folder / _fileOf(index)), volume.name).replace(_fileOf(index), volume.name)
        return text

    @property
    def resultPath(self) -> Path:
        return self.folder / "result.seg.nrrd"

    @property
    def uncertaintyPath(self) -> Path:
        return self.folder / "uncertainty.nrrd"


def _stages() -> dict[str, tuple[str, float, float]]:
    """Stage of the backend -> what a person reads, and the part of the whole from where to where."""
    return {
        "export": (_("Handing the volumes over"), 0.0, 0.03),
        "start": (_("Starting the backend"), 0.03, 0.10),
        "segment.read": (_("Reading the volumes"), 0.10, 0.13),
        "segment.load": (_("Loading the model"), 0.13, 0.18),
        "segment.locate": (_("Finding the place to segment"), 0.18, 0.28),
        "segment.prepare": (_("Preparing the volumes"), 0.18, 0.28),
        "segment.tiles": (_("Segmenting"), 0.28, 0.90),
        "segment.restore": (_("Returning to the grid of the volume"), 0.90, 0.95),
        "segment.write": (_("Writing the result"), 0.95, 0.97),
        "import": (_("Adding the segments to the scene"), 0.97, 1.0),
    }


class SegmentationLogic:
    """Runs one segmentation at a time on a BackendProcess; nothing here blocks but copying voxels.

    temporaryFolder: gives the path of a new folder; it and all in it are removed when the run has ended.
    """

    def __init__(self, backend: Any, temporaryFolder: Callable[[], str]) -> None:
        self._backend = backend
        self._temporaryFolder = temporaryFolder
        self._run: _Run | None = None
        self._planId: int | None = None
        self._lastChange: SegmentationResult.SceneChange | None = None

    @property
    def running(self) -> bool:
        """Whether a segmentation is under way."""
        return self._run is not None

    # ---------------------------------------------------------------- before

    def missing(self, request: SegmentationRequest) -> list[str]:
        """What keeps this request from being run, one plain sentence each; empty if Apply may be pressed."""
        if request.model is None:
            return [_("Choose a model.")]
        sentences, nodes = [], []
        if self.running:
            sentences.append(_("A segmentation is running; wait for it or cancel it."))
        complete = True
        for channel in request.model.channels:
            node = request.channels.get(channel.name)
            if node is None or node.GetScene() is None:
                if not channel.optional:
                    complete = False
                    sentences.append(_("Choose a volume for the channel {name}.").format(name=channel.name))
            elif problem := NodeConversion.exportProblem(node):
                complete = False
                sentences.append(problem)
            elif node in nodes:
                complete = False
                sentences.append(
                    _("{name} is chosen for two channels; choose another volume for {channel}.").format(
                        name=node.GetName(), channel=channel.name
                    )
                )
            else:
                nodes.append(node)
        if complete and nodes:
            sentences += self._geometryProblems(request, nodes)
        elif complete:
            sentences.append(_("Choose a volume for one channel at least."))
        output = request.outputNode
        if request.series is not None and output is not None:
            sentences.append(_("All frames go into a new segmentation sequence; choose no other output."))
        elif output is not None and output.GetScene() is not None and not _takesVoxels(output):
            sentences.append(
                _("The segmentation {name} is made of surfaces; choose a new segmentation as output.").format(
                    name=output.GetName()
                )
            )
        return sentences

    def _geometryProblems(self, request: SegmentationRequest, nodes: list[slicer.vtkMRMLScalarVolumeNode]) -> list[str]:
        errors: dict[str, list[str]] = {}
        for finding in GeometryDoctor.examine(nodes):
            if finding.severity == "error":
                errors.setdefault(finding.volume, []).append(finding.sentence)
        # One sentence a volume is enough here; the panel shows the rest.
        hint = _("Align it to {name}.").format(name=nodes[0].GetName())
        sentences = [f"{found[0]} {hint}" for found in errors.values()]
        model = request.model
        if model.cropAround and request.roiNode is None and not request.located and _exceeds(nodes[0], model.largestMm):
            sentences.append(
                _(
                    "{name} is larger than the crops around the {structure} that this model was trained on; choose a "
                    "region of interest, or let another model find it."
                ).format(name=nodes[0].GetName(), structure=model.cropAround[0])
            )
        if request.roiNode is not None and request.roiNode.GetScene() is not None:
            box = _regionVoxels(request.roiNode, nodes[0])
            if box is None:
                sentences.append(
                    _("The region {region} does not touch {name}; move it over the part to segment.").format(
                        region=request.roiNode.GetName(), name=nodes[0].GetName()
                    )
                )
        return sentences

    def plan(self, request: SegmentationRequest, onDone: Callable[[MemoryPlan | None, str], None]) -> None:
        """Asks the backend what the run would need. onDone(plan, "") or (None, sentence why not).

        A newer question takes the place of one that is still open, whose `onDone` is then not called.
        """
        if self._planId is not None:
            self._backend.cancel(self._planId)
            self._planId = None
        reference = self._reference(request)
        if reference is None or NodeConversion.exportProblem(reference):
            onDone(None, _("Choose a model and its volumes to see what they need."))
            return
        order, spacing = _canonicalOrder(reference)
        size = np.array(reference.GetImageData().GetDimensions())
        arguments = ["plan", *request.choices, *request.ways.planArguments]
        arguments += ["--shape", *(str(number) for number in size[order])]
        arguments += ["--spacing", *(f"{number:.6f}" for number in spacing[order])]
        if request.roiNode is not None and (box := _regionVoxels(request.roiNode, reference)) is not None:
            arguments += ["--roi-shape", *(str(number) for number in np.array(box)[order])]
        asked: list[int] = []

        def finished(outcome: Any) -> None:
            if asked and self._planId != asked[0]:
                return
            self._planId = None
            if outcome.state != "done":
                onDone(None, f"{outcome.message} {outcome.hint}".strip())
                return
            found = outcome.result
            window: Any = tuple(int(side) for side in found.get("window") or (0, 0, 0))
            onDone(
                MemoryPlan(
                    predictedBytes=int(found.get("predicted_bytes") or 0),
                    freeBytes=int(found.get("free_bytes") or 0),
                    window=window,
                    seconds=found.get("seconds"),
                    fits=bool(found.get("fits")),
                    sentence=found.get("sentence") or "",
                ),
                "",
            )

        requestId = self._backend.request(arguments, None, finished)
        self._planId = requestId
        asked.append(requestId)

    # ---------------------------------------------------------------- the run

    def start(
        self,
        request: SegmentationRequest,
        onProgress: Callable[[str, float, float | None], None],
        onDone: Callable[[SegmentationOutcome], None],
    ) -> None:
        """Begins a run. onProgress(stage in words, fraction of the whole, seconds left or None); onDone once.

        Raises nothing: whatever goes wrong comes as an outcome, with the scene as it was.
        """
        if problems := self.missing(request):
            onDone(SegmentationOutcome("failed", message=problems[0], hint=" ".join(problems[1:])))
            return
        try:
            folder = Path(self._temporaryFolder())
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            onDone(SegmentationOutcome("failed", **_writingFailed(error)))
            return
        inputs = tuple(
            SegmentationResult.InputRecord(name, node.GetName(), node.GetID(), SegmentationResult.seriesUidOf(node))
            for name, node in self._nodes(request).items()
        )
        run = self._run = _Run(request, folder, onProgress, onDone, self._reference(request), inputs)
        if request.series is not None:
            run.frames = SegmentedFrames(
                request.series, run.reference, _labelsOf(request.model), _wholeOfSides(request.model)
            )
        scene = run.reference.GetScene()
        for event, handler in (
            (scene.StartCloseEvent, self._onSceneClosing),
            (scene.NodeRemovedEvent, self._onNodeRemoved),
        ):
            run.observers.append((scene, scene.AddObserver(event, handler)))
        self._ask(run)

    def _ask(self, run: _Run) -> None:
        """Hands the volumes, or those of the frame at hand, over to the backend."""
        run.requestId = None
        try:
            arguments = self._export(run)
        except NodeConversion.ConversionError as error:
            self._fail(run, error.message, error.hint)
            return
        except OSError as error:
            self._end(SegmentationOutcome("failed", **_writingFailed(error)))
            return
        if run.verdict is not None:  # cancelled from within onProgress
            self._endAsDecided()
            return
        try:
            requestId = self._backend.request(arguments, self._onEvent, self._onFinished)
        except Exception as error:  # a backend that cannot even be asked must not leave a run that never ends
            self._end(SegmentationOutcome("failed", message=_("The backend could not be started."), hint=str(error)))
            return
        if self._run is run:
            run.requestId = requestId
            if run.verdict is not None:
                self._backend.cancel(requestId)

    def cancel(self) -> None:
        """Ends the run; `onDone` gets "cancelled" and the scene stays as it is."""
        self._stop("cancelled", _("The segmentation was cancelled."))

    def canUndo(self) -> bool:
        """Whether the last run can be taken back."""
        change = self._lastChange
        return change is not None and not self.running and _scene().GetNodeByID(change.target) is not None

    def undo(self) -> None:
        """Takes the last run back as one step: its nodes, or its segments. What was edited elsewhere since stays."""
        if self.canUndo():
            change, self._lastChange = self._lastChange, None
            change.revert(_scene())

    def _export(self, run: _Run) -> list[str]:
        """Writes the volumes; returns the backend's arguments."""
        request, reference = run.request, run.reference
        arguments = ["segment", *request.choices, *request.ways.arguments]
        nodes = self._nodes(request)
        for index, (channel, node) in enumerate(nodes.items()):
            self._progress("export", index, len(nodes), None)
            path = run.folder / _fileOf(index)  # a short plain name, whatever the volume is called
            volume = node if run.frames is None else _ofFrame(run.frames, node)
            NodeConversion.exportVolume(volume, path, None if node is reference else reference, placedAs=node)
            arguments += ["--input", f"{channel}={path}"]
        arguments += ["--output", str(run.resultPath)]
        arguments += ["--uncertainty", str(run.uncertaintyPath)] if request.uncertainty else []
        if request.roiNode is not None:
            run.region = run.region or NodeConversion.regionInVolume(request.roiNode, reference)
            # Without exponents, which argparse takes for options where the number is negative.
            arguments += ["--roi", *(f"{number:.6f}" for number in run.region)]
        self._progress("export", len(nodes), len(nodes), None)
        return arguments

    def _onEvent(self, event: dict[str, Any]) -> None:
        if self._run is None:
            return
        if event.get("event") == "progress":
            self._progress(event.get("stage", ""), event.get("done", 0), event.get("total", 1), event.get("eta_s"))
        elif event.get("event") == "warning" and event.get("message"):
            message = self._run.withNames(event["message"])
            if self._run.frames is None:
                self._run.warnings.append(message)
            else:
                self._run.frames.warn(event["message"], message)
        elif event.get("event") == "note" and event.get("message") and event["message"] not in self._run.notes:
            self._run.notes.append(event["message"])

    def _progress(self, stage: str, done: float, total: float, eta_s: float | None) -> None:
        run = self._run
        if run is None:
            return
        text, first, last = _stages().get(stage, (_("Working"), run.fraction, run.fraction))
        part = min(1.0, max(0.0, done / total)) if total else 0.0
        # A window that was halved for lack of memory begins anew; the bar waits for it rather than going back.
        run.fraction = max(run.fraction, first + (last - first) * part)
        if run.frames is None:
            run.onProgress(text, run.fraction, eta_s if stage == "segment.tiles" else None)
            return
        number, count = run.frames.done, run.frames.series.count
        done = min(1.0, (number + run.fraction) / count)
        left = (time.monotonic() - run.begun) * (1 - done) / done if number else None
        words = {"number": min(number + 1, count), "count": count, "stage": text}
        run.onProgress(_("Frame {number} of {count}: {stage}").format(**words), done, left)

    def _onFinished(self, outcome: Any) -> None:
        run = self._run
        if run is None:
            return
        if run.verdict is not None:
            self._endAsDecided()
        elif outcome.state == "cancelled":
            self._end(SegmentationOutcome("cancelled", message=_("The segmentation was cancelled.")))
        elif run.frames is not None and (outcome.state == "done" or outcome.code == NOTHING_TO_SEGMENT):
            self._takeFrame(run, outcome)
        elif outcome.state == "done":
            self._import(run, lambda change: self._addToScene(run, outcome.result, change))
        else:
            self._fail(run, run.withNames(outcome.message), outcome.hint)

    def _takeFrame(self, run: _Run, outcome: Any) -> None:
        """The result of a frame, and on to the next one or, with the last, into the scene."""
        frames, found = run.frames, outcome.result
        try:
            volume = _ofFrame(frames, run.reference)
            if outcome.state == "done":
                result = NodeConversion.readResult(run.resultPath, volume)
                seconds = float((found.get("seconds") or {}).get("total") or 0.0)
                frames.add(result, volume, found.get("confidence") or 0.0, _provenance(run, found, seconds))
                run.peak = max(run.peak, int(found.get("measured_bytes") or 0))
            else:
                frames.warn(_("{message} The frame was left empty.").format(message=outcome.message))
                frames.addEmpty(volume)
        except Exception as error:
            self._fail(run, _importMessage(error), getattr(error, "hint", ""))
            return
        run.fraction = 0.0
        if frames.done < frames.series.count:
            self._ask(run)
        elif not frames.found:
            self._end(SegmentationOutcome("failed", message=outcome.message, hint=outcome.hint))
        else:
            self._import(run, lambda change: self._addSeriesToScene(run, change))

    def _fail(self, run: _Run, message: str, hint: str) -> None:
        if run.frames is not None:
            message = _("Frame {number}: {message}").format(number=run.frames.done + 1, message=message)
        self._end(SegmentationOutcome("failed", message=message, hint=hint))

    def _import(self, run: _Run, add: Callable[[SegmentationResult.SceneChange], SegmentationOutcome]) -> None:
        """The result into the scene, or nothing at all."""
        change = SegmentationResult.SceneChange()
        scene = _scene()
        self._progress("import", 0, 1, None)
        if run.verdict is not None:
            self._endAsDecided()
            return
        try:
            outcome = add(change)
        except Exception as error:
            change.revert(scene)
            self._end(SegmentationOutcome("failed", message=_importMessage(error), hint=getattr(error, "hint", "")))
            return
        self._progress("import", 1, 1, None)
        self._lastChange = change
        self._end(outcome)

    def _addToScene(
        self, run: _Run, found: dict[str, Any], change: SegmentationResult.SceneChange
    ) -> SegmentationOutcome:
        request, model, reference = run.request, run.request.model, run.reference
        # All that can be wrong with the file shows here, before anything is touched.
        result = NodeConversion.readResult(run.resultPath, reference)
        _scene().SaveStateForUndo()
        node = request.outputNode
        if node is not None and node.GetScene() is None:
            run.warnings.append(_("The chosen segmentation was deleted during the run; the result is in a new one."))
            node = None
        if node is None:
            node = SegmentationResult.createSegmentationNode(_scene(), reference, change)
        else:
            change.keep(node)
        change.target = node.GetID()
        origin = found.get("model_sha256") or model.sha256
        NodeConversion.importSegmentation(result, reference, node, origin, _labelsOf(model), change.segments)
        run.warnings += change.segments.warnings
        if node.GetID() in change.created:
            SegmentationResult.placeBeside(node, reference)
        SegmentationResult.showInSlices(node)
        if request.uncertainty:
            UncertaintyMap.showUncertainty(run.uncertaintyPath, reference, node, change)
        else:
            UncertaintyMap.hideUncertainty(change)
        table = SegmentationResult.volumesTableOf(node, reference, change)
        seconds = time.monotonic() - run.begun
        provenance = _provenance(run, found, seconds)
        SegmentationResult.storeProvenance(node, provenance)
        return SegmentationOutcome(
            "done",
            node,
            table,
            measuredPeakBytes=provenance.measuredPeakBytes,
            seconds=seconds,
            warnings=run.warnings,
            notes=run.notes,
            confidence=found.get("confidence"),
            volumesMl=dict(found.get("volumes_ml") or {}),
        )

    def _addSeriesToScene(self, run: _Run, change: SegmentationResult.SceneChange) -> SegmentationOutcome:
        frames, scene = run.frames, _scene()
        scene.SaveStateForUndo()
        node, table = frames.intoScene(_provenance(run, {}, 0.0), change)
        UncertaintyMap.hideUncertainty(change)
        return SegmentationOutcome(
            "done",
            node,
            table,
            measuredPeakBytes=run.peak,
            seconds=time.monotonic() - run.begun,
            warnings=frames.warnings,
            notes=run.notes,
            confidence=frames.confidence,
            frames=frames.series.count,
        )

    # ---------------------------------------------------------------- what may happen meanwhile

    def _onSceneClosing(self, _caller: Any, _event: str) -> None:
        self._stop("cancelled", _("The scene was closed, so the segmentation was cancelled."))

    def _onNodeRemoved(self, _caller: Any, _event: str) -> None:
        run = self._run
        if run is None or run.verdict is not None:
            return
        # Of a single image all is handed over by now.
        needed = run.inputs[:1] if run.frames is None else run.inputs
        gone = next((volume.name for volume in needed if _scene().GetNodeByID(volume.nodeId) is None), "")
        if gone:
            sentence = _("{name} was deleted during the segmentation; nothing was changed.")
            self._stop("failed", sentence.format(name=gone), _("Load it again and press Apply."))
        elif run.frames is not None and not run.frames.series.isThere:
            sentence = _("The sequence {name} was deleted during the segmentation; nothing was changed.")
            name = run.frames.series.node.GetName()
            self._stop("failed", sentence.format(name=name), _("Load it again and press Apply."))

    def _stop(self, state: str, message: str, hint: str = "") -> None:
        run = self._run
        if run is None or run.verdict is not None:
            return
        run.verdict = (state, message, hint)
        if run.requestId is not None:
            self._backend.cancel(run.requestId)

    def _endAsDecided(self) -> None:
        state, message, hint = self._run.verdict
        self._end(SegmentationOutcome(state, message=message, hint=hint))

    def _end(self, outcome: SegmentationOutcome) -> None:
        run, self._run = self._run, None
        for scene, tag in run.observers:
            scene.RemoveObserver(tag)
        shutil.rmtree(run.folder, ignore_errors=True)
        run.onDone(outcome)

    # ---------------------------------------------------------------- small things

    def _nodes(self, request: SegmentationRequest) -> dict[str, slicer.vtkMRMLScalarVolumeNode]:
        """Channel name -> node, in the model's order, for the channels that have one."""
        chosen = {channel.name: request.channels.get(channel.name) for channel in request.model.channels}
        return {name: node for name, node in chosen.items() if node is not None and node.GetScene() is not None}

    def _reference(self, request: SegmentationRequest) -> slicer.vtkMRMLScalarVolumeNode | None:
        """The volume of the first channel that has one; the result lies on its grid."""
        return None if request.model is None else next(iter(self._nodes(request).values()), None)


def _fileOf(channel: int) -> str:
    return f"channel{channel}.nrrd"


def _labelsOf(model: Any) -> list[NodeConversion.SegmentLabel]:
    """Of which side a value is, the file says."""
    return [
        NodeConversion.SegmentLabel(label.name, label.value, label.colour, label.terminology)
        for label in model.labels
        if not label.sided
    ]


def _wholeOfSides(model: Any) -> dict[int, int]:
    """Value of a left or a right side -> that of both as one."""
    return {value: label.value for label in model.labels for value in label.sides}


def _ofFrame(frames: SegmentedFrames, node: slicer.vtkMRMLScalarVolumeNode) -> slicer.vtkMRMLScalarVolumeNode:
    """What a volume shows in the frame at hand. Raises ConversionError where it is not there any more."""
    volume = frames.series.volumeAt(node, frames.done)
    if volume is None:
        raise NodeConversion.ConversionError(
            _("It is not in the sequence of {name} any more; nothing was changed.").format(name=node.GetName()),
            _("Leave the sequence as it is during a run, and run it again."),
        )
    return volume


def _importMessage(error: Exception) -> str:
    text = _("The result could not be added to the scene: {error}.").format(error=str(error) or type(error).__name__)
    return getattr(error, "message", "") or text


def _provenance(run: _Run, found: dict[str, Any], seconds: float) -> SegmentationResult.Provenance:
    """found: the result of the backend, of a frame too."""
    model = run.request.model
    return SegmentationResult.Provenance(
        model=model.name,
        modelSha256=found.get("model_sha256") or model.sha256,
        inputs=run.inputs,
        settings={**(found.get("settings") or {}), "device": found.get("device") or run.request.device},
        versions={**_versions(), **(found.get("software") or {})},
        seconds=round(seconds, 2),
        measuredPeakBytes=int(found.get("measured_bytes") or 0),
        warnings=tuple(run.warnings),
    )


def _scene() -> slicer.vtkMRMLScene:
    return slicer.mrmlScene


def _takesVoxels(segmentationNode: slicer.vtkMRMLSegmentationNode) -> bool:
    segmentation = segmentationNode.GetSegmentation()
    return (
        segmentation.GetNumberOfSegments() == 0
        or segmentation.GetSourceRepresentationName() == NodeConversion.BINARY_LABELMAP
    )


def _canonicalOrder(volumeNode: slicer.vtkMRMLVolumeNode) -> tuple[list[int], np.ndarray]:
    """The voxel axes that run nearest to superior, anterior, right, and the spacing of the axes I, J, K in mm."""
    matrix = NodeConversion.volumeMatrix(volumeNode)[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    alignment, order = np.abs(matrix / spacing), []
    for world in (2, 1, 0):
        best = max((axis for axis in range(3) if axis not in order), key=lambda axis: alignment[world, axis])
        order.append(best)
    return order, spacing


def _exceeds(volumeNode: slicer.vtkMRMLVolumeNode, largestMm: tuple[float, float, float] | None) -> bool:
    """Whether a volume is clearly larger than crops of this size (superior, anterior, right), as the backend has it."""
    order, spacing = _canonicalOrder(volumeNode)
    lengths = (np.array(volumeNode.GetImageData().GetDimensions()) * spacing)[order]
    return largestMm is not None and bool((lengths > CROP_SLACK * np.array(largestMm)).any())


def _regionVoxels(roiNode: slicer.vtkMRMLMarkupsROINode, volumeNode: slicer.vtkMRMLVolumeNode) -> Triple | None:
    """Voxels (I, J, K) of the volume that the region's box spans; None if it lies outside."""
    bounds = np.array(NodeConversion.regionInVolume(roiNode, volumeNode)).reshape(3, 2)
    inverse = np.linalg.inv(NodeConversion.volumeMatrix(volumeNode))
    corners = [[bounds[0, a], bounds[1, b], bounds[2, c], 1] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    voxels = (inverse @ np.array(corners).T).T[:, :3]
    size = np.array(volumeNode.GetImageData().GetDimensions())
    low, high = np.maximum(voxels.min(axis=0), -0.5), np.minimum(voxels.max(axis=0), size - 0.5)
    if not (bounds[:, 0] < bounds[:, 1]).all() or (low >= high).any():
        return None
    first, second, third = np.clip(np.ceil(high - low), 1, size).astype(int).tolist()
    return first, second, third


def _writingFailed(error: OSError) -> dict[str, str]:
    return {
        "message": _("The volumes could not be written to the temporary folder: {reason}.").format(
            reason=(error.strerror or str(error)).lower()
        ),
        "hint": _("Free some space, or choose another temporary folder in Slicer's application settings."),
    }


def _versions() -> dict[str, str]:
    application = getattr(slicer, "app", None)
    version = getattr(application, "applicationVersion", "") if application is not None else ""
    return {"slicer": str(version), "slicerPython": platform.python_version()}
