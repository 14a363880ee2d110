"""Installing from a folder of packages: real pip, small wheels, no network; what the folder lacks; how to fill one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import standins

standins.install()

import slicer  # noqa: E402
from InvResSegmentLib import BackendPython, Settings, WheelFolder  # noqa: E402
from InvResSegmentLib import Dependencies as module  # noqa: E402
from InvResSegmentLib.BackendPython import setSeparatePython  # noqa: E402
from InvResSegmentLib.Dependencies import Dependencies  # noqa: E402
from InvResSegmentLib.Requirements import failureHint, installationSteps, judge  # noqa: E402
from InvResSegmentLib.WheelFolder import TORCH_BUILDS, downloadCommand, withFolder  # noqa: E402
from panel_driver import loadedPanel, waitUntil  # noqa: E402
from standins import qtclasses  # noqa: E402
from test_dependencies import MISSING, NAMES, PYTHON, calls, report  # noqa: E402, F401

REPOSITORY = Path(__file__).resolve().parents[2]
# As much of torch as the probe asks for.
TORCH = """
zeros = lambda *shape: None
class cuda: device_count = staticmethod(lambda: 0)
class version: cuda = hip = None
class nn:
    class functional: conv3d = staticmethod(lambda *arguments: None)
"""
MODULES = {"scikit-image": "skimage"}
VERSIONS = {"torch": "2.13.0", "torchvision": "0.28.0"}
NEEDED = {"torch": ("sympy>=1.13",), "scikit-image": ("numpy",), "pydicom": ("torch>=2.8",)}


def wheel(folder: Path, name: str, version: str = "1.0", tag: str = "py3-none-any", needs=(), source: str = "") -> Path:
    """A wheel of one module in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    needed = "".join(f"Requires-Dist: {other}\n" for other in needs)
    files = {
        f"{MODULES.get(name, name)}/__init__.py": f"__version__ = {version!r}\n{source}",
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}",
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = f"{stem}.dist-info/RECORD"
    files[record] = "".join(f"{path},,\n" for path in (*files, record))
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with all that is needed, and with what is not to be taken."""
    place = tmp_path / "Päckchen für hier"
    for name in (*NAMES, "sympy", "torchvision"):
        source = TORCH if name == "torch" else ""
        wheel(place, name, VERSIONS.get(name, "1.13"), needs=NEEDED.get(name, ()), source=source)
    (place / "pydicom-9.0.tar.gz").write_bytes(b"a source distribution, which would have to be built")
    wheel(place, "psutil", "9.0", "cp27-cp27m-win32")
    return place


@pytest.fixture
def python(tmp_path, calls) -> Path:  # noqa: F811
    """A fresh Python that has pip and nothing else; settings are emptied."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip, which installs")
    venv.create(tmp_path / "fresh", with_pip=False, symlinks=os.name != "nt")
    packages = sitePackages(tmp_path / "fresh")
    # pip alone, where it lies, for installing it takes seconds.
    alone = tmp_path / "pip alone"
    alone.mkdir()
    place = Path(importlib.util.find_spec("pip").origin).parent
    (alone / "pip").symlink_to(place, target_is_directory=True)
    (packages / "pip.pth").write_text(str(alone), encoding="utf-8")
    return next(path for path in (tmp_path / "fresh").glob("*/python*") if path.is_file())


def sitePackages(environment: Path) -> Path:
    return next(path for path in environment.rglob("site-packages") if path.is_dir())


def installedInto(python: Path) -> dict[str, str]:
    """Names and versions of what a Python has."""
    found = (re.match(r"(.+)-(.+)\.dist-info", path.name) for path in sitePackages(python.parents[1]).iterdir())
    return {match[1]: match[2] for match in found if match}


def install(folder: Path, log: list[str]):
    Settings.setPackagesFolder(str(folder))
    dependencies, found, outcomes = Dependencies(log.append), [], []
    dependencies.check(found.append)
    standins.waitUntil(lambda: found, 60)
    dependencies.install(outcomes.append)
    standins.waitUntil(lambda: outcomes, 120)
    return dependencies, outcomes[0]


# --- real pip -------------------------------------------------------------------------------------------------------


def test_a_separate_python_gets_everything_from_the_folder(python, folder):
    setSeparatePython(str(python))
    log: list[str] = []
    dependencies, outcome = install(folder, log)
    assert (outcome.state, outcome.message) == ("done", "Everything is installed and works."), "".join(log)
    wanted = {name.replace("-", "_"): "1.13" for name in (*NAMES, "sympy")}
    assert installedInto(python) == wanted | VERSIONS
    assert dependencies.preflight.ready and "http" not in "".join(log)


def test_what_a_package_needs_in_its_turn_is_missed_before_anything_is_changed(python, folder, tmp_path, monkeypatch):
    setSeparatePython(str(python))
    with zipfile.ZipFile(wheel(tmp_path / "old", "torch", "2.9.1", source=TORCH)) as archive:
        archive.extractall(sitePackages(python.parents[1]))
    wheel(tmp_path / "elsewhere", "sympy", "1.13")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "elsewhere"))  # that folder alone means that
    next(folder.glob("sympy*")).unlink()
    log: list[str] = []
    dependencies, outcome = install(folder, log)
    assert dependencies.preflight.blockers == () and any(
        "Removing torch 2.9.1" in line for line in dependencies.planned
    )
    assert outcome.state == "failed"
    assert outcome.message == "The folder of packages lacks sympy>=1.13, which torch needs, or has none that fits."
    assert "fill it anew with the command under Setup" in outcome.hint
    assert installedInto(python) == {"torch": "2.9.1"}, "".join(log)


def test_slicers_own_python_gets_it_in_the_background_and_keeps_what_it_has(python, folder, monkeypatch):
    packages = sitePackages(python.parents[1])
    own = {"numpy": "1.13", "SimpleITK": "1.13"}
    for name in own:
        with zipfile.ZipFile(next(folder.glob(f"{name}-1.13*"))) as archive:
            archive.extractall(packages)
    wheel(folder, "numpy", "2.0")
    monkeypatch.setattr(BackendPython, "backendPython", lambda: str(python))
    log: list[str] = []
    dependencies, outcome = install(folder, log)
    assert outcome.state == "done" and not dependencies.installPending, "".join(log)
    assert {name: version for name, version in installedInto(python).items() if name in own} == own
    # And where that cannot be, nothing is done.
    wheel(folder, "scipy", "9.0", needs=("numpy>=2",))
    for entry in [*packages.glob("scipy*"), folder / "scipy-1.13-py3-none-any.whl"]:
        entry.rename(entry.with_name(f"away-{entry.name}"))
    outcome = install(folder, log)[1]
    assert outcome.state == "failed" and "packages that are here" in outcome.hint
    assert outcome.message.endswith("with what is here: scipy 9.0 depends on numpy>=2; numpy==1.13."), outcome
    assert installedInto(python)["numpy"] == "1.13" and "scipy" not in installedInto(python)


def test_the_options_of_the_command_let_real_pip_find_wheels_of_all_its_platforms(python, tmp_path):
    """pip compares tags letter by letter: what is not named is not found."""
    tags = [f"cp312-cp312-manylinux_2_{minor}_x86_64" for minor in (28, 27, 25, 24, 18, 17)]
    tags += [f"py3-none-{name}_x86_64" for name in ("manylinux2014", "manylinux2010", "manylinux1")]
    tags += ["cp310-abi3-manylinux2014_x86_64", "py2.py3-none-any"]
    names = [f"package{number}" for number, _tag in enumerate(tags)]
    for name, tag in zip(names, tags, strict=True):
        wheel(tmp_path / "index", name, tag=tag)
    command = downloadCommand(judge(linux(), 0), False, "cpu").split()
    options = command[command.index("--only-binary=:all:") :]
    offline = ["--no-index", "--find-links", tmp_path / "index", "--dest", tmp_path / "got"]
    done = subprocess.run(
        [python, "-m", "pip", "download", *options, *offline, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "got").iterdir())) == len(tags)


# --- what the names of the files tell -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda place: next(place.glob("pydicom*.whl")).unlink(), "The folder of packages lacks pydicom."),
        (
            lambda place: [
                next(place.glob("torch-2*")).rename(place / "torch-2.13.0-cp39-cp39-win32.whl"),
                next(place.glob("scipy-*")).rename(place / "scipy-1.13-cp39-none-any.whl"),
            ],
            "In the folder of packages torch, scipy are not for Python 3.",
        ),
        (
            lambda place: next(place.glob("torch-2*")).rename(place / "torch-2.9.1-py3-none-any.whl"),
            "In the folder of packages are other versions than are needed: torch 2.9.1.",
        ),
        (lambda place: [path.unlink() for path in place.glob("*.whl")], "No packages (files with the ending .whl)"),
        (lambda place: place.rename(place.with_name("gone")), "The folder of packages cannot be read (No such file"),
    ],
)
def test_what_the_folder_lacks_is_said_before_installing(python, folder, change, sentence):
    setSeparatePython(str(python))
    change(folder)
    dependencies, outcome = install(folder, [])
    assert outcome.state == "failed" and outcome.message.startswith(sentence), outcome.message
    assert outcome.message.endswith("or choose none to install from the internet.")
    assert dependencies.preflight.sentences[0] == outcome.message and installedInto(python) == {}


def probeOf(monkeypatch, tmp_path, inFolder: str, missing: str = "") -> Dependencies:
    """A backend whose probe finds all packages but one, and for a folder does something else."""
    entries = report(**({missing: MISSING} if missing else {}))
    (tmp_path / "invres").mkdir()
    (tmp_path / "invres/__init__.py").touch()
    (tmp_path / "invres/probe.py").write_text(
        f"import json, sys, time\nif sys.argv[1:]: {inFolder}\nfor one in {entries!r}: print(json.dumps(one))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(BackendPython.Paths, "backendFolder", lambda: str(tmp_path))
    setSeparatePython(sys.executable)
    Settings.setPackagesFolder("/gone")
    return Dependencies()


def test_a_ready_python_minds_no_folder(calls, monkeypatch, tmp_path):  # noqa: F811
    """A share that has gone must not hold up a panel that needs nothing from it."""
    dependencies, found = probeOf(monkeypatch, tmp_path, f"open({str(tmp_path / 'asked')!r}, 'w')"), []
    dependencies.check(found.append)
    standins.waitUntil(lambda: found, 60)
    assert found[0].ready and found[0].blockers == () and not (tmp_path / "asked").exists()


def test_a_folder_that_does_not_answer_is_given_up(calls, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(module, "FOLDER_LIMIT_MS", 500)
    dependencies, found = probeOf(monkeypatch, tmp_path, "time.sleep(60)", missing="pydicom"), []
    dependencies.check(found.append)
    standins.waitUntil(lambda: found, 30)
    assert len(found[0].blockers) == 1 and not dependencies.busy
    assert found[0].sentences[0].startswith("The folder of packages cannot be read (it took too long): /gone. Fill a")


@pytest.mark.parametrize(
    ("there", "torch", "others"),
    [
        ((), ("torch>=2.8,!=2.9.*",), ()),
        (("memcnn",), ("torch>=2.8,!=2.9.*",), ()),
        (("torchvision",), ("torch>=2.8,!=2.9.*", "torchvision"), ()),
        (("torchvision", "memcnn"), ("torch>=2.8,!=2.9.*", "torchvision"), ("memcnn",)),
    ],
)
def test_what_is_optional_comes_along_where_the_folder_has_it(there, torch, others):
    entries = [{"event": "folder", "path": "/there", "error": ""}]
    for name in ("torch", *there):
        entries.append({"event": "wheel", "file": f"{name}.whl", "name": name, "version": "2.13.0", "fits": True})
    python = {**PYTHON, "platforms": ["any"]}
    found = withFolder(judge(report(python, torch=MISSING, memcnn=MISSING), 0), entries, False)
    steps = {step.kind: step.names for step in installationSteps(found)}
    assert found.blockers == () and steps == {"torch": torch} | ({"packages": others} if others else {})


# --- the command that fills a folder --------------------------------------------------------------------------------


def linux(**changes):
    """A probe's report of Slicer on Linux with its own numpy and SimpleITK."""
    minors = range(39, 16, -1)
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in minors] + ["manylinux2014_x86_64", "linux_x86_64"]
    have = {name.replace("-", "_"): MISSING for name in NAMES if name not in ("numpy", "SimpleITK")}
    return report({**PYTHON, "platforms": platforms, **changes}, numpy={"version": "2.4.6"}, **have)


def test_the_command_is_for_this_python_and_fits_what_slicer_ships():
    command = downloadCommand(judge(linux(), 0), False, "cu130")
    assert " torch==2.13.0 torchvision numpy==2.4.6 scipy scikit-image " in command and "SimpleITK" not in command
    assert "--index-url https://download.pytorch.org/whl/cu130 --extra-index-url https://pypi.org/simple" in command
    assert "--python-version 3.12 --platform manylinux_2_28_x86_64 " in command and "2_29" not in command
    assert command.endswith("--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64")
    separate = downloadCommand(judge(linux(), 0, separate=True), True, "cpu")
    assert " numpy==2.4.6 SimpleITK" in separate and "/whl/cpu " in separate
    assert downloadCommand(judge(report(), 0), False, "cpu") == "", "a Python that has not told its tags"


@pytest.mark.parametrize(
    ("platforms", "end", "index"),
    [
        (["win_amd64"], " --python-version 3.12 --platform win_amd64", True),
        (["macosx_15_0_arm64", "macosx_15_0_universal2"], " --python-version 3.12 --platform macosx_15_0_arm64", False),
        (
            ["manylinux_2_17_aarch64", "manylinux2014_aarch64", "manylinux_2_16_aarch64"],
            "--platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64",
            True,
        ),
    ],
)
def test_each_system_has_its_platforms(platforms, end, index):
    command = downloadCommand(judge(linux(platforms=platforms), 0), False, "cpu")
    assert command.endswith(end) and ("pytorch.org" in command) is index


def test_the_torch_that_is_downloaded_is_the_one_that_is_tested():
    assert f"TORCH ?= torch=={WheelFolder.TORCH_DOWNLOADED}" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert f"pip download --dest packages torch=={WheelFolder.TORCH_DOWNLOADED} " in text
    assert all(f"`{build}`" in text for build in TORCH_BUILDS)


def test_the_way_without_internet_is_named_where_there_is_none():
    said = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\nERROR: No matching"
    assert "see Setup, Without internet" in failureHint(said)
    assert "Without internet" not in failureHint("ERROR: [Errno 28] No space left on device")


# --- the panel ------------------------------------------------------------------------------------------------------


def test_the_panel_looks_into_the_folder_remembers_it_and_saves_the_command(python, folder, tmp_path, monkeypatch):
    with loadedPanel(tmp_path / "models", python=str(python)) as loaded:
        panel = loaded.enter().panel
        ui = panel.ui
        waitUntil(lambda: not panel.setup.checking, 60)
        assert ui.offlineButton.collapsed and ui.installButton.enabled
        assert "/whl/cpu " in ui.commandEdit.text
        ui.torchBuildBox.currentIndex = 1
        assert "/whl/cu130 " in ui.commandEdit.text
        qtclasses.answers.append(str(tmp_path / "command.txt"))
        ui.saveCommandButton.click()
        assert (tmp_path / "command.txt").read_text(encoding="utf-8") == ui.commandEdit.text + "\n"
        (folder / "gone").mkdir()
        ui.packagesFolderEdit.currentPath = str(folder / "gone")
        waitUntil(lambda: not panel.setup.checking, 60)
        assert "No packages" in ui.setupNoticeText.text and not ui.installButton.enabled
        ui.packagesFolderEdit.currentPath = str(folder)
        waitUntil(lambda: not panel.setup.checking, 60)
        assert ui.installButton.enabled and str(folder) in panel.dependencies.advice[0]
        asked = []
        monkeypatch.setattr(slicer.util, "confirmOkCancelDisplay", lambda text, title: asked.append(text))
        ui.installButton.click()
        assert str(folder) in asked[0] and "nothing is downloaded" in asked[0]
    with loadedPanel(
        tmp_path / "models", python=str(python), settings={"InvResSegment/PackagesFolder": str(folder)}
    ) as loaded:
        panel = loaded.enter().panel
        assert not panel.ui.offlineButton.collapsed and panel.ui.packagesFolderEdit.currentPath == str(folder)
        waitUntil(lambda: not panel.setup.checking, 60)
