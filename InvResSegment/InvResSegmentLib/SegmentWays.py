"""The ways of segmenting that a model leaves a choice of, as plain data and as the boxes that a tab has for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from slicer.i18n import tr as _

__all__ = ["AS_THE_MODEL", "SegmentWays", "WayBoxes"]


@dataclass(frozen=True)
class SegmentWays:
    """mirrored: whether the model also segments mirrored images, if it is one that does. keepPieces: whether what hangs
    loose is kept, if the model would leave it out. As they are by default, both are as the model wants them."""

    mirrored: bool = True
    keepPieces: bool = False

    @property
    def arguments(self) -> list[str]:
        """Of the backend's `segment`; `plan` knows the first kind only."""
        return [*self.planArguments, *(["--keep-pieces"] if self.keepPieces else [])]

    @property
    def planArguments(self) -> list[str]:
        """Of the backend's `plan`."""
        return [] if self.mirrored else ["--mirror"]

    def toJson(self) -> dict[str, bool]:
        """For a file; `fromJson` reads it."""
        return asdict(self)

    @classmethod
    def fromJson(cls, content: Any) -> SegmentWays:
        """What a file says; what it does not say is as the model wants it."""
        known = content if isinstance(content, dict) else {}
        return cls(bool(known.get("mirrored", True)), bool(known.get("keepPieces", False)))


AS_THE_MODEL = SegmentWays()


class WayBoxes:
    """`mirrorBox` and `piecesBox` of a tab, each shown for models where it means something.

    onChanged: called when one is ticked or not any more.
    """

    def __init__(self, ui, onChanged: Callable[[], None]) -> None:
        self._ui = ui
        for box in (ui.mirrorBox, ui.piecesBox):
            box.connect("toggled(bool)", lambda _checked: onChanged())

    def show(self, model) -> None:
        """Shows those of the model, a `ModelInfo` or None."""
        self._ui.piecesBox.visible = model is not None and model.onePiece
        count = 1 if model is None else model.mirrored
        self._ui.mirrorBox.visible = count > 1
        self._ui.mirrorBox.text = _("Average over {count} mirrored images (more exact)").format(count=count)

    def ways(self, model) -> SegmentWays:
        """What is chosen, as far as the model leaves a choice."""
        return SegmentWays(
            mirrored=self._ui.mirrorBox.checked or model.mirrored == 1,
            keepPieces=model.onePiece and not self._ui.piecesBox.checked,
        )

    def choose(self, ways: SegmentWays) -> None:
        """Ticks the boxes as these ways have it."""
        self._ui.mirrorBox.checked = ways.mirrored
        self._ui.piecesBox.checked = not ways.keepPieces
