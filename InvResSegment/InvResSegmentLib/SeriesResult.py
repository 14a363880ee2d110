"""The segmented frames of a sequence: outside of the scene while they come, then a sequence of the same browser."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from . import NodeConversion, SegmentationResult
from .Text import framesInWords
from .VolumeSequence import VolumeSequence

__all__ = ["TABLE_BY_FRAME_ROLE", "SegmentedFrames"]

TABLE_BY_FRAME_ROLE = "InvResSegment.VolumesByFrame"
"""Node reference of the segmentation that shows a frame to the table of the volumes in all frames."""


class SegmentedFrames:
    """What a run has made of the frames of a sequence. reference: the volume of the scene that the result lies on.

    labels: names, colours and terminology that win over those of the files. wholes: value of a left or a right side ->
    that of both as one. Frames come in their order.
    """

    def __init__(
        self,
        series: VolumeSequence,
        reference: slicer.vtkMRMLScalarVolumeNode,
        labels: Sequence[NodeConversion.SegmentLabel],
        wholes: Mapping[int, int],
    ) -> None:
        self.series = series
        self.done = 0
        """How many frames are segmented; also the number of the one at hand, from 0."""
        self._reference = reference
        self._labels = labels
        self._wholes = wholes
        self._sequence = slicer.vtkMRMLSequenceNode()
        self._sequence.CopySequenceIndex(series.node)
        self._template: NodeConversion.ResultFile | None = None  # of left and right as one, if any frame has them so
        self._divided: list[tuple[int, slicer.vtkMRMLScalarVolumeNode]] = []
        self._sided: tuple[NodeConversion.SegmentLabel, ...] = ()  # the segments of those
        self._empty: list[tuple[int, slicer.vtkMRMLScalarVolumeNode]] = []
        self._volumes: list[dict[str, float]] = []
        self._confidences: list[float] = []
        self._warnings: dict[str, list[tuple[int, str]]] = {}

    @property
    def found(self) -> bool:
        """Whether any frame could be segmented."""
        return self._template is not None

    @property
    def confidence(self) -> float:
        """The least of the frames in which something was found; 0 where there is none."""
        return min((value for value in self._confidences if value > 0), default=0.0)

    @property
    def warnings(self) -> list[str]:
        """Each one once, with the frames that it is true of."""
        sentences = []
        for said in self._warnings.values():
            frames = list(dict.fromkeys(frame for frame, _sentence in said))
            first, sentence = said[0]
            text = f"{framesInWords(frames, self.series.count)}: {sentence}"
            if any(other != sentence for _frame, other in said):
                text = _("{warning} The figures are those of frame {number}.").format(warning=text, number=first)
            sentences.append(text)
        return sentences

    def warn(self, sentence: str, inWords: str = "") -> None:
        """Says something of the frame at hand. inWords: how it is told, where that is otherwise."""
        self._warnOf(self.done, sentence, inWords or sentence)

    def _warnOf(self, number: int, sentence: str, inWords: str) -> None:
        # Figures differ from frame to frame, and what they say does not. The 1 of a channel T1 is none.
        file, rest = re.fullmatch(r"([^:]*\.\w+: )?(.*)", sentence, re.DOTALL).groups()
        start = (file or "") + re.split(r"(?<!\w)-?\d|:", rest)[0]
        self._warnings.setdefault(start, []).append((number + 1, inWords))

    def add(
        self,
        result: NodeConversion.ResultFile,
        volumeNode: slicer.vtkMRMLScalarVolumeNode,
        confidence: float,
        provenance: SegmentationResult.Provenance,
    ) -> None:
        """The frame at hand. volumeNode: its image, whose grid the result has. Raises ConversionError."""
        names = self._put(self.done, result, volumeNode, provenance)
        divided = len(result.segments) > len({self._wholes.get(one.value, one.value) for one in result.segments})
        if divided:
            self._divided.append((self.done, volumeNode))
            self._sided = self._sided or result.segments
        if self._template is None or not divided:
            self._template = replace(result, layers=result.layers[:0].copy())
        # Counted here, once, and not by the segments, each of which costs a pass through its image.
        toWorld = NodeConversion.linearTransformBetween(self._reference, None)
        scale = 1.0 if toWorld is None else abs(np.linalg.det(toWorld[:3, :3]))
        voxelMl = scale * abs(np.linalg.det(result.matrix[:3, :3])) / 1000
        counts = [int(np.count_nonzero(result.mask(number))) for number in range(len(names))]
        self._volumes.append({name: count * voxelMl for name, count in zip(names, counts, strict=True)})
        self._confidences.append(confidence)
        self.done += 1

    def addEmpty(self, volumeNode: slicer.vtkMRMLScalarVolumeNode) -> None:
        """The frame at hand, in which nothing could be segmented: its segments will be empty."""
        self._empty.append((self.done, volumeNode))
        self._volumes.append({})
        self._confidences.append(math.nan)
        self.done += 1

    def intoScene(
        self, provenance: SegmentationResult.Provenance, change: SegmentationResult.SceneChange
    ) -> tuple[slicer.vtkMRMLSegmentationNode, slicer.vtkMRMLTableNode]:
        """The sequence into the browser of the images, the segmentation that shows its frame, and the table.

        One frame at least was segmented. Raises ConversionError.
        """
        if self._template.segments != self._sided:
            self._joinSides()
        for number, volumeNode in self._empty:
            self._put(number, self._blank(volumeNode), volumeNode, provenance)
        scene, browser, sequence = self._reference.GetScene(), self.series.browser, self._sequence
        node = SegmentationResult.createSegmentationNode(scene, self._reference, change)
        change.target = node.GetID()
        # The same as the browser will do with its next frame. Before it has the node: what it saves is what is there.
        master, selected = browser.GetMasterSequenceNode(), browser.GetSelectedItemNumber()
        node.CopyContent(sequence.GetDataNodeAtValue(master.GetNthIndexValue(max(0, selected)), False))
        node.SetAndObserveTransformNodeID(self._reference.GetTransformNodeID())
        node.SetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole(), self._reference.GetID())
        sequence.SetName(scene.GenerateUniqueName(_("{name} sequence").format(name=node.GetName())))
        scene.AddNode(sequence)
        change.created.append(sequence.GetID())
        change.restore.append(lambda: _leaveBrowser(browser, sequence))
        browser.AddSynchronizedSequenceNode(sequence)
        automatic = browser.GetProxyNode(sequence)  # of Slicer's logic of sequences
        browser.AddProxyNode(node, sequence, False)
        _remove(automatic)
        browser.SetOverwriteProxyName(sequence, False)
        SegmentationResult.placeBeside(node, self._reference)
        SegmentationResult.showInSlices(node)
        table = self._table(node, change)
        browser.SetSaveChanges(sequence, True)  # what is corrected in a frame stays in it
        return node, table

    def _joinSides(self) -> None:
        """Puts left and right together in the frames that have them apart, as others have not: a segment must not stand
        for one side in one frame and for both in the next."""
        sentence = _("Left and right were put into one segment here, too, so that all frames are alike.")
        for number, volumeNode in self._divided:
            self._warnOf(number, sentence, sentence)
            node = self._sequence.GetDataNodeAtValue(self.series.values[number], True)
            result, millilitres = self._blank(volumeNode), Counter()
            for index, (label, volume) in enumerate(zip(self._sided, self._volumes[number].values(), strict=True)):
                mask, _matrix = NodeConversion.segmentMask(node, node.GetSegmentation().GetNthSegmentID(index))
                whole = self._wholes.get(label.value, label.value)
                result.labels[mask] = whole
                millilitres[whole] += volume
            names = self._put(number, result, volumeNode, SegmentationResult.readProvenance(node)[-1])
            values = [label.value for label in result.segments]
            self._volumes[number] = {name: millilitres[value] for name, value in zip(names, values, strict=True)}

    def _blank(self, volumeNode: slicer.vtkMRMLScalarVolumeNode) -> NodeConversion.ResultFile:
        """The result of a frame in which nothing was found."""
        shape = volumeNode.GetImageData().GetDimensions()[::-1]
        layers = np.zeros((*shape, self._template.layers.shape[3]), self._template.layers.dtype)
        return replace(self._template, layers=layers, matrix=NodeConversion.volumeMatrix(volumeNode))

    def _put(
        self,
        number: int,
        result: NodeConversion.ResultFile,
        volumeNode: slicer.vtkMRMLScalarVolumeNode,
        provenance: SegmentationResult.Provenance,
    ) -> list[str]:
        """A frame into the sequence, which takes a copy. Returns the names of its segments, in the result's order."""
        node = slicer.vtkMRMLSegmentationNode()
        node.SetName(volumeNode.GetName())
        done = NodeConversion.importSegmentation(result, volumeNode, node, provenance.modelSha256, self._labels)
        # The image is a node of the sequence's own scene, whose id may be that of another one here.
        node.SetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole(), None)
        settings = {**provenance.settings, "frame": number + 1, "frames": self.series.count}
        said = [text for texts in self._warnings.values() for frame, text in texts if frame == number + 1]
        # The browser copies it with the frame.
        SegmentationResult.storeProvenance(node, replace(provenance, settings=settings, warnings=tuple(said)))
        self._sequence.SetDataNodeAtValue(node, self.series.values[number])
        return [node.GetSegmentation().GetSegment(segmentId).GetName() for segmentId in done.segmentIds]

    def _table(
        self, node: slicer.vtkMRMLSegmentationNode, change: SegmentationResult.SceneChange
    ) -> slicer.vtkMRMLTableNode:
        """A row for each frame: its index value, the volume of each segment in mL, the confidence; NaN is not known."""
        scene = node.GetScene()
        name = scene.GenerateUniqueName(_("{name} volumes by frame").format(name=node.GetName()))
        tableNode = scene.AddNewNodeByClass("vtkMRMLTableNode", name)
        change.created.append(tableNode.GetID())
        unit = self._sequence.GetIndexUnit()
        index = vtk.vtkStringArray()
        index.SetName(f"{self._sequence.GetIndexName()}{f' [{unit}]' if unit else ''}")
        for value in self.series.values:
            index.InsertNextValue(value)
        table = vtk.vtkTable()
        table.AddColumn(index)
        for segment in dict.fromkeys(segment for volumes in self._volumes for segment in volumes):
            column = [round(volumes.get(segment, math.nan), 6) for volumes in self._volumes]
            table.AddColumn(_numbers(_("{segment} [mL]").format(segment=segment), column))
        table.AddColumn(_numbers(_("Confidence"), [round(value, 4) for value in self._confidences]))
        tableNode.SetAndObserveTable(table)
        tableNode.SetUseColumnTitleAsColumnHeader(True)
        tableNode.SetLocked(True)
        node.SetNodeReferenceID(TABLE_BY_FRAME_ROLE, tableNode.GetID())
        SegmentationResult.placeBeside(tableNode, self._reference)
        return tableNode


def _numbers(title: str, values: Sequence[float]) -> vtk.vtkDoubleArray:
    column = vtk.vtkDoubleArray()
    column.SetName(title)
    for value in values:
        column.InsertNextValue(value)
    return column


def _leaveBrowser(browser: slicer.vtkMRMLSequenceBrowserNode, sequence: slicer.vtkMRMLSequenceNode) -> None:
    if browser.GetScene() is not None and sequence.GetScene() is not None:
        browser.RemoveSynchronizedSequenceNode(sequence.GetID())


def _remove(node: slicer.vtkMRMLDisplayableNode | None) -> None:
    """With what was made for it alone."""
    if node is not None:
        scene = node.GetScene()
        for part in (node.GetDisplayNode(), node.GetStorageNode(), node):
            if part is not None:
                scene.RemoveNode(part)
