"""Which names of Slicer, Qt, CTK and VTK the module's Python and .ui files use, read from the syntax alone."""

import ast
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["MODULE", "UsedNames", "usedNames", "wordsIn"]

MODULE = Path(__file__).resolve().parents[2] / "InvResSegment"
ROOTS = ("slicer", "qt", "ctk", "vtk")


@dataclass
class UsedNames:
    """dotted: names from a module on, like "slicer.util.loadUI", with the places of their use.

    members: attributes of other things, like "setMRMLScene". signals: signatures and slots in connections.
    ui: class -> names of its properties, signals and slots in .ui files. own: names that the module defines itself.
    modules: other modules that it imports.
    """

    dotted: dict[str, list[str]] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    signals: dict[str, list[str]] = field(default_factory=dict)
    ui: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)


def usedNames(folder: Path = MODULE) -> UsedNames:
    """Read every .py and .ui file below the folder."""
    used = UsedNames()
    for path in sorted(folder.rglob("*.py")):
        _Reader(path.relative_to(folder).as_posix(), used).visit(ast.parse(path.read_text(encoding="utf-8")))
    for path in sorted(folder.rglob("*.ui")):
        _readUi(path, used)
    return used


def wordsIn(folder: Path) -> set[str]:
    """Every identifier and word in the Python files of a folder."""
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return {word for text in texts for word in re.findall(r"[A-Za-z_]\w*", text)}


class _Reader(ast.NodeVisitor):
    def __init__(self, name: str, used: UsedNames) -> None:
        self._name, self._used = name, used
        self._aliases: dict[str, str] = {}

    def _note(self, where: dict[str, list[str]], what: str, node: ast.AST) -> None:
        where.setdefault(what, []).append(f"{self._name}:{node.lineno}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            root = alias.name.partition(".")[0]
            if root in ROOTS:
                self._aliases[alias.asname or root] = alias.name if alias.asname else root
                if alias.name != root and root == "slicer":
                    self._note(self._used.dotted, alias.name, node)
            else:
                self._used.modules.add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level or module.partition(".")[0].startswith("InvResSegment"):
            return
        for alias in node.names:
            if module.partition(".")[0] in ROOTS:
                self._aliases[alias.asname or alias.name] = f"{module}.{alias.name}"
                self._note(self._used.dotted, f"{module}.{alias.name}", node)
            else:
                self._used.modules.add(module)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = self._chain(node)
        if chain is None:
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                self._used.own.add(node.attr)
            else:
                self._note(self._used.members, node.attr, node)
            self.generic_visit(node)
        else:
            self._note(self._used.dotted, chain, node)

    def _chain(self, node: ast.AST) -> str | None:
        """ "slicer.util.loadUI" for an attribute of an imported module."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in self._aliases and parts:
            return ".".join([self._aliases[node.id], *parts])
        return None

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        first = node.args[0] if node.args else None
        if name in ("connect", "disconnect") and isinstance(first, ast.Constant) and isinstance(first.value, str):
            self._note(self._used.signals, first.value, node)
        if name in ("getattr", "hasattr") and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            chain = self._chain(ast.Attribute(value=node.args[0], attr=str(node.args[1].value), ctx=ast.Load()))
            if chain is not None:
                self._note(self._used.dotted, chain + "?", node)  # asked for, not taken for granted
        for keyword in node.keywords:
            self._used.own.add(keyword.arg or "")
        self.generic_visit(node)

    def visit_FunctionDef(self, node) -> None:
        self._used.own.add(node.name)
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        self._used.own.update(argument.arg for argument in every)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._used.own.add(node.name)
        for line in node.body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            self._used.own.update(target.id for target in targets if isinstance(target, ast.Name))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._used.own.update(target.id for target in node.targets if isinstance(target, ast.Name))
        self.generic_visit(node)


def _readUi(path: Path, used: UsedNames) -> None:
    root = ElementTree.parse(path).getroot()
    classes = {node.get("name"): node.get("class") for node in root.iter("widget")}
    used.own.update(name for name in classes if name)

    def note(kind: str | None, name: str) -> None:
        used.ui.setdefault(kind or "", {}).setdefault(name, []).append(path.name)

    for node in (*root.iter("widget"), *root.iter("layout"), *root.iter("spacer")):
        kind = node.get("class") or "QSpacerItem"
        used.ui.setdefault(kind, {})
        for entry in node.findall("property"):
            if entry.get("stdset") != "0" and not (node.tag == "layout" and entry.get("name", "").endswith("Margin")):
                note(kind, entry.get("name") or "")
    for entry in root.iter("connection"):
        note(classes[entry.findtext("sender")], entry.findtext("signal") or "")
        note(classes[entry.findtext("receiver")], entry.findtext("slot") or "")
