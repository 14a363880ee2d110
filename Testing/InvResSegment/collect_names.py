"""Writes slicer_names.json: the names that the module uses, as far as each supported Slicer release has them.

    python Testing/InvResSegment/collect_names.py FOLDER

FOLDER holds a JSON file per release (v5.10.0.json, v5.12.3.json, HEAD.json) with the keys qobjects, qt, vtk, python,
modules and decorators, as read from Slicer's, CTK's and PythonQt's sources. test_names.py compares the module with
the result, and the stand-ins refuse what is not in it.
"""

import json
import sys
from pathlib import Path

from used_names import UsedNames, usedNames, wordsIn

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "slicer_names.json"
RELEASES = {"5.10": "v5.10.0", "5.12": "v5.12.3", "main": "HEAD"}
STOOD_IN = ("ctkMessageBox", "qMRMLWidget", "qSlicerScriptedLoadableModuleWidget")
"""Classes that stand-ins exist for although the module does not name them."""
PARAMETER_NODE = {"parameterNodeWrapper"}
"""Of slicer.parameterNodeWrapper, which is a Python package of its own in all of these releases."""

PYTHON_MEMBERS = {"self", "editor", "connectParametersToGui", "disconnectGui"}
PYTHON_MEMBERS |= {"SampleDataLogic", "registerCustomSampleDataSource", "PyTorchUtilsLogic", "installTorch"}
"""Of Python classes that the lists leave out: module widgets, Segment Editor, parameter nodes, Sample Data, and of the
PyTorch extension."""


class Release:
    """What one release has."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        self.tag, self.qobjects, self.qt, self.vtk = data["tag"], data["qobjects"], data["qt"], data["vtk"]
        self.python, self.decorators = data["python"], data["decorators"]
        self.modules = {name.lower() for name in data["modules"]}
        self.everyMember = self._everyMember()

    def _everyMember(self) -> set[str]:
        found = _qtMembers()
        for kind in self.qobjects:
            for names in self.membersOf(kind).values():
                found |= {_name(name) for name in names}
        for entry in (*self.qt.values(), *self.vtk.values()):
            found |= {*entry.get("methods", ()), *entry.get("enums", ()), *entry.get("names", ())}
        for entry in self.decorators.values():
            found |= set(entry)
        for module in self.python.values():
            found |= set(module)
            for entry in module.values():
                found |= set(entry.get("cls", ()))
        return found | _vtkMembers() | PYTHON_MEMBERS

    def membersOf(self, kind: str) -> dict[str, list[str]]:
        """Properties, signals, methods and enum values that a class adds to its base."""
        entry = self.qobjects[kind]
        methods = [*entry["slots"], *entry["invokables"], *self.decorators.get(kind, ())]
        values = [value for names in entry["enums"].values() for value in names]
        return {"properties": list(entry["props"]), "signals": entry["signals"], "methods": [*methods, *values]}

    def chain(self, kind: str) -> list[str]:
        """The class and those of its bases that the list knows."""
        found = []
        while kind in self.qobjects:
            found.append(kind)
            kind = self.qobjects[kind]["base"]
        return found

    def hasMember(self, kind: str, name: str) -> bool:
        """Whether an object of this class has a property, signal, slot, method or enum value of this name."""
        kinds = self.chain(kind)
        for each in kinds:
            if name in {_name(member) for members in self.membersOf(each).values() for member in members}:
                return True
        base = self.qobjects[kinds[-1]]["base"] if kinds else kind
        return name in _qtChainMembers(base, self.qt)

    def hasDotted(self, dotted: str) -> bool:
        """Whether a name like "slicer.util.loadUI" exists."""
        root, *rest = dotted.removesuffix("?").split(".")
        if not rest:
            return True
        if root == "vtk":
            return _vtkHas(rest)
        if root == "ctk":
            return rest[0] in self.qobjects and (len(rest) == 1 or self.hasMember(rest[0], rest[1]))
        if root == "qt":
            return rest[0] in self.qt and (len(rest) == 1 or rest[1] in _qtChainMembers(rest[0], self.qt))
        first, *rest = rest
        if first in self.python:
            return not rest or rest[0] in self.python[first]
        if first == "parameterNodeWrapper":
            return set(rest[:1]) <= PARAMETER_NODE
        if first == "app":
            return not rest or self.hasMember("qSlicerApplication", rest[0])
        if first == "mrmlScene":
            return not rest or rest[0] in self.vtkMembers("vtkMRMLScene")
        if first == "modules":
            return not rest or rest[0] in self.modules | {"invressegment"}
        if first in self.qobjects:
            return not rest or self.hasMember(first, rest[0])
        if first in self.vtk:
            return not rest or rest[0] in self.vtkMembers(first)
        return first == "dicomDatabase"  # an object of ctkDICOMDatabase, there once a database is open

    def vtkMembers(self, kind: str) -> set[str]:
        """Methods and events of a MRML class and its bases."""
        found: set[str] = set()
        while kind in self.vtk:
            found |= set(self.vtk[kind]["names"])
            kind = self.vtk[kind]["base"]
        return found | _vtkMembers()


def collect(folder: Path) -> dict:
    """The content of slicer_names.json."""
    used = usedNames()
    words = (
        wordsIn(HERE) | wordsIn(HERE.parents[1] / "InvResSegment") | {n for names in used.ui.values() for n in names}
    )
    words |= {_name(word) for word in words}
    releases = {}
    for title, tag in RELEASES.items():
        release = Release(folder / f"{tag}.json")
        releases[title] = {
            "tag": release.tag,
            "dotted": sorted(name for name in used.dotted if release.hasDotted(name)),
            "members": sorted(name for name in used.members if name in release.everyMember),
            "signals": sorted(name for name in used.signals if _knownSignal(release, name)),
            "ui": _uiNames(release, used),
            "classes": _classes(release, used, words),
        }
    return {"releases": releases}


def _knownSignal(release: Release, signature: str) -> bool:
    every = {signal for kind in release.qobjects for signal in release.qobjects[kind]["signals"]}
    return signature in every or signature in _qtSignals()


def _uiNames(release: Release, used: UsedNames) -> dict[str, list[str]]:
    found = {}
    for kind, names in used.ui.items():
        if kind in release.qobjects or kind in release.qt:
            found[kind] = sorted(name for name in names if release.hasMember(kind, _name(name)))
    return found


def _classes(release: Release, used: UsedNames, words: set[str]) -> dict[str, dict]:
    parts = {part.removesuffix("?") for dotted in used.dotted for part in dotted.split(".")}
    wanted = {kind for kind in {*parts, *used.ui, *STOOD_IN} if kind in release.qobjects}
    found: dict[str, dict] = {}
    for kind in sorted({each for name in wanted for each in release.chain(name)}):
        members = release.membersOf(kind)
        names = {key: sorted({n for n in values if _name(n) in words}) for key, values in members.items()}
        names["methods"] = sorted({_name(name) for name in names["methods"]})
        found[kind] = {"base": release.qobjects[kind]["base"], **names}
    return found


def _name(signature: str) -> str:
    return signature.partition("(")[0].partition("=")[0]


# ---------------------------------------------------------------- Qt and VTK as they are installed here


def _qtClass(name: str):
    from PySide6 import QtCore, QtGui, QtWidgets

    return next((getattr(m, name) for m in (QtWidgets, QtGui, QtCore) if hasattr(m, name)), None)


def _qtChainMembers(kind: str, methods: dict) -> set[str]:
    """Methods and enums by PythonQt's list, properties and signals by the meta object, of a Qt class and its bases."""
    plain = _qtClass(kind)
    found: set[str] = set()
    for base in plain.__mro__ if plain is not None else ():
        entry = methods.get(base.__name__, {})
        found |= {*entry.get("methods", ()), *entry.get("enums", ())}
    meta = getattr(plain, "staticMetaObject", None)
    if meta is not None and hasattr(meta, "propertyCount"):
        found |= _membersOfMeta(meta)
    return found | {"connect", "disconnect"}


def _metaObjects():
    from PySide6 import QtCore, QtGui, QtWidgets

    for module in (QtCore, QtGui, QtWidgets):
        for name in dir(module):
            meta = getattr(getattr(module, name), "staticMetaObject", None)
            if meta is not None and hasattr(meta, "propertyCount"):
                yield meta


def _qtMembers() -> set[str]:
    """Properties, signals, slots and enum values of all Qt classes that have a meta object."""
    return {name for meta in _metaObjects() for name in _membersOfMeta(meta)}


def _membersOfMeta(meta) -> set[str]:
    found = {meta.property(index).name() for index in range(meta.propertyCount())}
    found |= {bytes(meta.method(index).name()).decode() for index in range(meta.methodCount())}
    for index in range(meta.enumeratorCount()):
        enumerator = meta.enumerator(index)
        found |= {enumerator.key(position) for position in range(enumerator.keyCount())}
    return found


def _qtSignals() -> set[str]:
    found = set()
    for meta in _metaObjects():
        methods = [meta.method(index) for index in range(meta.methodCount())]
        found |= {bytes(m.methodSignature()).decode() for m in methods if m.methodType() == m.MethodType.Signal}
    return found


_VTK_MEMBERS: set[str] = set()


def _vtkMembers() -> set[str]:
    """Methods of VTK's own classes and functions of its Python modules."""
    import vtk

    if not _VTK_MEMBERS:
        for name in dir(vtk):
            if name.startswith("vtk"):
                _VTK_MEMBERS.update(dir(getattr(vtk, name)))
    return _VTK_MEMBERS


def _vtkHas(parts: list[str]) -> bool:
    import vtk
    import vtk.util.numpy_support

    found = vtk
    for part in parts:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


if __name__ == "__main__":
    names = collect(Path(sys.argv[1]))
    OUTPUT.write_text(json.dumps(names, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{OUTPUT}: {OUTPUT.stat().st_size // 1024} KB")
