"""The section that steps through the results of a batch: previous, next, correct, accept."""

from collections.abc import Callable

import slicer
from slicer.i18n import tr as _

from .BatchCase import BatchCase
from .NodeConversion import ConversionError
from .Notice import ERROR, GOOD, INFORMATION, Notice
from .ResultView import openInSegmentEditor
from .ReviewQueue import ReviewQueue
from .Text import escape

__all__ = ["ReviewSection"]


class ReviewSection:
    """`reviewButton` of the Batch tab; hidden until a case is done.

    onChanged: called when another case is open, or was accepted.
    """

    def __init__(self, ui, review: ReviewQueue, onChanged: Callable[[], None]) -> None:
        self._ui, self._queue, self._onChanged = ui, review, onChanged
        self._notice = Notice(ui, "reviewNotice")
        ui.previousButton.connect("clicked()", lambda: self._move(lambda: review.step(False)))
        ui.nextButton.connect("clicked()", lambda: self._move(lambda: review.step(True)))
        ui.correctButton.connect("clicked()", self._onCorrect)
        ui.acceptButton.connect("clicked()", self._onAccept)

    def open(self, case: BatchCase) -> None:
        """Show this case."""
        self._move(lambda: self._queue.open(case) or True)

    def leave(self) -> bool:
        """Close the case that is open, with what was changed saved; False where that fails, and it stays open."""
        try:
            self._queue.leave()
        except OSError as error:
            self._showUnsaved(error)
            return False
        return True

    def update(self) -> None:
        """Bring texts and buttons in line with the cases."""
        ui, cases, case = self._ui, self._queue.cases, self._queue.current
        ui.reviewButton.visible = bool(cases)
        if case in cases:
            shown = _("<b>{name}</b> ({number} of {count})").format(
                name=escape(case.name), number=cases.index(case) + 1, count=len(cases)
            )
        else:
            shown = _("Press Next: results that the model is least sure of come first.")
        accepted = _("{accepted} of {count} accepted.").format(accepted=self._queue.accepted, count=len(cases))
        ui.reviewText.text = f"{shown}<br>{accepted}"
        ui.correctButton.enabled = ui.acceptButton.enabled = case is not None
        ui.previousButton.enabled = case in cases and cases.index(case) > 0
        ui.nextButton.enabled = case not in cases or cases.index(case) < len(cases) - 1

    def _move(self, move: Callable[[], bool]) -> None:
        try:
            moved = move()
        except ConversionError as error:
            self._notice.show(ERROR, error.message, error.hint)
        except OSError as error:
            self._showUnsaved(error)
        else:
            self._notice.clear()
            if moved:
                self._showImage()
            else:
                self._notice.show(INFORMATION, _("There are no more cases in this direction."))
        self._onChanged()

    def _showImage(self) -> None:
        image = self._queue.background
        if image is not None:
            slicer.util.setSliceViewerLayers(background=image, foreground=None, label=None, fit=True)

    def _onCorrect(self) -> None:
        if self._queue.segmentation is not None:
            openInSegmentEditor(self._queue.segmentation, self._queue.background)

    def _onAccept(self) -> None:
        try:
            learned = self._queue.accept()
        except OSError as error:
            self._showUnsaved(error)
            return
        if learned:
            self._notice.show(GOOD, _("Accepted; it is among the training cases of the tab Fine-tune."))
        else:
            self._notice.show(
                INFORMATION, _("Accepted; it has no segments, so there is nothing to learn from it in Fine-tune.")
            )
        self._onChanged()

    def _showUnsaved(self, error: OSError) -> None:
        text = _("What you changed could not be saved: {reason}.").format(reason=error.strerror or error)
        self._notice.show(ERROR, text, _("Free some space and try again; the case stays open until then."))
