"""A sentence with an icon in the panel: what went wrong, what to look at, what is right."""

import qt

from .Text import paragraphs

__all__ = ["ERROR", "GOOD", "INFORMATION", "WARNING", "Notice", "levelIcon"]

GOOD = "good"
INFORMATION = "information"
WARNING = "warning"
ERROR = "error"

ICON_SIZE = 16  # pixels


class Notice:
    """The three widgets `<name>`, `<name>Icon` and `<name>Text` of a .ui file; hidden while there is nothing to say."""

    def __init__(self, ui, name: str) -> None:
        self._frame = getattr(ui, name)
        self._icon = getattr(ui, name + "Icon")
        self._text = getattr(ui, name + "Text")
        self._text.textFormat = qt.Qt.RichText  # else a sentence without a tag shows its escapes
        self.clear()

    @property
    def text(self) -> str:
        """What is shown, as rich text; "" when hidden."""
        return "" if self._frame.isHidden() else self._text.text

    def show(self, level: str, *sentences: str) -> None:
        """Show the sentences that are not empty, one a line; with none of them nothing is shown."""
        said = [sentence for sentence in sentences if sentence]
        self._text.text = paragraphs(said)
        self._icon.setPixmap(levelIcon(self._frame, level).pixmap(ICON_SIZE, ICON_SIZE))
        self._frame.visible = bool(said)

    def clear(self) -> None:
        """Hide it."""
        self._text.text = ""
        self._frame.visible = False


def levelIcon(widget, level: str):
    """The icon of a level in the style of a widget."""
    icon = {
        GOOD: qt.QStyle.SP_DialogApplyButton,
        INFORMATION: qt.QStyle.SP_MessageBoxInformation,
        WARNING: qt.QStyle.SP_MessageBoxWarning,
        ERROR: qt.QStyle.SP_MessageBoxCritical,
    }[level]
    return widget.style().standardIcon(icon)
