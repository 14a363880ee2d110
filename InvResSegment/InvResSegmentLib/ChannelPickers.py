"""One volume picker per channel of the chosen model, with a word on how sure its choice is."""

from collections.abc import Callable

import qt
import slicer
from slicer.i18n import tr as _

from . import ChannelMatching
from .VolumeDescription import IMAGE_CLASS, choosableImages

__all__ = ["ChannelPickers"]


class ChannelPickers:
    """The rows in the widget `container`; they are rebuilt when the model changes.

    onChanged is called after every change of a choice, by whomever it was made.
    """

    def __init__(self, container, onChanged: Callable[[], None]) -> None:
        self._onChanged = onChanged
        self._rows: dict[str, tuple] = {}  # channel name -> (picker, label with the confidence)
        self._channels: tuple = ()
        self._body = None
        self._filling = False
        self._container = container
        self._layout = qt.QVBoxLayout(container)
        self._layout.setContentsMargins(0, 0, 0, 0)

    def setChannels(self, channels: tuple) -> None:
        """Make one row for each channel (`ChannelInfo`), all empty."""
        if channels == self._channels and self._body is not None:
            return
        self._channels = tuple(channels)
        if self._body is not None:
            self._layout.removeWidget(self._body)
            for picker, _confidence in self._rows.values():
                picker.setMRMLScene(None)  # it must not answer to the scene any more while it waits to be deleted
            self._body.hide()
            self._body.deleteLater()
        self._rows = {}
        self._body = qt.QWidget()
        grid = qt.QGridLayout(self._body)
        grid.setContentsMargins(0, 0, 0, 0)
        grid.setColumnStretch(1, 1)
        for index, channel in enumerate(self._channels):
            label = qt.QLabel(f"{channel.name}:")
            if channel.optional:
                label.text = _("{name} (optional):").format(name=channel.name)
                label.toolTip = _("The model was trained to do without; leave it empty where there is none.")
            grid.addWidget(label, index, 0)
            picker = self._makePicker(channel)
            grid.addWidget(picker, index, 1)
            confidence = qt.QLabel("")
            grid.addWidget(confidence, index, 2)
            self._rows[channel.name] = (picker, confidence)
        self._layout.addWidget(self._body)
        self._container.visible = bool(self._channels)

    def volumes(self) -> dict:
        """Channel name -> volume node, in the model's order, for the channels that have one."""
        chosen = {name: picker.currentNode() for name, (picker, _confidence) in self._rows.items()}
        return {name: node for name, node in chosen.items() if node is not None}

    @property
    def onlyVolume(self):
        """The volume of a model with a single channel, or None."""
        return next(iter(self.volumes().values()), None) if len(self._rows) == 1 else None

    def takeOver(self, node) -> list[str]:
        """Choose for the only channel the volume that another model had; returns a sentence where it may not fit."""
        ((name, (picker, confidence)),) = self._rows.items()
        (channel,) = self._channels
        volume = ChannelMatching.describeVolume(node)
        score = ChannelMatching.score(channel, volume)
        self._filling = True
        picker.setCurrentNode(node)
        self._filling = False
        if score.confidence >= ChannelMatching.ACCEPTED:
            self._describe(confidence, _sure(score.confidence), ", ".join(score.reasons))
            self._onChanged()
            return []
        sentence = _("{name} was kept, but it cannot be told to be {channel} ({reasons}): look whether it is.").format(
            name=volume.name, channel=name, reasons=", ".join(score.reasons)
        )
        self._describe(confidence, _("kept"), sentence)
        self._onChanged()
        return [sentence]

    def setVolumes(self, volumes: dict) -> None:
        """Choose these volumes and empty the other channels; says nothing of confidence."""
        if self.volumes() == {name: node for name, node in volumes.items() if name in self._rows and node is not None}:
            return
        self._filling = True
        for name, (picker, confidence) in self._rows.items():
            picker.setCurrentNode(volumes.get(name))
            self._describe(confidence, "", "")
        self._filling = False
        self._onChanged()

    def release(self, node) -> None:
        """Empty the picker of a node that is about to leave the scene."""
        for picker, _confidence in self._rows.values():
            if picker.currentNode() == node:
                picker.setCurrentNode(None)

    def match(self, onlyEmpty: bool = False) -> list[str]:
        """Assign the loaded volumes to the channels; returns a sentence for each channel that stays empty.

        onlyEmpty: choices that are there already are kept, and their volumes are not used twice.
        """
        kept = self.volumes() if onlyEmpty else {}
        open_ = [channel for channel in self._channels if channel.name not in kept]
        taken = {node.GetID() for node in kept.values()}
        described = [
            ChannelMatching.describeVolume(node)
            for node in choosableImages(slicer.mrmlScene)
            if node.GetID() not in taken
        ]
        sentences = []
        self._filling = True
        for found in ChannelMatching.match(open_, described):
            picker, confidence = self._rows[found.channel]
            if found.volume is None:
                picker.setCurrentNode(None)
                self._describe(confidence, _("not clear") if described else "", found.sentence)
                sentences.append(found.sentence)
            else:
                picker.setCurrentNodeID(found.volume.key)
                self._describe(confidence, _sure(found.confidence), found.sentence)
        self._filling = False
        self._onChanged()
        return sentences if described else []

    def cleanup(self) -> None:
        """Let go of the scene."""
        for picker, _confidence in self._rows.values():
            picker.setMRMLScene(None)

    def _makePicker(self, channel):
        picker = slicer.qMRMLNodeComboBox()
        picker.nodeTypes = [IMAGE_CLASS]
        picker.showChildNodeTypes = False
        picker.noneEnabled = True
        picker.addEnabled = False
        picker.removeEnabled = False
        picker.renameEnabled = True
        picker.noneDisplay = _("Select a volume")
        picker.toolTip = _("The volume for the channel {name} ({modality}).").format(
            name=channel.name, modality=channel.modality
        )
        picker.objectName = f"channelPicker_{channel.name}"
        picker.setMRMLScene(slicer.mrmlScene)
        picker.connect("currentNodeChanged(vtkMRMLNode*)", lambda _node, name=channel.name: self._onPicked(name))
        return picker

    def _onPicked(self, name: str) -> None:
        if self._filling or name not in self._rows:
            return
        picker, confidence = self._rows[name]
        if picker.currentNode() is None:
            self._describe(confidence, "", "")
        else:
            self._describe(confidence, _("your choice"), _("You chose this volume."))
        self._onChanged()

    @staticmethod
    def _describe(label, text: str, toolTip: str) -> None:
        label.text = text
        label.toolTip = toolTip


def _sure(confidence: float) -> str:
    return _("{percent} % sure").format(percent=round(100 * confidence))
