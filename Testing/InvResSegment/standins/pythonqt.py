"""PythonQt's conventions laid over PySide6: code written for Slicer's `qt` runs, code written for PyQt fails.

In PythonQt a Qt property is a plain attribute (`button.text`, not `button.text()`), unknown attributes cannot be set,
signals are connected by their C++ signature or as `object.signal.connect`, surplus arguments of a signal are dropped
and an exception in a slot is printed. All of this is done by replacing attribute access of PySide6's QObject classes.
"""

import inspect
import re
import traceback

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

from . import names

__all__ = ["Signal", "install", "slotErrors"]

slotErrors: list[str] = []  # exceptions in slots: printed and forgotten in Slicer, held against the test here

_originals: dict[type, object] = {QtCore.QObject: QtCore.QObject.__getattribute__}
loading: list = []  # not empty while a .ui file is being loaded
_reading: set = set()
_metaObjects: dict[int, dict] = {}
_targets: list[tuple] = []  # (sender, signal name, callable, wrapper): wrappers must be found again to disconnect
_ALIASES = {"name": "objectName"}  # PythonQt's own alias, which slicer.util relies on
_ADDED = {"connect", "disconnect", "className", "isWidgetType", "delete", "findChildren", "findChild", "inherits"}


def install() -> None:
    """Replace attribute access of every QObject class of PySide6, once."""
    if getattr(QtCore.QObject, "_pythonqt", False):
        return
    for module in (QtCore, QtGui, QtWidgets, QtUiTools):
        for value in [getattr(module, name) for name in dir(module)]:  # PySide6 creates its classes on first use
            if isinstance(value, type) and issubclass(value, QtCore.QObject):
                if value is QtCore.QObject or "__getattribute__" in value.__dict__:  # QFile and others have their own
                    _originals[value] = value.__getattribute__
                    value.__getattribute__ = _getAttribute
                value.__setattr__ = _setAttribute
                meta = value.staticMetaObject
                names.qtProperties[value] = {meta.property(index).name() for index in range(meta.propertyCount())}
    QtCore.QObject._pythonqt = True


def _getPlain(self, name):
    """Attribute access as PySide6 does it."""
    return next(_originals[base] for base in type(self).__mro__ if base in _originals)(self, name)


class Signal:
    """A signal of one object: call it to emit it, `connect` and `disconnect` take a callable."""

    def __init__(self, sender, name):
        self._sender, self._name = sender, name

    def __call__(self, *arguments):
        _getPlain(self._sender, self._name).emit(*arguments)

    def connect(self, target):
        return connect(self._sender, self._name, target)

    def disconnect(self, target):
        return disconnect(self._sender, self._name, target)


def connect(sender, signal: str, target, slot: str | None = None) -> bool:
    """Connect as PythonQt does: surplus arguments are dropped, exceptions are printed (and noted in `slotErrors`)."""
    if isinstance(slot, str):
        target = _getAttribute(target, slot.partition("(")[0])
    if isinstance(target, Signal):
        target = target.__call__
    if not callable(target):
        raise TypeError(f"{target!r} is not callable and cannot be connected to {signal}.")
    name = _signalName(sender, signal)
    limit = _argumentLimit(target)

    def call(*arguments):
        try:
            target(*(arguments if limit is None else arguments[:limit]))
        except Exception:
            slotErrors.append(traceback.format_exc())
            traceback.print_exc()

    wrapper = _withArguments(_argumentCount(sender, signal), call)

    _targets.append((sender, name, target, wrapper))
    _getPlain(sender, name).connect(wrapper)
    return True


def disconnect(sender, signal: str, target=None, slot: str | None = None) -> bool:
    """Undo `connect` with the same arguments; False when there is nothing to undo."""
    if isinstance(slot, str):
        target = _getAttribute(target, slot.partition("(")[0])
    name = _signalName(sender, signal)
    for entry in [e for e in _targets if e[0] is sender and e[1] == name and (target is None or e[2] == target)]:
        _getPlain(sender, name).disconnect(entry[3])
        _targets.remove(entry)
        return True
    return False


def _signalName(sender, signal: str) -> str:
    """The name of a signal given as `name` or `name(types)`; ValueError if the sender has no such signal."""
    name, bracket, _types = signal.partition("(")
    signature = re.sub(r"\s", "", signal)
    names.check(type(sender), name)
    known = names.signalSignatures(type(sender))
    if name in {entry.partition("(")[0] for entry in known}:
        found = not bracket or signature in known
    elif hasattr(type(sender), "_standsFor") and any(name in b.__dict__ for b in _pythonBases(type(sender))):
        found = not names.available()
    else:
        meta = _getPlain(sender, "metaObject")()
        methods = [meta.method(index) for index in range(meta.methodCount())]
        signatures = {bytes(m.methodSignature()).decode() for m in methods if m.methodType() == m.MethodType.Signal}
        found = signature in signatures if bracket else name in {entry.partition("(")[0] for entry in signatures}
    if not found:
        raise ValueError(f"{type(sender).__name__} has no signal {signal}.")
    return name


def _pythonBases(kind: type) -> list[type]:
    """The classes among a class and its bases that are written in Python."""
    return [base for base in kind.__mro__ if not base.__module__.startswith(("PySide6", "Shiboken", "builtins"))]


def _argumentCount(sender, signal: str) -> int:
    """How many arguments the signal hands over."""
    name, bracket, types = signal.partition("(")
    if bracket:
        return len([entry for entry in types.rstrip(")").split(",") if entry.strip()])
    meta = _getPlain(sender, "metaObject")()
    methods = [meta.method(index) for index in range(meta.methodCount())]
    return max(m.parameterCount() for m in methods if bytes(m.name()).decode() == name)


def _withArguments(count: int, call):
    """`call` as a function of exactly `count` arguments: PySide6 picks a signal's overload by that number."""
    if count == 0:
        return lambda: call()
    if count == 1:
        return lambda first: call(first)
    if count == 2:
        return lambda first, second: call(first, second)
    return lambda first, second, third: call(first, second, third)


def _argumentLimit(target) -> int | None:
    """How many positional arguments PythonQt passes at most; None where it cannot know (built-in functions)."""
    function = getattr(target, "__func__", target)
    if not inspect.isfunction(function):
        return None
    if function.__code__.co_flags & inspect.CO_VARARGS:
        return None
    return function.__code__.co_argcount - (1 if inspect.ismethod(target) else 0)


def _members(self) -> dict:
    """Property names to whether they are writable, and signal names, of the object's class."""
    meta = _getPlain(self, "metaObject")()
    key = meta.className() + str(meta.propertyCount()) + str(meta.methodCount())
    if key not in _metaObjects:
        properties = [meta.property(index) for index in range(meta.propertyCount())]
        methods = [meta.method(index) for index in range(meta.methodCount())]
        _metaObjects[key] = {
            "properties": {entry.name(): entry.isWritable() for entry in properties},
            "signals": {bytes(m.name()).decode() for m in methods if m.methodType() == m.MethodType.Signal},
        }
    return _metaObjects[key]


def _getAttribute(self, name):
    if name.startswith("_") or name == "metaObject":
        return _getPlain(self, name)
    name = _ALIASES.get(name, name)
    if name in _ADDED:
        return _added(self, name)
    kind = type(self)
    names.check(kind, name)
    if any(name in base.__dict__ for base in _pythonBases(kind)):
        return _plain(self, name)
    members = _members(self)
    if name in members["properties"] and (id(self), name) not in _reading:
        _reading.add((id(self), name))  # Qt may look for a method of this name while it reads the property
        try:
            return _getPlain(self, "property")(name)
        finally:
            _reading.discard((id(self), name))
    if name in members["signals"]:
        return Signal(self, name)
    if "_" in name and name.lower() == name and name not in ("exec_", "print_"):
        raise AttributeError(f"{kind.__name__} object has no attribute {name!r}")  # PySide6's snake_case
    return _getPlain(self, name)


def _setAttribute(self, name, value):
    name = _ALIASES.get(name, name)
    if name.startswith("_") or isinstance(value, QtCore.SignalInstance):  # PySide6 keeps its signals there
        _getPlain(self, "__dict__")[name] = value
        return
    if loading and name not in _members(self)["properties"]:
        return  # PySide6's loader of .ui files hangs the children on the widget as Python attributes
    names.check(type(self), name)
    writable = _members(self)["properties"].get(name)
    if writable is None:
        raise AttributeError(
            f"{type(self).__name__}.{name} is not a property; new attributes cannot be created on C++ objects."
        )
    if not writable:
        raise AttributeError(f"{type(self).__name__}.{name} is read only.")
    if name == "toolTip" or isinstance(_getPlain(self, "property")(name), str):
        value = "" if value is None else str(value)
    _getPlain(self, "setProperty")(name, value)


def _added(self, name):
    """Members that PythonQt adds to each QObject, or whose arguments differ from PySide6's."""
    if name == "connect":
        return lambda signal, target, slot=None: connect(self, signal, target, slot)
    if name == "disconnect":
        return lambda signal, target=None, slot=None: disconnect(self, signal, target, slot)
    if name == "className":
        return lambda: names.className(type(self))
    if name == "isWidgetType":
        return lambda: isinstance(self, QtWidgets.QWidget)
    if name == "delete":
        return lambda: _getPlain(self, "deleteLater")()
    return _getPlain(self, name)


def _plain(self, name):
    """A member that a Python class defines: signals in their PythonQt form, everything else as it is."""
    value = _getPlain(self, name)
    return Signal(self, name) if isinstance(value, QtCore.SignalInstance) else value
