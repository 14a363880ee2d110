"""The section with the run: which one is shown, pause, resume, keep the best, delete; the view does the rest."""

from collections.abc import Callable
from pathlib import Path

import ctk
from slicer.i18n import tr as _

from . import Settings
from .BackendPython import backendCommand, backendEnvironment
from .FineTuneRun import FineTuneRun, runsIn
from .Notice import ERROR, INFORMATION, WARNING, Notice
from .RunRecord import DISCARDED, PROMOTED, ROLLED_BACK
from .RunView import AT_WORK, RunView

__all__ = ["RunSection"]


class RunSection:
    """onChanged: called when a run has begun, ended, or was decided on."""

    def __init__(self, ui, services, onChanged: Callable[[], None]) -> None:
        self._ui, self._services, self._onChanged = ui, services, onChanged
        self._runs: list[FineTuneRun] = []
        self._shown: FineTuneRun | None = None
        self._filling = False
        self._askedToDelete = False
        self._message = Notice(ui, "runMessage")
        self.view = RunView(ui.runPlace, services.catalogue)
        self.view.onStateChanged = self._onState
        self.view.onDecided = self._onDecided
        ui.pauseButton.connect("clicked()", self._onPause)
        ui.keepButton.connect("clicked()", self._onKeep)
        ui.deleteRunButton.connect("clicked()", self._onDelete)
        ui.runBox.connect("currentIndexChanged(int)", self._onChosen)
        ui.runsFolderEdit.filters = ctk.ctkPathLineEdit.Dirs
        ui.runsFolderEdit.currentPath = Settings.runsFolder()
        ui.runsFolderEdit.connect("currentPathChanged(QString)", self._onFolder)
        self._update()

    @property
    def shown(self) -> FineTuneRun | None:
        """The run that is shown."""
        return self._shown

    @property
    def state(self) -> str:
        """Of the run that is shown, as `RunView` has it; "" without one."""
        return self.view.state

    @property
    def active(self) -> bool:
        """Whether a training is under way, shown or not."""
        # The process of the one that is shown may take a moment to end after its last word.
        others = [run for run in self._runs if run is not self._shown or not self.state]
        return self.state in AT_WORK or any(run.active for run in others)

    @property
    def _decided(self) -> bool:
        """Whether the model of the run that is shown was promoted, discarded or rolled back."""
        return self.state == "finished" and self.view.record is not None and bool(self.view.record.decision)

    def find(self) -> None:
        """Look for runs, of this Slicer or an earlier one; one that is under way or waits for a decision is shown."""
        found = runsIn(Path(Settings.runsFolder()))
        known = {run.folder: run for run in [*self._runs, *([self._shown] if self._shown else [])]}
        self._runs = [known.get(run.folder, run) for run in found]
        if self._shown is not None and self._shown.folder.is_dir():
            if self._shown not in self._runs:
                self._runs.insert(0, self._shown)
        else:
            self._shown = None
            if waiting := [run for run in self._runs if not run.decision]:
                self.show(waiting[0])
                return
            self.view.clear()
        self._update()

    def show(self, run: FineTuneRun, launched: bool = False) -> None:
        """Show a run. launched: its process has just been started."""
        if run not in self._runs:
            self._runs.insert(0, run)
        self._shown, self._askedToDelete = run, False
        self._message.clear()
        self.view.show(run.folder, launched, lambda: run.hasEnded)
        self._update()
        self._onChanged()

    def cleanup(self) -> None:
        """Let go of the scene; a run goes on."""
        self.view.cleanup()

    # ---------------------------------------------------------------- what is shown

    def _update(self) -> None:
        ui, run, state = self._ui, self._shown, self.state
        ui.runButton.visible = bool(self._runs)
        self._filling = True
        ui.runBox.clear()
        for each in self._runs:
            ui.runBox.addItem(_titleOf(each))
        ui.runBox.currentIndex = self._runs.index(run) if run is not None else -1
        self._filling = False
        ui.runRow.visible = len(self._runs) > 1 or run is None
        if run is None:
            ui.runButtons.visible = False
            return
        ended = state in ("paused", "failed")
        finished = state == "finished"
        decided = self._decided
        ui.runButtons.visible = not finished or decided
        ui.pauseButton.visible = ui.keepButton.visible = not finished
        ui.pauseButton.text = _("Resume") if ended else _("Pause")
        ui.pauseButton.toolTip = (
            _("Goes on from what was saved last.")
            if ended
            else _("Saves and stops; Resume goes on later, also after a restart.")
        )
        ui.keepButton.toolTip = _("Ends the training now, with what it has learned, and compares.")
        if state == "starting":
            # A process that is just beginning takes what asks it to stop for left over from the stop before.
            ui.pauseButton.toolTip = ui.keepButton.toolTip = _("Possible once the first training has begun.")
        elif state == "finishing":
            ui.keepButton.toolTip = _("Nothing is trained any more; the models are compared.")
        # Stopped, it would forget that it was to train no more.
        keepsBest = self.view.record is not None and self.view.record.keepsBest
        if state == "finishing" and keepsBest:
            ui.pauseButton.toolTip = ui.keepButton.toolTip
        problem = self._services.problem() if ended else ""
        if ended and any(other is not run and other.active for other in self._runs):
            problem = _("Another training is under way; wait for it, or pause it.")
        ui.pauseButton.enabled = (
            state == "running" or (state == "finishing" and not keepsBest) or (ended and not problem)
        )
        if problem:
            ui.pauseButton.toolTip = problem
        ui.keepButton.enabled = state == "running"
        ui.deleteRunButton.enabled = state != ""
        ui.deleteRunButton.toolTip = (
            _("Deletes the run with its proof; your models stay.")
            if decided
            else _("Ends the run and deletes it with all that it has learned.")
        )
        ui.deleteRunButton.text = _("Delete it") if self._askedToDelete else _("Delete")

    def _onState(self, state: str) -> None:
        self._askedToDelete = False
        if state == "failed" and self._shown is not None:
            # The view tells what the backend wrote down; this is what it said before it could, or instead.
            message, hint = self._shown.failure()
            told = self.view.record.error.get("message", "") if self.view.record is not None else ""
            self._message.show(ERROR, *([] if message == told else [message, hint]))
        elif state in AT_WORK or state == "finished":
            self._message.clear()
        self._update()
        self._onChanged()

    def _onDecided(self) -> None:
        self._update()
        self._onChanged()

    def _onChosen(self, index: int) -> None:
        if not self._filling and 0 <= index < len(self._runs) and self._runs[index] is not self._shown:
            self.show(self._runs[index])

    def _onFolder(self, path: str) -> None:
        # While a path is being typed it names no folder yet.
        if path and Path(path).is_dir() and path != Settings.runsFolder():
            Settings.setRunsFolder(path)
            self.find()
            self._onChanged()

    # ---------------------------------------------------------------- what is done

    def _onPause(self) -> None:
        run = self._shown
        if run is None:
            return
        if self.state in ("paused", "failed"):
            command, environment = backendCommand("-m", "invres"), backendEnvironment()
            if self._do(lambda: run.launch(command, environment, Settings.device(), resume=True)):
                self.show(run, launched=True)
            return
        if self._do(run.pause):
            self._message.show(INFORMATION, _("It is saved after the step at hand, and then stops."))

    def _onKeep(self) -> None:
        if self._shown is not None and self._do(self._shown.keepBest):
            self._message.show(
                INFORMATION, _("The training ends after the step at hand; then the models are compared.")
            )

    def _onDelete(self) -> None:
        run = self._shown
        if run is None:
            return
        if not self._askedToDelete:
            self._askedToDelete = True
            text = _("The run and all that it has learned will be deleted; your cases stay.")
            if self._decided:
                text = _("The run and its proof will be deleted; your models and your cases stay.")
            self._message.show(WARNING, text, _("Press the button again to delete it."))
            self._update()
            return
        self.view.clear()
        try:
            run.discard()
        except OSError as error:
            self.show(run)
            self._refused(error, _("Delete it again once it has stopped, and when nothing else uses its folder."))
            return
        self._shown = None
        self._runs.remove(run)
        self.find()
        self._onChanged()

    def _do(self, action: Callable[[], None]) -> bool:
        """Whether the disk let it be done; else it is told."""
        self._message.clear()
        try:
            action()
        except OSError as error:
            self._refused(error, _("Look whether the folder of the runs can be written to."))
            return False
        return True

    def _refused(self, error: OSError, hint: str) -> None:
        self._message.show(ERROR, _("That could not be done: {reason}.").format(reason=error.strerror or error), hint)


def _titleOf(run: FineTuneRun) -> str:
    words = {PROMOTED: _("promoted"), DISCARDED: _("discarded"), ROLLED_BACK: _("rolled back")}
    if run.decision in words:
        return _("{title} ({decision})").format(title=run.title, decision=words[run.decision])
    return run.title
