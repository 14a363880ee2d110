"""The sequence that a volume of the scene shows one frame of, read without moving the browser."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import slicer

__all__ = ["VolumeSequence", "sequenceOf"]

BROWSER_CLASS = "vtkMRMLSequenceBrowserNode"


@dataclass(frozen=True, eq=False)
class VolumeSequence:
    """A sequence with several frames. values: the index value of each, as text."""

    browser: slicer.vtkMRMLSequenceBrowserNode
    node: slicer.vtkMRMLSequenceNode
    values: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of frames."""
        return len(self.values)

    @property
    def isThere(self) -> bool:
        """Whether browser and sequence are still in a scene."""
        return self.browser.GetScene() is not None and self.node.GetScene() is not None

    def volumeAt(
        self, volumeNode: slicer.vtkMRMLScalarVolumeNode, number: int
    ) -> slicer.vtkMRMLScalarVolumeNode | None:
        """What a volume of the scene shows in frame `number` (from 0); itself where the browser does not change it.

        None where the frame is not there any more.
        """
        sequence = self.browser.GetSequenceNode(volumeNode)
        if sequence is None:
            return volumeNode
        # Of another sequence of the browser it is the nearest one before, as the browser has it.
        return sequence.GetDataNodeAtValue(self.values[number], sequence is self.node)


def sequenceOf(volumeNodes: Iterable[slicer.vtkMRMLScalarVolumeNode]) -> VolumeSequence | None:
    """The sequence of the first of these volumes that shows a frame of one with several; None where none does."""
    browsers = slicer.util.getNodesByClass(BROWSER_CLASS)
    for volumeNode in volumeNodes:
        for browser in browsers:
            sequence = browser.GetSequenceNode(volumeNode)
            if sequence is not None and sequence.GetNumberOfDataNodes() > 1:
                values = tuple(sequence.GetNthIndexValue(n) for n in range(sequence.GetNumberOfDataNodes()))
                return VolumeSequence(browser, sequence, values)
    return None
