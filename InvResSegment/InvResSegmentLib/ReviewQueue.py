"""The review of a batch: one result after the other with its image, corrected, accepted, and gone again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import slicer
from slicer.i18n import tr as _

from . import NodeConversion, NodeFiles, SegmentationResult
from .BatchCase import ACCEPTED, DONE, EDITED, RESULT_SUFFIX, BatchCase, correctedPath, endingOf
from .BatchQueue import BatchQueue
from .CaseFiles import CaseFiles
from .NodeConversion import ConversionError

__all__ = ["ReviewQueue"]


class ReviewQueue:
    """Steps through the cases of a batch that are done.

    trainingCases: gets what is accepted (`TrainingCases`). modelOf: gives the `ModelInfo` that made the result of a
    case, for names and colours; None where it is not among the models.
    First come those that nobody has looked at, the model's least sure ones before the others. What was opened keeps its
    place, so that the way back is the way that a person came, also when cases are done or accepted meanwhile.
    A case of files is loaded when it is opened; when it is left, its nodes go, as it is a training case of files. What
    a person changed is written beside the result when the case is left, and what was accepted at once, so nothing is
    lost by going on.
    """

    def __init__(self, queue: BatchQueue, trainingCases: Any, modelOf: Callable[[BatchCase], Any]) -> None:
        self._queue, self._trainingCases, self._modelOf = queue, trainingCases, modelOf
        self.current: BatchCase | None = None
        self._tried: BatchCase | None = None  # opened last, or tried to
        self._opened: list[BatchCase] = []  # in this order, for the first time
        self.channels: dict[str, slicer.vtkMRMLScalarVolumeNode] = {}
        self.segmentation: slicer.vtkMRMLSegmentationNode | None = None
        self._segmentCount = 0

    @property
    def cases(self) -> list[BatchCase]:
        """The cases that can be reviewed, in the order in which they are stepped through."""
        done = {case: None for case in self._queue.cases if case.state == DONE}  # a set that keeps the order
        opened = [case for case in self._opened if case in done]
        for case in opened:
            del done[case]
        return [*opened, *sorted(done, key=_urgency)]

    @property
    def accepted(self) -> int:
        """How many of them are accepted."""
        return sum(case.review == ACCEPTED for case in self._queue.cases if case.state == DONE)

    @property
    def background(self) -> slicer.vtkMRMLScalarVolumeNode | None:
        """The first image of the case that is open."""
        return next(iter(self.channels.values()), None)

    def step(self, forward: bool) -> bool:
        """Opens the next case, or the one before; False where there is none. Raises ConversionError, OSError."""
        cases = self.cases
        if self._tried in cases:
            place = cases.index(self._tried) + (1 if forward else -1)
        else:
            place = next((i for i, case in enumerate(cases) if case.review != ACCEPTED), 0)
        if not 0 <= place < len(cases):
            return False
        self.open(cases[place])
        return True

    def open(self, case: BatchCase) -> None:
        """Puts image and result into the scene.

        Raises ConversionError where they cannot be read, and OSError where the case before cannot be saved.
        """
        if case is self.current and self._alive:
            return
        self.leave()
        self._tried = case  # the way on starts here, also when it cannot be opened
        if case not in self._opened:
            self._opened.append(case)
        if case.inScene:
            if case.segmentation is None or case.segmentation.GetScene() is None:
                raise ConversionError(_("The result of {name} was deleted.").format(name=case.name))
            self.channels = {name: node for name, node in case.nodes.items() if node.GetScene() is not None}
            self.segmentation = case.segmentation
        else:
            self._load(case)
        self.current = case
        self._segmentCount = self.segmentation.GetSegmentation().GetNumberOfSegments()

    def save(self) -> bool:
        """Writes down what a person has changed in the open case; returns whether there was anything.

        Raises OSError where the disk refuses; the nodes are still there then.
        """
        case = self.current
        if case is None or not self._alive or not self._edited:
            return False
        if not case.inScene:
            self._write(case, learn=False)
        case.review = case.review or EDITED
        self._queue.tell(atOnce=True)  # also when it was corrected before: its volumes are others now
        return True

    def _write(self, case: BatchCase, learn: bool) -> None:
        """Puts the segmentation beside the result, and into the training case. learn: it becomes one."""
        label = correctedPath(self._queue.folder, case)
        NodeFiles.saveSegmentation(self.segmentation, label, self.background)
        if self._edited:
            segmentation = self.segmentation.GetSegmentation()
            ids = [segmentation.GetNthSegmentID(index) for index in range(segmentation.GetNumberOfSegments())]
            measured = SegmentationResult.measureVolumes(self.segmentation, ids)
            case.volumesMl = {one.name: round(one.millilitres, 3) for one in measured}
        stored = CaseFiles.of(case.files, self.channels, label, case.patient)
        if learn or self._trainingCases.ofFiles(stored) is not None:
            self._trainingCases.addFiles(case.name, stored)

    def accept(self) -> bool:
        """The open case is right as it is now: it becomes a training case. Raises OSError.

        Returns whether there is anything to learn from; one without segments is accepted and no training case.
        """
        case = self.current
        if case is None or not self._alive:
            return False
        learned = bool(self.segmentation.GetSegmentation().GetNumberOfSegments())
        if not case.inScene:
            self._write(case, learned)  # a result that is right as it is, too: the next model's must not take its place
        elif learned:
            self._trainingCases.add(case.name, dict(self.channels), self.segmentation)
        case.review = ACCEPTED
        self._queue.tell(atOnce=True)
        return learned

    def leave(self) -> None:
        """Closes the case, with what was changed saved. Raises OSError where that fails; the case stays open then."""
        self.save()
        case, nodes = self.current, [*self.channels.values(), self.segmentation]
        self._close()
        if case is None or case.inScene:
            return
        for node in nodes:
            _remove(node)

    def forget(self) -> None:
        """The scene is being closed: nothing is saved or removed."""
        self._close()

    def _close(self) -> None:
        self.current, self.channels, self.segmentation = None, {}, None

    @property
    def _alive(self) -> bool:
        return self.segmentation is not None and self.segmentation.GetScene() is not None

    @property
    def _edited(self) -> bool:
        if self.segmentation.GetSegmentation().GetNumberOfSegments() != self._segmentCount:
            return True
        return NodeConversion.wasEdited(self.segmentation)

    def _load(self, case: BatchCase) -> None:
        loaded: list = []
        try:
            channels = {}
            for name, path in case.files.items():
                title = case.name if len(case.files) == 1 else f"{case.name} {name}"
                loaded.append(NodeFiles.loadVolume(path, title))
                channels[name] = loaded[-1]
            self.segmentation = self._segmentation(case, loaded)
            self.channels = channels
        except ConversionError:
            for node in loaded:
                _remove(node)
            raise

    def _segmentation(self, case: BatchCase, loaded: list) -> slicer.vtkMRMLSegmentationNode:
        name = _("{name} segmentation").format(name=case.name)
        corrected, image = correctedPath(self._queue.folder, case), loaded[0]
        if case.review and corrected.is_file():
            node = NodeFiles.loadSegmentation(corrected, name)
            loaded.append(node)
            if not node.GetSegmentation().GetNumberOfSegments():  # to be drawn in, after all
                node.SetReferenceImageGeometryParameterFromVolumeNode(image)
        else:
            model = self._modelOf(case)
            labels = model.labels if model is not None else ()
            stated = [
                NodeConversion.SegmentLabel(one.name, one.value, one.colour, one.terminology)
                for one in labels
                if not one.sided  # of which side a value is, the file says
            ]
            path = self._queue.folder / case.fileName
            if endingOf(case.fileName) == RESULT_SUFFIX:
                result = NodeConversion.readResult(path, image)
            else:
                stated = _labelsOf(case, labels)
                parts = {one.name: one.parts for one in labels if one.parts}
                result = NodeConversion.onGridOf(NodeFiles.readLabelMap(path, stated, parts), image)
            node = NodeFiles.emptySegmentation(name)
            loaded.append(node)
            NodeConversion.importSegmentation(result, image, node, case.model, stated)
        SegmentationResult.placeBeside(node, image)
        SegmentationResult.showInSlices(node)
        return node


def _urgency(case: BatchCase) -> tuple[int, float]:
    """The smaller, the sooner a person should look at a result; one without a confidence comes last of its kind."""
    return ("", EDITED, ACCEPTED).index(case.review), 1.0 if case.confidence is None else case.confidence


def _labelsOf(case: BatchCase, labels: Sequence[Any]) -> list[NodeConversion.SegmentLabel]:
    """What the values of a label map stand for that the model wrote; its volumes tell whether it has sides apart."""
    found = []
    for one in labels:
        values = dict(zip((f"left {one.name}", f"right {one.name}"), one.sides, strict=False))
        apart = {name: value for name, value in values.items() if name in case.volumesMl} or {one.name: one.value}
        for name, value in apart.items():
            found.append(NodeConversion.SegmentLabel(name, value, one.colour, one.terminology))
    return found


def _remove(node) -> None:
    """A node with its display nodes, if it is still there."""
    if node is None or node.GetScene() is None:
        return
    scene = node.GetScene()
    for index in reversed(range(node.GetNumberOfDisplayNodes())):
        if node.GetNthDisplayNode(index) is not None:
            scene.RemoveNode(node.GetNthDisplayNode(index))
    scene.RemoveNode(node)
