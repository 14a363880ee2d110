"""The result section: volumes, confidence, what the run took, warnings, notes, 3D, the way into the Segment Editor."""

import qt
import slicer
from slicer.i18n import tr as _

from .Notice import INFORMATION, WARNING, Notice
from .Text import confidenceInWords, escape, formatBytes, formatSeconds

__all__ = ["ResultView", "openInSegmentEditor"]

ROWS_SHOWN = 10
COLUMNS_FITTING = 3


class ResultView:
    """The section `resultButton` of the Segment tab; hidden until there is a result, and after its node is gone."""

    def __init__(self, ui, logic) -> None:
        self._ui = ui
        self._logic = logic
        self._warnings = Notice(ui, "warningsNotice")
        self._notes = Notice(ui, "notesNotice")
        self._volume = None
        # The table gets no scene: with one it would be emptied whenever something is loaded.
        ui.volumesTable.verticalHeader().setVisible(False)
        ui.editorButton.connect("clicked()", self._onOpenEditor)
        ui.undoButton.connect("clicked()", self._onUndo)
        self.clear()

    def show(self, outcome, inputVolume, predictedBytes: int | None, leastConfidence: float = 0.0) -> None:
        """Show a `SegmentationOutcome`; inputVolume: what the Segment Editor shows beneath the segments.

        leastConfidence: the least that the model had on the images that it was tested with, 0 where it is not known.
        """
        self._volume = inputVolume
        node = outcome.segmentationNode
        sentences = [_summary(node.GetName(), outcome, predictedBytes)]
        if outcome.confidence is not None:
            least = _("Least of all frames: ") if outcome.frames else ""
            sentences.append(escape(least + confidenceInWords(outcome.confidence, leastConfidence)))
        self._ui.resultSummary.text = "<br>".join(sentences)
        self._ui.volumesTable.setMRMLTableNode(outcome.tableNode)
        self._fitTable(outcome.tableNode)
        self._ui.show3DButton.setSegmentationNode(node)
        # A case would show whatever frame the browser is at when it is learned from.
        self._ui.trainingButton.visible = not outcome.frames
        self._warnings.show(WARNING, *outcome.warnings)
        self._notes.show(INFORMATION, *outcome.notes)
        self._ui.resultButton.visible = True
        self._ui.resultButton.collapsed = False

    def clear(self) -> None:
        """Hide the section and let go of the nodes."""
        self._volume = None
        self._ui.volumesTable.setMRMLTableNode(None)
        self._ui.show3DButton.setSegmentationNode(None)
        self._warnings.clear()
        self._notes.clear()
        self._ui.resultButton.visible = False

    def onNodeRemoved(self, node) -> None:
        """To be called when a node leaves the scene."""
        if node is not None and node in (
            self._ui.show3DButton.segmentationNode(),
            self._ui.volumesTable.mrmlTableNode(),
        ):
            self.clear()

    def _fitTable(self, tableNode) -> None:
        """As high as its rows, so that a short table needs no scroll bar and a long one does not fill the panel.

        The names share the width that the scroll bar of a long table leaves; a second bar would cover the last row. The
        table by frame has a column for each segment, and room for that bar.
        """
        table = self._ui.volumesTable
        rows = min(tableNode.GetNumberOfRows() if tableNode else 0, ROWS_SHOWN)
        header = table.horizontalHeader()
        header.setSectionResizeMode(qt.QHeaderView.ResizeToContents)
        columns = tableNode.GetNumberOfColumns() if tableNode else 0
        if 0 < columns <= COLUMNS_FITTING:
            header.setSectionResizeMode(0, qt.QHeaderView.Stretch)
        rowHeight = table.verticalHeader().defaultSectionSize
        height = header.sizeHint.height() + rows * rowHeight + 2 * table.frameWidth
        height += table.horizontalScrollBar().sizeHint.height() if columns > COLUMNS_FITTING else 0
        table.setMinimumHeight(height)
        table.setMaximumHeight(height)

    def _onUndo(self) -> None:
        self._logic.undo()
        self.clear()

    def _onOpenEditor(self) -> None:
        openInSegmentEditor(self._ui.show3DButton.segmentationNode(), self._volume)


def openInSegmentEditor(segmentationNode, volumeNode) -> None:
    """Go to the Segment Editor with this segmentation, on this volume."""
    slicer.util.selectModule("SegmentEditor")
    editor = slicer.modules.segmenteditor.widgetRepresentation().self().editor
    editor.setSegmentationNode(segmentationNode)
    if volumeNode is not None and volumeNode.GetScene() is not None:
        editor.setSourceVolumeNode(volumeNode)


def _summary(name: str, outcome, predictedBytes: int | None) -> str:
    parts = [f"<b>{escape(name)}</b>"]
    if outcome.frames:
        parts.append(_("{count} frames").format(count=outcome.frames))
    if outcome.seconds:
        parts.append(_("{time}").format(time=formatSeconds(outcome.seconds)))
    if outcome.measuredPeakBytes:
        peak = _("measured peak {amount}").format(amount=formatBytes(outcome.measuredPeakBytes))
        if predictedBytes:
            peak += " " + _("(predicted {amount})").format(amount=formatBytes(predictedBytes))
        parts.append(peak)
    return ", ".join(parts)
