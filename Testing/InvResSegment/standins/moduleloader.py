"""Loads a scripted module as qSlicerScriptedLoadableModule does: module object, widget, enter, exit, reload, unload."""

import importlib.util
import sys
from pathlib import Path

import slicer

from .mrmlwidgets import qSlicerScriptedLoadableModuleWidget

__all__ = ["ScriptedModule"]


class ScriptedModule:
    """What slicer.modules.<name> is. path: the module's .py file."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = str(path), Path(path).stem
        self.title, self.categories, self.dependencies, self.contributors = "", [], [], []
        self.helpText, self.acknowledgementText, self.icon = "", "", None
        self._widget = None
        sys.path.insert(0, str(Path(path).parent))
        spec = importlib.util.spec_from_file_location(self.name, path)
        sys.modules[self.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[self.name])
        self.instance = getattr(sys.modules[self.name], self.name)(self)
        setattr(slicer.modules, self.name.lower(), self)

    def widgetRepresentation(self):
        """The module's widget; made, and set up, on first use."""
        if self._widget is None:
            self._widget = _ModuleWidget(self.name)
            self._widget.reload()
        return self._widget

    def enter(self):
        """Show the module; returns the Python widget."""
        widget = self.widgetRepresentation()
        widget.isEntered = True
        widget.show()
        widget.self().enter()
        return widget.self()

    def exit(self) -> None:
        """Show another module."""
        self._widget.isEntered = False
        self._widget.self().exit()

    def unload(self) -> None:
        """What the end of the application does to a module."""
        slicer.app.moduleManager().unload(self.name)
        if self._widget is not None:
            self._widget.hide()
            self._widget.deleteLater()
            self._widget = None
        sys.path.remove(str(Path(self.path).parent))


class _ModuleWidget(qSlicerScriptedLoadableModuleWidget):
    def __init__(self, name):
        super().__init__()
        self._name = name

    def reload(self):
        """Make the Python widget anew from the module's present code."""
        kind = getattr(sys.modules[self._name], self._name + "Widget")
        self._self = kind(self)
        setattr(slicer.modules, self._name + "Widget", self._self)
        self._self.setup()
