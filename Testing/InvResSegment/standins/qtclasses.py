"""Stand-in for Slicer's module `qt`: PySide6 with PythonQt's conventions, recorded dialogs and a strict .ui loader."""

import tempfile
import xml.etree.ElementTree as ElementTree
from typing import ClassVar

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

from . import pythonqt

__all__ = ["UnexpectedDialog", "answers", "application", "fill"]

answers: list = []  # what the next dialogs return, in order; a dialog that nothing awaits is an error
_application = None


class UnexpectedDialog(AssertionError):
    """A dialog was opened that the test did not announce with `answers.append(...)`."""


def application() -> QtWidgets.QApplication:
    """The one QApplication; it is started on first use."""
    global _application
    if _application is None:
        _application = QtWidgets.QApplication.instance() or QtWidgets.QApplication(["Slicer"])
        _application.setOrganizationName("NA-MIC")
        _application.setApplicationName("Slicer")
        _application.setQuitOnLastWindowClosed(False)
        folder = tempfile.mkdtemp(prefix="settings-")  # the settings of whoever runs the tests stay untouched
        QtCore.QSettings.setPath(QtCore.QSettings.NativeFormat, QtCore.QSettings.UserScope, folder)
    return _application


def fill(module) -> None:
    """Put every class of Qt into the module `qt`."""
    if not issubclass(QtCore.QProcess.ProcessState, int):
        raise RuntimeError("PySide6 was imported before the stand-ins, so its enums are no integers.")
    pythonqt.install()
    application()
    for source in (QtCore, QtGui, QtWidgets):
        for name in dir(source):
            if name.startswith("Q"):
                setattr(module, name, getattr(source, name))
    module.QUiLoader = UiLoader
    module.QMessageBox = MessageBox
    module.QDialogButtonBox = DialogButtonBox
    module.QFileDialog = FileDialog
    module.QInputDialog = _Refused
    module.QTimer = _timerClass()
    if not hasattr(QtWidgets.QDialog, "exec_"):
        QtWidgets.QDialog.exec_ = lambda self: _answer(type(self).__name__)


class _Refused:
    def __init__(self, *_arguments):
        raise UnexpectedDialog("This dialog is not used by the panel.")


def _answer(what: str):
    if not answers:
        raise UnexpectedDialog(f"{what} was opened, and the test did not expect a dialog.")
    return answers.pop(0)


class MessageBox(QtWidgets.QMessageBox):
    """A message box that is never shown: `exec_` gives the next of `answers`."""

    _standsFor = "QMessageBox"
    shown: ClassVar[list] = []

    def exec_(self):
        MessageBox.shown.append(self.text)
        return _answer(f"The message box {self.text!r}")


class DialogButtonBox(QtWidgets.QDialogButtonBox):
    """Refuses buttons given alone: to PythonQt they are a number, which it takes for the orientation."""

    _standsFor = "QDialogButtonBox"

    def __init__(self, *arguments):
        if len(arguments) == 1 and isinstance(arguments[0], int):
            raise TypeError("PythonQt would take this for an orientation; call setStandardButtons.")
        super().__init__(*arguments)


class FileDialog:
    """Static file dialogs, which return text as in PythonQt."""

    @staticmethod
    def getOpenFileName(*_arguments):
        return _answer("A dialog to open a file")

    @staticmethod
    def getSaveFileName(*_arguments):
        return _answer("A dialog to save a file")

    @staticmethod
    def getExistingDirectory(*_arguments):
        return _answer("A dialog to choose a folder")


def _timerClass():
    waiting: set = set()

    class QTimer(QtCore.QTimer):
        """`singleShot` is a property of a timer and a static function of the class."""

        _standsFor = "QTimer"

        @staticmethod
        def singleShot(milliseconds, target):
            timer = QtCore.QTimer()
            timer.setSingleShot(True)
            waiting.add(timer)
            timer.connect("timeout()", target)
            timer.connect("timeout()", lambda: waiting.discard(timer))
            timer.start(milliseconds)

    return QTimer


class UiLoader:
    """Loads a .ui file with the stand-in widgets; unknown classes, properties, signals and slots are errors."""

    def load(self, file):
        import ctk
        import slicer

        root = ElementTree.fromstring(bytes(file.readAll().data()))
        connections = root.find("connections")
        wanted = [] if connections is None else list(connections)
        loader = _Loader()
        for node in root.iter("widget"):
            kind = node.get("class")
            if kind.startswith(("ctk", "qMRML", "qSlicer")):
                loader.classes[kind] = getattr(ctk if kind.startswith("ctk") else slicer, kind)
            elif not hasattr(QtWidgets, kind):
                raise RuntimeError(f"The .ui file names the unknown class {kind}.")
        if connections is not None:
            root.remove(connections)  # made below: signals written in Python have other signatures than in C++
        buffer = QtCore.QBuffer()
        buffer.setData(ElementTree.tostring(root))
        buffer.open(QtCore.QIODevice.ReadOnly)
        pythonqt.loading.append(file)
        try:
            widget = loader.load(buffer)
        finally:
            pythonqt.loading.clear()
        if loader.errors:
            raise loader.errors[0]
        if widget is None:
            raise RuntimeError(f"The .ui file could not be loaded: {loader.errorString()}")
        self._checkProperties(root, widget)
        for entry in wanted:
            sender, receiver = (self._find(widget, entry.findtext(role)) for role in ("sender", "receiver"))
            slot = entry.findtext("slot").partition("(")[0]
            pythonqt.connect(sender, entry.findtext("signal"), getattr(receiver, slot))
        return widget

    @staticmethod
    def _find(widget, name):
        found = widget if widget.objectName == name else widget.findChild(QtCore.QObject, name)
        if found is None:
            raise RuntimeError(f"The .ui file connects {name}, which it does not have.")
        return found

    def _checkProperties(self, root, widget):
        for node in root.iter("widget"):
            target = self._find(widget, node.get("name"))
            for entry in node.findall("property"):
                name = entry.get("name")
                if entry.get("stdset") != "0" and target.metaObject().indexOfProperty(name) < 0:
                    raise RuntimeError(f"The .ui file sets {name}, which {node.get('class')} does not have.")


class _Loader(QtUiTools.QUiLoader):
    def __init__(self):
        super().__init__()
        self._classes: dict = {}
        self._errors: list = []

    @property
    def classes(self):
        return self._classes

    @property
    def errors(self):
        return self._errors

    def createWidget(self, className, parent=None, name=""):
        if className in self._classes:
            try:
                widget = self._classes[className](parent)
            except Exception as error:
                self._errors.append(error)  # Qt would go on without the widget
                raise
            widget.setObjectName(name)
            return widget
        return super().createWidget(className, parent, name)
