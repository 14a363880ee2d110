"""The view of a fine-tuning: stage, time left, memory, warnings and curves while it runs, then the proof."""

from collections.abc import Callable
from pathlib import Path

import qt
import slicer
from slicer.i18n import tr as _

from .Notice import ERROR, INFORMATION, WARNING, Notice
from .ProofView import ProofView
from .RunChart import RunChart
from .RunRecord import COMPARE, TRAIN, RunRecord
from .Text import formatBytes, formatSeconds

__all__ = ["AT_WORK", "RunView"]

POLL_MS = 1000
STEPS = 1000  # of the progress bar
WARNINGS_SHOWN = 5
AT_WORK = ("starting", "running", "finishing", "stopping")
"""States in which a process is at work."""


class RunView:
    """Shows one run folder of `invres finetune`, and reads it about once a second while somebody looks.

    parent: a widget, into whose layout the view is put. catalogue: a `ModelCatalogue`, for promoting and rolling back.
    onStateChanged: called with the state of the record (see `RunRecord`) when that changes;
    onDecided: called when the tuned model was promoted, discarded or rolled back.
    """

    def __init__(self, parent, catalogue) -> None:
        self.onStateChanged: Callable[[str], None] = lambda state: None
        self.onDecided: Callable[[], None] = lambda: None
        self.record: RunRecord | None = None
        self.widget = slicer.util.loadUI(str(Path(__file__).parents[1] / "Resources" / "UI/RunView.ui"))
        self.ui = slicer.util.childWidgetVariables(self.widget)
        parent.layout().addWidget(self.widget)
        self._state = ""
        self._notice = Notice(self.ui, "runNotice")
        self._warnings = Notice(self.ui, "runWarnings")
        self._chart = RunChart(self.ui.chartBox.layout())
        self._proof = ProofView(self.ui, catalogue, lambda: self.onDecided())
        self._timer = qt.QTimer()
        self._timer.interval = POLL_MS
        self._timer.connect("timeout()", self._onTimer)
        self.clear()

    @property
    def state(self) -> str:
        """The state of the run that is shown; "" where none is."""
        return self._state

    def show(self, runFolder: Path, launched: bool = False, hasEnded: Callable[[], bool] = lambda: False) -> None:
        """Show a run. launched: a process has just been started for it, which may not have said anything yet.

        hasEnded: whether that process is gone, where somebody knows it.
        """
        same = self.record is not None and self.record.folder == Path(runFolder)
        self.record = RunRecord(Path(runFolder), launched, hasEnded)
        self._state = ""
        if not same:
            self._chart.clear()
            self._proof.clear()
        self.widget.visible = True
        self.poll()
        self._timer.start()

    def clear(self) -> None:
        """Show nothing; what was put into the scene is removed."""
        self._timer.stop()
        self.record, self._state = None, ""
        self._chart.clear()
        self._proof.clear()
        self.widget.visible = False

    def leave(self) -> None:
        """Nobody looks any more, or the scene is about to be emptied: a case of the proof goes out of it."""
        self._proof.leave()

    def poll(self) -> None:
        """Read what is new in the folder and show it, now."""
        if self.record is None:
            return
        if self.record.poll() or not self._state or self._chart.lost:
            self._update()
        if self.record is not None and self.record.state != self._state:
            self._state = self.record.state
            self.onStateChanged(self._state)

    def cleanup(self) -> None:
        """Let go of the scene, and of whoever listens."""
        self.onStateChanged, self.onDecided = lambda state: None, lambda: None
        self.clear()

    def _onTimer(self) -> None:
        if self.widget.visible:
            self.poll()
        else:
            self.leave()

    # ---------------------------------------------------------------- what is shown

    def _update(self) -> None:
        record = self.record
        self.ui.progressBox.visible = record.state in AT_WORK
        self.ui.stageText.text = f"<b>{_stageText(record)}</b>"
        # Without an end in sight the bar only moves.
        self.ui.runProgress.maximum = 0 if record.state == "starting" else STEPS
        self.ui.runProgress.value = round(STEPS * record.fraction)
        self.ui.detailsText.text = _detailsText(record)
        shown = record.warnings[-WARNINGS_SHOWN:]
        left = len(record.warnings) - len(shown)
        more = [_("({count} earlier warnings are in the log of the run.)").format(count=left)] if left else []
        self._warnings.show(WARNING, *shown, *more)
        if record.state == "failed":
            self._notice.show(ERROR, record.error.get("message", ""), record.error.get("hint", ""))
        elif record.state == "paused":
            self._notice.show(INFORMATION, _("Paused; everything that was trained is saved. Resume goes on from here."))
        else:
            self._notice.clear()
        part, title = record.partShown, ""
        if part and record.parts > 1:
            title = _("Training {part} of {parts}").format(part=part, parts=record.parts)
        self._chart.show(record.epochsShown, title)
        if record.state == "finished":
            self._proof.show(record)
        else:
            self._proof.clear()


def _stageText(record: RunRecord) -> str:
    if record.state == "starting":
        return _("Starting")
    if record.state == "stopping":
        return _("Stopping; what was trained is being saved")
    if record.state == "finishing" and record.stage != COMPARE:
        return _("Saving the tuned model")
    training = ""
    if record.part and record.parts > 1:
        training = _("training {part} of {parts}").format(part=record.part, parts=record.parts)
    if record.stage == TRAIN:
        return training[:1].upper() + training[1:] if training else _("Training")
    stage = {
        "prepare.cases": _("Preparing the cases"),
        "prepare.plan": _("Preparing the cases"),
        COMPARE: _("Comparing with the base model"),
    }.get(record.stage, _("Working"))
    return f"{stage} ({training})" if training else stage


def _detailsText(record: RunRecord) -> str:
    parts = []
    if record.epochs:
        parts.append(_("epochs done: {count}").format(count=sum(map(len, record.epochs.values()))))
    if record.etaS and record.state != "stopping":
        # Comparing is not in it before it has begun.
        text = _("about {time} left") if record.stage == COMPARE else _("about {time} of training left")
        parts.append(text.format(time=formatSeconds(record.etaS)))
    if record.measuredBytes:
        parts.append(_("a step takes {amount} of memory").format(amount=formatBytes(record.measuredBytes)))
    elif record.predictedBytes:
        amount = formatBytes(record.predictedBytes)
        parts.append(_("a step will take {amount} of memory").format(amount=amount))
    return ", ".join(parts)
