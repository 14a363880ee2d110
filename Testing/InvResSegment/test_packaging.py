"""The installed module: CMake names every file, and what it names works as it lands in an installed extension."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "InvResSegment"


def listed(variable: str) -> set[str]:
    """The files that InvResSegment/CMakeLists.txt names in a list."""
    text = (MODULE / "CMakeLists.txt").read_text(encoding="utf-8")
    body = re.search(rf"set\({variable}\n(.*?)\)", text, re.DOTALL).group(1)
    return {line.strip().replace("${MODULE_NAME}", "InvResSegment") for line in body.splitlines() if line.strip()}


def test_cmake_names_every_script():
    found = {path.relative_to(MODULE).as_posix() for path in MODULE.rglob("*.py")}
    assert listed("MODULE_PYTHON_SCRIPTS") == found


def test_cmake_names_every_resource():
    found = {path.relative_to(MODULE).as_posix() for path in (MODULE / "Resources").rglob("*") if path.is_file()}
    assert listed("MODULE_PYTHON_RESOURCES") == found


def test_the_lists_are_in_order():
    text = (MODULE / "CMakeLists.txt").read_text(encoding="utf-8")
    names = re.findall(r"^  InvResSegmentLib/(\S+)$", text, re.MULTILINE)
    assert names == sorted(names)


def test_the_modules_icon_is_the_extensions():
    ours = MODULE / "Resources" / "Icons" / "InvResSegment.png"
    assert ours.read_bytes() == (ROOT / "Resources" / "Icons" / "InvResSegment.png").read_bytes()


def test_the_modules_words_agree_with_the_catalogue():
    text = (MODULE / "InvResSegment.py").read_text(encoding="utf-8")
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    catalogue = json.loads((ROOT / "InvResSegment.json").read_text(encoding="utf-8"))
    homepage = re.search(r'EXTENSION_HOMEPAGE "(.*?)"', cmake).group(1)
    assert f'HOMEPAGE = "{homepage}"' in text
    assert f'"{catalogue["category"]}"' in text
    assert re.search(r'EXTENSION_CONTRIBUTORS "(.*?)"', cmake).group(1) in text


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of scripted modules as the install rules fill it, from a copy without anything that is not listed."""
    folder = tmp_path_factory.mktemp("Slicer 5.12") / "qt-scripted-modules"
    files = [(MODULE, name) for name in listed("MODULE_PYTHON_SCRIPTS") | listed("MODULE_PYTHON_RESOURCES")]
    backend = [path for path in (ROOT / "Backend").rglob("*.py") if "invres" in path.parts]
    backend += list((ROOT / "Backend" / "invres").rglob("*.json"))
    files += [(ROOT, path.relative_to(ROOT).as_posix()) for path in backend]
    files += [
        (ROOT, path.relative_to(ROOT).as_posix())
        for path in (ROOT / "Resources").rglob("*")
        if path.is_file() and not {"Screenshots", "Icons"} & set(path.parts)
    ]
    for source, name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / name)
    return folder


def test_the_backend_is_found_and_runs_from_an_installed_extension(installed):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import types; sys.modules.setdefault('slicer', types.ModuleType('slicer'))\n"
        "from InvResSegmentLib import Paths\n"
        "print(Paths.backendFolder())\n"
        "print(Paths.bundledModelsFolder())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(installed)], capture_output=True, text=True, check=True)
    backend, models = done.stdout.splitlines()
    assert Path(backend) == installed / "Backend"
    assert Path(models) == installed / "Resources" / "Models"
    environment = {**os.environ, "PYTHONPATH": backend, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "invres", "models", "list", "--json"]
    listing = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    assert json.loads(listing.stdout.splitlines()[-1])["event"] == "result"


def test_every_file_that_a_module_loads_by_name_is_listed():
    names = listed("MODULE_PYTHON_RESOURCES")
    for path in MODULE.rglob("*.py"):
        for name in re.findall(r'"((?:UI|Icons)/[^"]+)"', path.read_text(encoding="utf-8")):
            assert f"Resources/{name}" in names, f"{path.name} loads {name}"
