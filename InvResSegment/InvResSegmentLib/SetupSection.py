"""The setup section: what the backend lacks, in words; installing it, also without internet; the diagnostic report."""

from collections.abc import Callable
from pathlib import Path

import ctk
import qt
import slicer
from slicer.i18n import tr as _

from . import Settings
from .BackendPython import separatePython, setSeparatePython
from .Notice import ERROR, GOOD, INFORMATION, WARNING, Notice
from .WheelFolder import TORCH_BUILDS

__all__ = ["SetupSection"]


class SetupSection:
    """The section `setupButton` of the panel: open while something is missing, closed once all is well.

    dependencies: a `Dependencies`. onChanged(restartBackend) is called when the state has changed; restartBackend:
    other packages or another Python are there now.
    """

    def __init__(self, ui, dependencies, onChanged: Callable[[bool], None]) -> None:
        self._ui = ui
        self._dependencies = dependencies
        self._onChanged = onChanged
        self._notice = Notice(ui, "setupNotice")
        self.ready = False
        self.checking = False
        self.installing = False
        ui.pythonPathEdit.filters = ctk.ctkPathLineEdit.Files
        ui.pythonPathEdit.currentPath = separatePython()
        ui.packagesFolderEdit.filters = ctk.ctkPathLineEdit.Dirs
        ui.packagesFolderEdit.currentPath = Settings.packagesFolder()
        ui.offlineButton.collapsed = not Settings.packagesFolder()
        titles = {"cpu": _("CPU"), "cu130": _("NVIDIA GPU"), "cu126": _("NVIDIA GPU before GTX 16 and RTX 20")}
        for build in TORCH_BUILDS:
            ui.torchBuildBox.addItem(titles[build])
        ui.installButton.connect("clicked()", self._onInstall)
        ui.checkButton.connect("clicked()", self.check)
        ui.restartButton.connect("clicked()", self._onRestart)
        ui.reportButton.connect("clicked()", self._onReport)
        ui.pythonPathEdit.connect("currentPathChanged(QString)", self._onPython)
        ui.packagesFolderEdit.connect("currentPathChanged(QString)", self._onPackagesFolder)
        ui.torchBuildBox.connect("currentIndexChanged(int)", self._showCommand)
        ui.saveCommandButton.connect("clicked()", self._onSaveCommand)
        ui.restartButton.visible = False
        ui.setupLog.visible = False
        self._showBusy()

    @property
    def problem(self) -> str:
        """Why the backend cannot be used, as a sentence for a tool tip; "" when all is well."""
        if self.installing:
            return _("Wait until the installation has ended.")
        if self.checking:
            return _("Wait until the setup has been checked.")
        return "" if self.ready else _("Install what is missing: see Setup, at the top.")

    def check(self) -> None:
        """Look at what is installed; takes seconds, and blocks nothing."""
        if self.checking or self.installing:
            return
        self.checking = True
        self._showBusy()
        self._notice.show(INFORMATION, _("Checking what is installed..."))
        self._dependencies.check(self._onChecked)
        self._onChanged(False)

    def stop(self) -> None:
        """End a check, and an installation that can be ended."""
        self._dependencies.cancel()
        self.checking = self.installing = False

    def log(self, text: str) -> None:
        """Add to the log of an installation."""
        for line in text.splitlines():
            self._ui.setupLog.appendPlainText(line)

    def _onChecked(self, preflight) -> None:
        self.checking = False
        if preflight.ready:  # an installation that was begun has come to its end, whoever saw it
            self._dependencies.installPending = False
        self._show(preflight)
        self._onChanged(False)
        if self._dependencies.installPending and not preflight.ready and not preflight.blockers:
            self._install()  # it was begun before Slicer was restarted

    def _show(self, preflight) -> None:
        self.ready = preflight.ready
        python = _("Python {version}").format(version=preflight.pythonVersion)
        if preflight.ready:
            level = WARNING if preflight.idleCards else GOOD
            self._notice.show(
                level, _("Everything is installed ({python}).").format(python=python), *preflight.sentences
            )
        else:
            self._notice.show(ERROR if preflight.blockers else WARNING, *_sentences(preflight))
        self._ui.setupButton.collapsed = preflight.ready
        self._showCommand()
        self._showBusy()

    def _showCommand(self, _index: int = 0) -> None:
        """The command that fills a folder of packages, once it is known which ones fit this Python."""
        command = self._dependencies.downloadCommand(TORCH_BUILDS[self._ui.torchBuildBox.currentIndex])
        self._ui.commandEdit.text = command
        self._ui.commandEdit.cursorPosition = 0
        self._ui.saveCommandButton.enabled = bool(command)
        self._ui.torchBuildBox.enabled = "--index-url" in command  # for a Mac there is one build

    def _showBusy(self) -> None:
        busy = self.checking or self.installing
        self._ui.setupProgress.visible = busy
        self._ui.checkButton.enabled = not busy
        preflight = self._dependencies.preflight
        self._ui.installButton.enabled = not busy and not (preflight is not None and preflight.blockers)
        self._ui.installButton.visible = not self.ready
        self._ui.pythonPathEdit.enabled = self._ui.packagesFolderEdit.enabled = not busy
        if self.installing:
            self._ui.setupButton.text = _("Setup: installing")
        elif self.checking:
            self._ui.setupButton.text = _("Setup: checking")
        elif self.ready:
            idle = preflight is not None and preflight.idleCards
            self._ui.setupButton.text = _("Setup: ready, without the GPU") if idle else _("Setup: ready")
        else:
            self._ui.setupButton.text = _("Setup: something is missing")

    # ---------------------------------------------------------------- installing

    def _onInstall(self) -> None:
        if path := separatePython():
            lines = [_("Install the missing packages into this Python?"), path, ""]
        else:
            lines = [_("Change the packages of Slicer's Python, which other modules use as well?"), ""]
        # All that there is to be asked: the installers that are called then ask nothing.
        lines += [*self._dependencies.planned, "", *self._dependencies.advice]
        if slicer.util.confirmOkCancelDisplay("\n".join(lines).strip(), _("Install")):
            self._install()

    def _install(self) -> None:
        self.installing = True
        self._ui.setupLog.visible = True
        self._ui.setupButton.collapsed = False
        self._showBusy()
        self._notice.show(INFORMATION, _("Installing; this takes some minutes..."))
        self._onChanged(True)  # the backend must not hold files that are replaced
        self._dependencies.install(self._onInstalled)

    def _onInstalled(self, outcome) -> None:
        self.installing = False
        self._ui.restartButton.visible = outcome.state == "restart"
        preflight = self._dependencies.preflight
        if outcome.state == "done" and preflight is not None:
            self._ui.setupLog.visible = False
            self._show(preflight)
        else:
            self.ready = False
            level = {"failed": ERROR, "restart": WARNING}.get(outcome.state, INFORMATION)
            self._notice.show(level, outcome.message, outcome.hint)
        self._showBusy()
        self._onChanged(outcome.state == "done")

    def _onRestart(self) -> None:
        slicer.app.confirmRestart(_("Restart Slicer to go on with the installation? Save your scene first."))

    # ---------------------------------------------------------------- another Python, the report

    def _onPython(self, path: str) -> None:
        path = path.strip()
        if path == separatePython():
            return
        if path and not Path(path).is_file():
            self._notice.show(INFORMATION, _("Choose the file of a Python, such as bin/python of an environment."))
            return
        setSeparatePython(path)
        self._checkAnew(restartBackend=True)

    def _onPackagesFolder(self, path: str) -> None:
        if path.strip() != Settings.packagesFolder():
            Settings.setPackagesFolder(path.strip())
            if not self.ready:  # else it is looked at when something is missing
                self._checkAnew(restartBackend=False)

    def _checkAnew(self, restartBackend: bool) -> None:
        self.ready = False
        self._dependencies.cancel()
        self.checking = False
        self._onChanged(restartBackend)
        self.check()

    def _onSaveCommand(self) -> None:
        self._save(_("Save the command"), "InvResSegment-packages.txt", self._ui.commandEdit.text + "\n")

    def _onReport(self) -> None:
        facts = [("Device", Settings.device()), ("Setup", self.problem or "ready")]
        self._save(_("Save the diagnostic report"), "InvResSegment-report.txt", self._dependencies.report(facts))

    def _save(self, title: str, name: str, text: str) -> None:
        path = qt.QFileDialog.getSaveFileName(self._ui.setupButton, title, name, _("Text (*.txt)"))
        if not path:
            return
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            self._notice.show(ERROR, _("The file could not be saved: {reason}.").format(reason=error.strerror or error))
            return
        self._notice.show(GOOD, _("Saved to {path}.").format(path=path))


def _sentences(preflight) -> list[str]:
    """What is the matter; packages that are just not there in one sentence and not in one each."""
    said = [*preflight.sentences, *(one for one in preflight.blockers if one not in preflight.sentences)]
    missing = [package for package in preflight.packages if package.state == "missing" and package.sentence in said]
    if len(missing) < 3:
        return said
    alone = {package.sentence for package in missing}
    names = ", ".join(package.name for package in missing)
    return [*(one for one in said if one not in alone), _("Not installed: {names}.").format(names=names)]
