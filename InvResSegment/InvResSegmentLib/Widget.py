"""The panel: setup above, the tabs below, and the backend that all of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import slicer
from slicer.i18n import tr as _

from . import Settings
from .BackendProcess import BackendProcess
from .BackendPython import backendCommand, backendEnvironment, passOverLauncher
from .BatchTab import BatchTab
from .Dependencies import Dependencies
from .FineTuneTab import FineTuneTab
from .Models import ModelCatalogue
from .ModelsTab import ModelsTab
from .SegmentationLogic import SegmentationLogic
from .SegmentTab import SegmentTab
from .SetupSection import SetupSection
from .TrainingCases import TrainingCases

__all__ = ["Panel", "Services"]

TABS = (SegmentTab, BatchTab, FineTuneTab, ModelsTab)
"""In the order in which they stand; each takes `Services` and has title, widget, setParameterNode, setModels,
setupChanged, enter, cancel and cleanup."""


@dataclass
class Services:
    """What the panel gives its tabs. problem: why nothing can be run, in a sentence, or "".

    cases: the `TrainingCases` of the scene. showFineTuning: goes to the tab with them. log: adds lines to the log.
    """

    resourcePath: Callable[[str], str]
    backend: Any
    logic: Any
    catalogue: Any
    cases: Any
    problem: Callable[[], str]
    refreshModels: Callable[[], None]
    refreshDevices: Callable[[], None]
    showFineTuning: Callable[[], None]
    log: Callable[[str], None]


class Panel:
    """The module's widget. resourcePath: file of the module's Resources folder -> absolute path.

    Nothing is started before `enter`, and nothing here waits for the backend: answers come as callbacks.
    """

    def __init__(self, resourcePath: Callable[[str], str]) -> None:
        self._resourcePath = resourcePath
        self.widget = slicer.util.loadUI(resourcePath("UI/InvResSegment.ui"))
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self.widget.setMRMLScene(slicer.mrmlScene)
        self._entered = False
        self._models: list = []
        self._listed = False  # whether the backend has ever told its models
        self._pathToUse = ""  # of the model that is to be chosen once the models are read again
        self.dependencies = Dependencies(self._logSetup)
        self.backend = BackendProcess(backendCommand, backendEnvironment, self._log, passOverLauncher)
        self.setup = SetupSection(self.ui, self.dependencies, self._onSetupChanged)
        self.services = self._makeServices()
        self.tabs = [Tab(self.services) for Tab in TABS]
        for tab in self.tabs:
            self.ui.tabs.addTab(tab.widget, tab.title)
        self.ui.tabs.connect("currentChanged(int)", self._onTabChanged)
        self.services.catalogue.changed.append(self._onModelToUse)

    def _makeServices(self) -> Services:
        return Services(
            resourcePath=self._resourcePath,
            backend=self.backend,
            logic=SegmentationLogic(self.backend, slicer.util.tempDirectory),
            catalogue=ModelCatalogue(self.backend, Settings.modelsFolder),
            cases=TrainingCases(),
            problem=lambda: self.setup.problem,
            refreshModels=self.refreshModels,
            refreshDevices=self.refreshDevices,
            showFineTuning=lambda: self.ui.tabs.setCurrentWidget(self.fineTuneTab.widget),
            log=self._log,
        )

    # ---------------------------------------------------------------- what the module's widget calls

    def setParameterNode(self, parameters) -> None:
        """Show the choices of a scene."""
        for tab in self.tabs:
            tab.setParameterNode(parameters)
        if parameters is not None:
            self._askAgain()

    def enter(self) -> None:
        """The module is shown; the first time, the setup is checked and models and devices are asked for."""
        if not self._entered:
            self._entered = True
            self.refresh()
            self.setup.check()
        elif self.setup.ready and not self._askAgain():
            self.refreshDevices()
        for tab in self.tabs:
            tab.enter()

    def exit(self) -> None:
        """Another module is shown; a run goes on."""

    def sceneAboutToClose(self) -> None:
        """The scene is about to be emptied: its run ends, and nothing refers to its nodes any more.

        A batch of files has nothing to do with it and goes on. So does a backend that has nothing to do: the next
        patient would wait for torch to be loaded again.
        """
        self._letGo(kept=self.batchTab if self.batchTab.onFiles else None)

    def stop(self) -> None:
        """End the backend and an installation that is under way."""
        self.setup.stop()
        self._letGo()
        self.backend.stop()

    def _letGo(self, kept=None) -> None:
        """Of the scene, with what is done to it. kept: the tab whose work goes on."""
        self.setParameterNode(None)  # first: the end of a run would call for the plan of the next one
        for tab in self.tabs:
            if tab is not kept:
                tab.cancel()

    def cleanup(self) -> None:
        """The module is unloaded or reloaded."""
        self.stop()
        for tab in self.tabs:
            tab.cleanup()
        self.widget.setMRMLScene(None)

    # ---------------------------------------------------------------- models, devices, setup

    def _askAgain(self) -> bool:
        """Whether models and devices had to be asked for once more: closing a scene may have cut the answer off."""
        asks = self._entered and self.setup.ready and not self._listed
        if asks:
            self.refresh()
        return asks

    def refresh(self) -> None:
        """Ask the backend for its models and devices."""
        self._listed = True  # asked; `_onModels` takes it back
        self.refreshModels()
        self.refreshDevices()

    def refreshModels(self) -> None:
        """Read the models again."""
        self._showModels(_("Reading the models..."))
        self.services.catalogue.refresh(self._onModels)

    def refreshDevices(self) -> None:
        """Ask again what there is to compute on, and how much memory is free there."""
        self.backend.request(["devices"], None, self._onDevices)

    def _onModelToUse(self, path: str) -> None:
        """Another version of a model was promoted or gone back to: it is listed, and chosen, at once."""
        self._pathToUse = path
        self.refreshModels()

    def _onModels(self, models: list, error: str) -> None:
        self._listed = not error
        if not error:  # else those that were known before still are there
            self._models = models
        wanted, self._pathToUse = self._pathToUse, ""
        if model := next((model for model in self._models if wanted and model.path == wanted), None):
            self.segmentTab.chooseModel(model.sha256)
            self.fineTuneTab.chooseModel(model.sha256)
        nothing = _("There are no models yet; import one from an .invres file or a folder, in the tab Models.")
        self._showModels(error or nothing)
        if error and self._models:
            self.modelsTab.setModels(
                self._models, nothing, _("The models could not be listed anew: {error}").format(error=error)
            )

    def _showModels(self, emptyText: str) -> None:
        for tab in self.tabs:
            tab.setModels(self._models, emptyText)

    def _onDevices(self, outcome) -> None:
        if outcome.state == "done":
            self.segmentTab.setDevices(outcome.result.get("devices") or [], outcome.result.get("auto") or "")

    @property
    def segmentTab(self) -> SegmentTab:
        """The tab that segments."""
        return self._tab(SegmentTab)

    @property
    def batchTab(self) -> BatchTab:
        """The tab for many cases."""
        return self._tab(BatchTab)

    @property
    def fineTuneTab(self) -> FineTuneTab:
        """The tab that fine-tunes."""
        return self._tab(FineTuneTab)

    @property
    def modelsTab(self) -> ModelsTab:
        """The tab of models."""
        return self._tab(ModelsTab)

    def _tab(self, kind: type):
        return next(tab for tab in self.tabs if isinstance(tab, kind))

    def _onTabChanged(self, index: int) -> None:
        if self._entered and 0 <= index < len(self.tabs):
            self.tabs[index].enter()

    def _onSetupChanged(self, restartBackend: bool) -> None:
        """restartBackend: what is installed, or the Python that is used, is another one now."""
        if restartBackend:
            self.backend.stop()
        if self._entered and not self.setup.installing and (restartBackend or (self.setup.ready and not self._listed)):
            self.refresh()
        for tab in self.tabs:
            tab.setupChanged()

    def _logSetup(self, text: str) -> None:
        self.setup.log(text)

    def _log(self, text: str) -> None:
        self.segmentTab.appendLog(text)
