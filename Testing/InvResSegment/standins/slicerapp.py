"""Stand-ins for slicer.app, its module manager and main window; names that real Slicer lacks raise AttributeError."""

import os
import tempfile

from PySide6 import QtCore, QtWidgets

from . import pythonqt

__all__ = ["Application", "MainWindow"]


class _Emitter(QtCore.QObject):
    startupCompleted = QtCore.Signal()
    aboutToQuit = QtCore.Signal()
    moduleAboutToBeUnloaded = QtCore.Signal(str)


class _Connectable:
    """An object whose signals are connected by signature."""

    _signals: tuple = ()

    def __init__(self):
        self._emitter = _Emitter()

    def connect(self, signal, target):
        if signal not in self._signals:
            raise ValueError(f"{type(self).__name__} has no signal {signal}.")
        return pythonqt.Signal(self._emitter, signal.partition("(")[0]).connect(target)

    def disconnect(self, signal, target):
        if signal not in self._signals:
            raise ValueError(f"{type(self).__name__} has no signal {signal}.")
        return pythonqt.Signal(self._emitter, signal.partition("(")[0]).disconnect(target)


class ModuleManager(_Connectable):
    """slicer.app.moduleManager()."""

    _signals = ("moduleAboutToBeUnloaded(QString)",)

    def __init__(self):
        super().__init__()
        self._modules: dict = {}

    def module(self, name):
        return self._modules.get(name)

    def unload(self, name):
        """Test only: what Slicer does when a module or the application ends."""
        self._emitter.moduleAboutToBeUnloaded(name)


class Application(_Connectable):
    """slicer.app."""

    _signals = ("startupCompleted()", "aboutToQuit()")
    applicationName = "Slicer"
    applicationVersion = "5.12.3-2026-06-23"
    majorVersion, minorVersion = 5, 12
    revision = "34045"
    os, arch = "linux", "amd64"

    def __init__(self, application):
        super().__init__()
        self._application = application
        self._moduleManager = ModuleManager()
        self.temporaryPath = tempfile.mkdtemp(prefix="Slicer-")
        self.restarts = 0

    def __getattr__(self, name):
        raise AttributeError(f"The stand-in of slicer.app has no {name!r}; add it only if real Slicer has it.")

    def emit(self, signal):
        """Test only: emit one of the application's signals."""
        pythonqt.Signal(self._emitter, signal)()

    def moduleManager(self):
        return self._moduleManager

    def settings(self):
        return QtCore.QSettings()

    def userSettings(self):
        return QtCore.QSettings()

    def testingEnabled(self):
        return False

    def processEvents(self):
        self._application.processEvents()

    def topLevelWidgets(self):
        return self._application.topLevelWidgets()

    def startupEnvironment(self):
        return QtCore.QProcessEnvironment.systemEnvironment()

    def layoutManager(self):
        return None

    def setOverrideCursor(self, _shape):
        pass

    def restoreOverrideCursor(self):
        pass

    def pauseRender(self):
        pass

    def resumeRender(self):
        pass

    def restart(self):
        self.restarts += 1

    @property
    def slicerHome(self):
        return os.path.join(self.temporaryPath, "home")


class MainWindow(QtWidgets.QMainWindow):
    """The main window, with a module selector that remembers what was selected."""

    def __init__(self):
        super().__init__()
        self.setObjectName("qSlicerMainWindow")
        self._selector = ModuleSelector()

    def moduleSelector(self):
        return self._selector


class ModuleSelector:
    """The module tool bar; the module names it was asked for are kept in `selected`."""

    def __init__(self):
        self.selected: list = []

    def selectModule(self, name):
        self.selected.append(name)
