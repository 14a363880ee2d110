"""Stand-ins for Slicer's own Python modules: scripted module base classes, parameter node wrapper, translation."""

import os
import types
import typing
import unittest

import vtk

__all__ = ["modules"]


def modules() -> dict:
    """Module name to module, for sys.modules."""
    return {
        "slicer.ScriptedLoadableModule": _module(
            "slicer.ScriptedLoadableModule",
            ScriptedLoadableModule,
            ScriptedLoadableModuleWidget,
            ScriptedLoadableModuleLogic,
            ScriptedLoadableModuleTest,
        ),
        "slicer.parameterNodeWrapper": _module("slicer.parameterNodeWrapper", parameterNodeWrapper),
        "slicer.i18n": _module("slicer.i18n", tr, translate),
    }


def _module(name, *members):
    module = types.ModuleType(name)
    for member in members:
        setattr(module, member.__name__, member)
    module.__all__ = [member.__name__ for member in members]
    return module


def tr(text):
    if not isinstance(text, str):
        raise TypeError("Only text can be translated.")
    return text


def translate(_context, text):
    return tr(text)


class ScriptedLoadableModule:
    def __init__(self, parent):
        self.parent = parent
        self.moduleName = type(self).__name__

    def resourcePath(self, filename):
        return os.path.join(os.path.dirname(self.parent.path), "Resources", filename)

    def getDefaultModuleDocumentationLink(self, docPage=None):
        return ""


class ScriptedLoadableModuleWidget:
    def __init__(self, parent=None):
        import slicer

        self.moduleName = type(self).__name__.removesuffix("Widget")
        self.developerMode = False
        self.parent = parent
        self.layout = parent.layout()
        slicer.app.moduleManager().connect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)

    def resourcePath(self, filename):
        import slicer

        return os.path.join(os.path.dirname(slicer.util.modulePath(self.moduleName)), "Resources", filename)

    def setup(self):
        pass

    def cleanup(self):
        pass

    def onReload(self):
        import slicer

        slicer.util.reloadScriptedModule(self.moduleName)

    def _onModuleAboutToBeUnloaded(self, moduleName):
        import slicer

        if moduleName == self.moduleName:
            self.cleanup()
            slicer.app.moduleManager().disconnect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)


class ScriptedLoadableModuleLogic:
    def __init__(self, parent=None):
        self.moduleName = type(self).__name__.removesuffix("Logic")
        self.isSingletonParameterNode = True

    def getParameterNode(self):
        import slicer

        scene = slicer.mrmlScene
        node = scene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
        if node is None:
            node = scene.CreateNodeByClass("vtkMRMLScriptedModuleNode")
            node.UnRegister(None)
            node.SetSingletonTag(self.moduleName)
            node.SetAttribute("ModuleName", self.moduleName)
            node.SetName(scene.GenerateUniqueName(self.moduleName))
            node = scene.AddNode(node)
        return node


class ScriptedLoadableModuleTest(unittest.TestCase):
    def delayDisplay(self, message, requestedDelay=None, msec=None):
        pass


def parameterNodeWrapper(cls):
    """Typed properties stored in a vtkMRMLScriptedModuleNode, in the layout of Slicer's wrapper.

    Only text, numbers, booleans, nodes and `dict[str, node]` are known. Nothing is cached, so a change made by
    another wrapper of the same node is seen at once.
    """
    hints = typing.get_type_hints(cls)
    for name, kind in hints.items():
        setattr(cls, name, property(_reader(name, kind, getattr(cls, name, None)), _writer(name, kind)))
    cls.__init__ = _initialise
    cls.connectGui, cls.disconnectGui = _connectGui, _disconnectGui
    cls.connectParametersToGui = _connectParametersToGui
    cls._kinds = hints
    for method in ("StartModify", "EndModify", "AddObserver", "RemoveObserver", "Modified"):
        setattr(cls, method, lambda self, *arguments, _name=method: getattr(self.parameterNode, _name)(*arguments))
    return cls


def _initialise(self, parameterNode, prefix=None):
    self.parameterNode = parameterNode
    self._guis, self._nextTag, self._updating = {}, 0, False


def _isNode(kind):
    import slicer

    return isinstance(kind, type) and issubclass(kind, slicer.vtkMRMLNode)


def _read(node, name, kind, default):
    if typing.get_origin(kind) is dict:
        count = int(node.GetParameter(name + "_len") or 0)
        valueKind = typing.get_args(kind)[1]
        return {
            node.GetParameter(f"{name}_{index}_0"): _read(node, f"{name}_{index}_1", valueKind, None)
            for index in range(count)
        }
    if _isNode(kind):
        return node.GetNodeReference(name)
    if not node.HasParameter(name):
        return kind() if default is None else default
    text = node.GetParameter(name)
    return text == "True" if kind is bool else kind(text)


def _write(node, name, kind, value):
    if typing.get_origin(kind) is dict:
        before = int(node.GetParameter(name + "_len") or 0)
        keyKind, valueKind = typing.get_args(kind)
        for index, (key, entry) in enumerate(value.items()):
            _write(node, f"{name}_{index}_0", keyKind, key)
            _write(node, f"{name}_{index}_1", valueKind, entry)
        node.SetParameter(name + "_len", str(len(value)))
        for index in range(len(value), before):
            node.UnsetParameter(f"{name}_{index}_0")
            node.UnsetParameter(f"{name}_{index}_1")
            node.RemoveNodeReferenceIDs(f"{name}_{index}_1")
    elif _isNode(kind):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} takes a {kind.__name__}.")
        node.SetParameter(name, "")
        node.SetNodeReferenceID(name, value.GetID() if value is not None else None)
    else:
        if not isinstance(value, (int, float) if kind is float else kind):
            raise TypeError(f"{name} takes {kind.__name__}, not {value!r}.")
        node.SetParameter(name, str(value))


def _reader(name, kind, default):
    return lambda self: _read(self.parameterNode, name, kind, default)


def _writer(name, kind):
    def write(self, value):
        wasModified = self.parameterNode.StartModify()
        _write(self.parameterNode, name, kind, value)
        self.parameterNode.EndModify(wasModified)

    return write


def _connectGui(self, gui):
    """Bind every widget with a `SlicerParameterName`; as in Slicer, no tag comes back."""
    found = {widget.property("SlicerParameterName"): widget for widget in vars(gui).values()}
    _connectParametersToGui(self, {name: widget for name, widget in found.items() if name})


def _connectParametersToGui(self, mapping):
    """Bind widgets by the name of their parameter; returns a tag for `disconnectGui`."""
    import qt
    import slicer

    bindings = []
    for name, widget in mapping.items():
        kind = self._kinds.get(name)
        if kind is None:
            raise ValueError(f"The parameter node has no {name}.")
        if _isNode(kind) and type(widget) is slicer.qMRMLNodeComboBox:
            bindings.append((name, widget, widget.currentNodeChanged, widget.currentNode, widget.setCurrentNode))
        elif kind is bool and type(widget) is qt.QCheckBox:
            bindings.append(
                (name, widget, widget.stateChanged, lambda w=widget: w.checked, lambda v, w=widget: w.setChecked(v))
            )
        elif kind is str and type(widget) is qt.QLineEdit:
            bindings.append(
                (name, widget, widget.textChanged, lambda w=widget: w.text, lambda v, w=widget: w.setText(v))
            )
        else:
            raise RuntimeError(f"Slicer cannot connect {type(widget).__name__} to {kind} ({name}).")
    connections = []
    for name, _widget, signal, get, put in bindings:
        put(getattr(self, name))

        target = _toNode(self, name, get)
        signal.connect(target)
        connections.append((signal, target))

    tag = self._nextTag
    self._nextTag += 1

    def toGui(_caller, _event):
        if self._updating or tag not in self._guis:
            return
        self._updating = True
        try:
            for name, _widget, _signal, _get, put in bindings:
                put(getattr(self, name))
        finally:
            self._updating = False

    self._guis[tag] = connections
    self.parameterNode.AddObserver(vtk.vtkCommand.ModifiedEvent, toGui)  # which nothing in Slicer removes
    return tag


def _toNode(self, name, get):
    def changed():
        if not self._updating:
            setattr(self, name, get())

    return changed


def _disconnectGui(self, tag):
    for signal, target in self._guis.pop(tag):
        signal.disconnect(target)
