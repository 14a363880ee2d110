"""Every name of Slicer, Qt and CTK that the module uses exists in each supported release (see collect_names.py)."""

import importlib
import json
import sys
import types
import unittest
import zlib
from pathlib import Path

import pytest
from used_names import MODULE, usedNames

NAMES = json.loads((Path(__file__).parent / "slicer_names.json").read_text(encoding="utf-8"))["releases"]
MEMBERS_OF_SOME = {"pip_ensure"}
"""Of slicer.packaging, which came with 5.12; without it the module falls back on slicer.util.pip_install."""
ON_WINDOWS = {"windll", "kernel32", "OpenProcess", "GetExitCodeProcess", "GetProcessTimes", "CloseHandle"}
ON_WINDOWS |= {"locking", "LK_NBLCK", "LK_UNLCK"}
"""Of ctypes and msvcrt there."""
HINT = "Misspelt, or new: then run collect_names.py with the lists of names."


@pytest.fixture(scope="module")
def used():
    return usedNames()


@pytest.mark.parametrize("release", NAMES)
def test_every_name_of_a_module_exists(used, release):
    unknown = {name: places for name, places in used.dotted.items() if name not in NAMES[release]["dotted"]}
    assert not unknown, HINT


@pytest.mark.parametrize("release", NAMES)
def test_every_signal_exists(used, release):
    assert not {name: places for name, places in used.signals.items() if name not in NAMES[release]["signals"]}, HINT


@pytest.mark.parametrize("release", NAMES)
def test_every_class_property_signal_and_slot_of_a_ui_file_exists(used, release):
    known = NAMES[release]["ui"]
    assert set(used.ui) <= {*known, "QSpacerItem"}, HINT
    unknown = {
        f"{kind}.{name}": files
        for kind, names in used.ui.items()
        for name, files in names.items()
        if kind != "QSpacerItem" and name not in known[kind]
    }
    assert not unknown, HINT


@pytest.mark.parametrize("release", NAMES)
def test_every_member_is_slicers_or_the_modules_own_or_pythons(used, release):
    known = used.own | set(NAMES[release]["members"]) | _pythonMembers(used.modules) | MEMBERS_OF_SOME | ON_WINDOWS
    assert not {name: places for name, places in used.members.items() if name not in known}, HINT


def test_what_only_some_releases_have_is_asked_for_first(used):
    for name in MEMBERS_OF_SOME:
        for place in used.members.get(name, ()):
            text = (MODULE / place.partition(":")[0]).read_text(encoding="utf-8")
            assert f'hasattr(module, "{name}")' in text and "except ImportError" in text, place


def test_nothing_third_party_is_imported(used):
    allowed = set(sys.stdlib_module_names) | {"numpy"}
    lazily = {"SampleData", "PyTorchUtils"}  # modules of Slicer and of the PyTorch extension, where they are there
    assert {name.partition(".")[0] for name in used.modules} <= allowed | lazily
    assert "imp" not in used.modules


def _pythonMembers(modules: set[str]) -> set[str]:
    """Attributes of Python's own types and of the modules that are imported, and of their classes."""
    kinds = [str, bytes, int, float, list, dict, set, tuple, BaseException, OSError, property, type, slice]
    kinds += [type(zlib.decompressobj()), unittest.TestCase]
    found = {name for kind in kinds for name in dir(kind)}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found |= set(dir(module))
        for value in (getattr(module, entry, None) for entry in dir(module)):
            if isinstance(value, (type, types.ModuleType)):
                found |= set(dir(value))
    return found
