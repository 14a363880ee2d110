"""What slicer-core lacks of Slicer (qt, ctk, widgets, slicer.app, Python base classes), for tests without a desktop.

    import standins
    standins.install()      # before importing anything of the module under test

MRML is Slicer's own; Qt is real (PySide6, without a screen). The stand-ins refuse names that no real Slicer has.
"""

import ctypes
import os
import sys
import types

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("PYSIDE6_OPTION_PYTHON_ENUM", "0x02")  # enums are integers, as in PythonQt

__all__ = ["install", "pump", "waitUntil"]

_installed = False


def install() -> None:
    """Make `import qt, ctk, slicer` work as inside Slicer; calling it again changes nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    if sys.version_info < (3, 12):
        # PySide6 takes these for immortal, as they are from Python 3.12 on: each of its calls that returns one of them
        # gives a reference too many away, until Python aborts, often not before its very end.
        for constant in (None, True, False, NotImplemented):
            ctypes.c_ssize_t.from_address(id(constant)).value += 1 << 40
    from . import qtclasses

    qt = types.ModuleType("qt")
    qtclasses.fill(qt)
    sys.modules["qt"] = qt

    import slicer
    import slicer.util

    from . import ctkwidgets, mrmlwidgets, slicerapp, slicerpython

    sys.modules["ctk"] = types.ModuleType("ctk")
    for name in ctkwidgets.__all__:
        setattr(sys.modules["ctk"], name, getattr(ctkwidgets, name))
    for name in mrmlwidgets.__all__:
        setattr(slicer, name, getattr(mrmlwidgets, name))
    for name, module in slicerpython.modules().items():
        sys.modules[name] = module
        setattr(slicer, name.partition(".")[2], module)
    slicer.app = slicerapp.Application(qtclasses.application())
    if not hasattr(slicer, "modules"):
        slicer.modules = types.SimpleNamespace()
    if slicer.__dict__.get("mrmlScene") is None:
        slicer.mrmlScene = slicer.vtkMRMLScene()
    slicer.moduleNames = types.SimpleNamespace()
    install.mainWindow = slicerapp.MainWindow()


def pump(seconds: float = 0.0) -> None:
    """Let Qt's event loop run for a while, as it does in Slicer while nothing blocks it."""
    waitUntil(lambda: False, seconds, required=False)


def waitUntil(condition, timeout: float = 30.0, required: bool = True) -> bool:
    """Run the event loop until `condition()` is true; AssertionError after `timeout` seconds if `required`."""
    import time

    from PySide6 import QtCore, QtWidgets

    end = time.monotonic() + timeout
    while True:
        QtWidgets.QApplication.processEvents(QtCore.QEventLoop.AllEvents, 20)
        QtCore.QCoreApplication.sendPostedEvents(None, QtCore.QEvent.DeferredDelete)
        if condition():
            return True
        if time.monotonic() >= end:
            assert not required, f"Nothing came of it within {timeout} s."
            return False
        time.sleep(0.005)
