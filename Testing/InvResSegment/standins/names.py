"""What real Slicer has of the classes that stand-ins exist for, read from slicer_names.json beside this folder."""

import functools
import json
from pathlib import Path

__all__ = ["available", "check", "className", "signalSignatures"]

qtProperties: dict[type, set[str]] = {}
"""Of Qt's own classes; filled before anything is created, because PySide6 lets go of the meta objects of classes."""

FILE = Path(__file__).resolve().parent.parent / "slicer_names.json"


@functools.cache
def _classes() -> dict:
    """Class name to {base, properties, signals, methods}: what every supported release has."""
    releases = json.loads(FILE.read_text(encoding="utf-8"))["releases"] if FILE.exists() else {}
    merged: dict = {}
    for index, release in enumerate(releases.values()):
        for name, entry in release["classes"].items():
            if index == 0:
                merged[name] = {key: value if key == "base" else set(value) for key, value in entry.items()}
            elif name in merged:
                for key in ("properties", "signals", "methods"):
                    merged[name][key] &= set(entry[key])
        for name in set(merged) - set(release["classes"]):
            del merged[name]
    return merged


def className(kind: type) -> str:
    """The C++ class that a Python class stands for."""
    return getattr(kind, "_standsFor", kind.__name__)


def available() -> bool:
    """False until slicer_names.json has been collected for the first time: then nothing can be refused."""
    return bool(_classes())


def check(kind: type, name: str) -> None:
    """Raise AttributeError when a stand-in is asked for a member that the real class does not have in Python."""
    base = getattr(kind, "_standsFor", None)
    if base is None:
        return
    classes = _classes()
    while base in classes:
        entry = classes[base]
        if name in entry["properties"] or name in entry["methods"]:
            return
        if name in {signal.partition("(")[0] for signal in entry["signals"]}:
            return
        base = entry["base"]
    if not classes:
        return
    plain = next(entry for entry in kind.__mro__ if entry.__module__.startswith("PySide6"))
    if not hasattr(plain, name) and name not in qtProperties[plain]:
        raise AttributeError(f"{className(kind)} has no {name!r} that Python can reach in every supported Slicer.")


def signalSignatures(kind: type) -> set:
    """Signatures of the signals that a stand-in's class and its bases add to Qt's; empty for Qt's own classes."""
    base, classes, found = getattr(kind, "_standsFor", None), _classes(), set()
    while base in classes:
        found |= classes[base]["signals"]
        base = classes[base]["base"]
    return found
