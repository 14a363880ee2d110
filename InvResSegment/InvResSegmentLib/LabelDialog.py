"""The small window in which a person says what each segment of the training cases stands for."""

from collections.abc import Callable, Sequence

import qt
from slicer.i18n import tr as _

from .LabelMapping import BACKGROUND, UNKNOWN, labelOf, plainName

__all__ = ["LabelDialog"]


class LabelDialog:
    """Opens beside everything else; nothing waits for it. onAccepted gets segment name -> label, BACKGROUND or UNKNOWN.

    names: of segments. labels: the model's. choices: decided before.
    """

    def __init__(
        self, parent, names: Sequence[str], labels: Sequence[str], choices: dict, onAccepted: Callable
    ) -> None:
        self._onAccepted = onAccepted
        self._boxes: dict[str, tuple] = {}
        self.dialog = qt.QDialog(parent)
        self.dialog.setWindowTitle(_("Labels of the training cases"))
        layout = qt.QVBoxLayout(self.dialog)
        for sentence in (
            _("What does each segment stand for? This holds for all cases that have a segment so called."),
            _(
                "Where you have corrected only a part of an image, draw a segment over the rest and say here that it "
                "is not known: its voxels teach nothing, whatever else is drawn there."
            ),
        ):
            text = qt.QLabel(sentence)
            text.wordWrap = True
            layout.addWidget(text)
        rows = qt.QWidget()
        grid = qt.QGridLayout(rows)
        grid.setColumnStretch(1, 1)
        scroll = qt.QScrollArea()  # the buttons must stay on the screen, however many segments there are
        scroll.widgetResizable = True
        scroll.frameShape = qt.QFrame.NoFrame
        scroll.setWidget(rows)
        layout.addWidget(scroll)
        # What has to be decided stands first: the rest may be below the end of the window.
        for row, name in enumerate(sorted(names, key=lambda name: labelOf(name, labels, choices) is not None)):
            grid.addWidget(qt.QLabel(name), row, 0)
            grid.addWidget(self._makeBox(name, labels, choices), row, 1)
        self.buttons = qt.QDialogButtonBox()  # given here, PythonQt takes the buttons for an orientation
        self.buttons.setStandardButtons(qt.QDialogButtonBox.Ok | qt.QDialogButtonBox.Cancel)
        layout.addWidget(self.buttons)
        self.buttons.connect("accepted()", self.dialog.accept)
        self.buttons.connect("rejected()", self.dialog.reject)
        self.dialog.connect("accepted()", self._onOk)
        self.dialog.open()

    def box(self, name: str):
        """The combo box of a segment."""
        return self._boxes[name][0]

    def _makeBox(self, name: str, labels: Sequence[str], choices: dict):
        chosen = labelOf(name, labels, choices)
        entries: list[tuple[str, str | None]] = [(label, label) for label in labels]
        if not any(plainName(label) == plainName(name) for label in (*labels, UNKNOWN)):
            entries.append((_("a new label: {name}").format(name=name), name))
        entries.append((_("leave it out: learned as background"), BACKGROUND))
        entries.append((_("not known: takes no part"), UNKNOWN))
        if chosen is None:
            entries.insert(0, (_("(choose)"), None))
        elif chosen not in [label for _text, label in entries]:
            entries.append((_("a new label: {name}").format(name=chosen), chosen))
        box = qt.QComboBox()
        for text, _label in entries:
            box.addItem(text)
        values = [label for _text, label in entries]
        box.currentIndex = values.index(chosen)
        self._boxes[name] = (box, values)
        return box

    def _onOk(self) -> None:
        found = {name: values[box.currentIndex] for name, (box, values) in self._boxes.items()}
        self._onAccepted({name: label for name, label in found.items() if label is not None})
