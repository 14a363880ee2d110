"""What is missing, in words; what is installed and what never; the child that looks; the report without names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import standins

standins.install()

import qt  # noqa: E402
import slicer  # noqa: E402
from InvResSegmentLib import Paths  # noqa: E402
from InvResSegmentLib.BackendPython import (  # noqa: E402
    backendCommand,
    backendEnvironment,
    backendPython,
    passOverLauncher,
    pythonSlicer,
    separatePython,
    setSeparatePython,
)
from InvResSegmentLib.Dependencies import Dependencies  # noqa: E402
from InvResSegmentLib.Diagnostics import diagnosticReport, withoutPersonalData  # noqa: E402
from InvResSegmentLib.Requirements import (  # noqa: E402
    TORCH_REQUIREMENT,
    constraints,
    failureHint,
    installationAdvice,
    installationSteps,
    judge,
    satisfies,
)

NAMES = ("numpy", "SimpleITK", "torch", "scipy", "scikit-image", "safetensors", "pydicom", "psutil", "memcnn")
PYTHON = {
    "event": "python",
    "version": "3.12.10",
    "executable": "/opt/Slicer/bin/python-real",
    "system": "Linux-6.1.0-x86_64-with-glibc2.36",
    "machine": "x86_64",
    "packages_folder": "/opt/Slicer/lib/Python/lib/python3.12/site-packages",
    "writable": True,
    "free_bytes": 10**11,
    "long_paths": True,
}


def package(name, version="1.0", imports=True, **more):
    requirement = ">=2.8,!=2.9.*" if name == "torch" else ""
    version = "2.10.0+cu126" if name == "torch" and version == "1.0" else version
    entry = {"event": "package", "name": name, "version": version, "imports": imports, "present": True, "error": ""}
    return {**entry, "requirement": requirement, **more}


def report(python=PYTHON, end=True, **changes):
    """A probe's report in which everything is there but for the changes: name=None leaves a package out."""
    entries = [dict(python)]
    for name in NAMES:
        change = changes.get(name.replace("-", "_"), {})
        entries.append({"event": "importing", "name": name})
        if change is None:
            return entries
        entries.append(package(name, **change))
    return [*entries, {"event": "end"}] if end else entries


BACKEND = Paths.backendFolder()
MISSING = {"version": None, "imports": False, "present": False}


# --- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "good"),
    [
        *[(version, True) for version in ("2.8.0", "2.8", "2.8.0+cu126", "2.10.0", "2.13.0+cpu", "3.0", "2.10.0rc1")],
        *[(version, False) for version in ("2.7.1", "2.9.0", "2.9.1+cu128", "2.9", "1.13", "0", "")],
    ],
)
def test_torch_2_9_is_banned_and_2_8_the_least(version, good):
    assert satisfies(version, ">=2.8,!=2.9.*") is good


@pytest.mark.parametrize(
    ("version", "requirement", "good"),
    [
        ("1.2", "", True),
        ("1.2", "==1.2.0", True),
        ("1.2.3", "==1.2.*", True),
        ("1.10", ">1.9,<2", True),
        ("2", "<=1.9", False),
    ],
)
def test_requirements_are_compared_by_number(version, requirement, good):
    assert satisfies(version, requirement) is good
    with pytest.raises(ValueError, match="no requirement"):
        satisfies("1.0", "~=1.0")


# --- the preflight in words -----------------------------------------------------------------------------------------


def test_everything_there_is_ready():
    found = judge(report(torch={"build": "2.10.0+cu126", "cards": ["NVIDIA A"]}), 0)
    assert found.ready and found.sentences == () and found.blockers == () and installationSteps(found) == []
    assert (found.torchBuild, found.cards, found.pythonVersion) == ("2.10.0+cu126", ("NVIDIA A",), "3.12.10")


@pytest.mark.parametrize(
    ("changes", "sentence", "state"),
    [
        ({"torch": MISSING}, "torch is not installed.", "missing"),
        ({"torch": {"version": "2.9.1+cu128"}}, "torch 2.9.1+cu128 is much too slow for 3D networks", "outdated"),
        ({"torch": {"version": "2.4.0"}}, "torch 2.4.0 does not fit; >=2.8,!=2.9.* is needed.", "outdated"),
        (
            {"torch": {"imports": False, "error": "OSError: [WinError 126] c10.dll"}},
            "torch is only half installed: OSError: [WinError 126] c10.dll.",
            "broken",
        ),
        (
            {"torch": {"version": None, "imports": False, "error": "Only an empty folder is left of it."}},
            "half",
            "broken",
        ),
        (
            {"psutil": {"imports": False, "needs": "typing_extensions"}},
            "psutil needs typing_extensions, which is not",
            "incomplete",
        ),
        ({"numpy": {"imports": False, "error": "x"}}, "numpy, a part of Slicer itself, is damaged", "broken"),
    ],
)
def test_what_is_the_matter_is_said_in_a_sentence(changes, sentence, state):
    found = judge(report(**changes), 0)
    assert not found.ready
    assert len(found.sentences) == 1 and sentence in found.sentences[0] and found.sentences[0].endswith(".")
    assert found.package(next(iter(changes))).state == state


def test_a_package_that_takes_python_down_is_named():
    found = judge(report(torch=None), -11)
    assert not found.ready and found.package("torch").state == "broken"
    assert found.sentences == ("torch is damaged: Python crashes when it is imported (code -11).",)
    steps = installationSteps(found)
    assert [step.kind for step in steps] == ["uninstall", "clear", "torch", "packages"]
    assert steps[-1].names == ("scipy", "scikit-image", "safetensors", "pydicom", "psutil", "memcnn")


@pytest.mark.parametrize(
    "memcnn", [MISSING, {"imports": False, "needs": "torchvision"}, {"imports": False, "error": "OSError: x"}]
)
def test_memcnn_is_no_reason_for_not_being_ready_and_comes_along_with_others(memcnn):
    """Only `--engine memcnn` needs it, and torchvision is needed by nothing else."""
    found = judge(report(memcnn=memcnn), 0)
    assert found.ready and found.sentences == () and installationSteps(found) == []
    assert found.package("memcnn").state != "ok", "the report tells it all the same"
    names = {name for step in installationSteps(judge(report(memcnn=memcnn, psutil=MISSING), 0)) for name in step.names}
    assert {"psutil", memcnn.get("needs", "memcnn")} <= names


def test_a_memcnn_that_takes_python_down_hides_nothing():
    from invres.probe import PACKAGES

    assert PACKAGES[-1][0] == "memcnn", "the packages behind one that crashes are not seen"
    assert judge(report(memcnn=None), -11).ready
    assert not judge(report(psutil=None), -11).ready


def test_a_card_that_torch_cannot_use_is_told():
    torch = {"version": "2.10.0+cpu", "build": "2.10.0+cpu", "idle_cards": ["NVIDIA A"]}
    found = judge(report(torch=torch), 0)
    assert found.ready and found.idleCards == ("NVIDIA A",)
    assert "computes on the CPU only, and this computer has a GPU: NVIDIA A." in found.sentences[0]
    assert "Extensions Manager" in found.sentences[0]
    assert "pytorch.org" in judge(report(torch=torch), 0, separate=True).sentences[0]
    assert judge(report(torch={"idle_cards": []}), 0).sentences == ()


@pytest.mark.skipif(os.name == "nt", reason="writes a program for a shell")
def test_the_probe_asks_the_driver_for_cards(monkeypatch, tmp_path):
    from invres import probe

    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe._nvidia_cards() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA RTX A (UUID: GPU-1)'\necho 'GPU 1: Tesla B'\n")
    program.chmod(0o755)
    assert probe._nvidia_cards() == ["NVIDIA RTX A", "Tesla B"]
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    assert probe._nvidia_cards() == []


def test_a_python_that_does_not_start_blocks():
    found = judge([], 1, "No module named 'encodings'")
    assert found.blockers == ("The Python of the backend does not start (No module named 'encodings').",)
    assert not found.ready and not judge(report(end=False), 1).ready


@pytest.mark.parametrize(
    ("python", "sentence"),
    [
        ({"version": "3.9.10"}, "Python 3.9.10 does not fit"),
        ({"version": "3.14.0"}, "Python 3.14.0 does not fit"),
        ({"free_bytes": 10**9}, "The disk has 1.0 GB free"),
        ({"writable": False}, "Packages cannot be written to /opt"),
        ({"long_paths": False, "packages_folder": "C:\\" + "x" * 100}, "has 103 characters"),
        ({"system": "macOS-14.5-x86_64-i386-64bit"}, "choose an arm64 Python of your own under Setup"),
    ],
)
def test_what_would_make_installing_fail_is_said_before(python, sentence):
    found = judge(report({**PYTHON, **python}, torch=MISSING), 0)
    assert len(found.blockers) == 1 and sentence in found.blockers[0]
    ready = judge(report({**PYTHON, **python}), 0)
    assert ready.ready and bool(ready.blockers) is (python.get("version") is not None)


@pytest.mark.parametrize("machine", ["arm64", "x86_64"])
def test_only_intel_macs_and_only_without_torch_are_refused(machine):
    python = {**PYTHON, "system": "macOS-14.5-x86_64-i386-64bit", "machine": machine}
    assert bool(judge(report(python, torch={"version": "2.2.2"}), 0).blockers) is (machine == "x86_64")
    assert not judge(report(python, psutil=MISSING), 0).blockers, "a torch that is there may have been built by hand"
    assert not judge(report({**PYTHON, "machine": machine}, torch=MISSING), 0).blockers


@pytest.mark.parametrize(("free_bytes", "blocked"), [(5 * 10**8, True), (2 * 10**9, False)])
def test_a_small_package_needs_no_room_for_torch(free_bytes, blocked):
    found = judge(report({**PYTHON, "free_bytes": free_bytes}, psutil=MISSING), 0)
    assert bool(found.blockers) is blocked
    assert judge(report({**PYTHON, "free_bytes": free_bytes}, torch={"version": "2.9.0"}), 0).blockers


@pytest.mark.parametrize(
    ("system", "separate", "extension", "words"),
    [
        ("Linux-6.1", False, True, ["about 3 GB"]),
        ("Linux-6.1", False, False, ["about 3 GB", "whatever your GPU is", "Extensions Manager"]),
        ("Windows-11-10.0.22631", False, False, ["about 3 GB", "on the CPU only on Windows", "Extensions Manager"]),
        ("Windows-11-10.0.22631", True, False, ["about 3 GB", "pytorch.org"]),
        ("macOS-14.5-arm64", False, False, ["about 3 GB"]),
    ],
)
def test_which_torch_will_come_and_how_large_it_is_is_said_before(system, separate, extension, words):
    found = judge(report({**PYTHON, "system": system}, torch=MISSING), 0, separate=separate)
    said = installationAdvice(found, separate, extension)
    assert all(word in " ".join(said) for word in words)
    assert ("Extensions Manager" in " ".join(said)) is ("Extensions Manager" in words)
    small = judge(report({**PYTHON, "system": system}, psutil=MISSING), 0, separate=separate)
    assert installationAdvice(small, separate, extension) == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ERROR: No matching distribution found for torch>=2.8", "no version that fits"),
        ("ERROR: ResolutionImpossible: for help visit", "no version that fits"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for torch>=2.8",
            "Check the network, ",
        ),
        ("ERROR: [Errno 28] No space left on device", "Check the network and the free space"),
    ],
)
def test_the_network_is_not_blamed_where_no_version_fits(said, words):
    assert words in failureHint(said)


# --- what is installed ----------------------------------------------------------------------------------------------


def test_from_nothing_torch_comes_first_and_slicers_own_never():
    missing = {name.replace("-", "_"): MISSING for name in NAMES if name not in ("numpy", "SimpleITK", "scipy")}
    steps = installationSteps(judge(report(**missing), 0))
    assert [step.kind for step in steps] == ["torch", "packages"]
    assert steps[0].names == ("torch>=2.8,!=2.9.*", "torchvision")
    assert steps[1].names == ("scikit-image", "safetensors", "pydicom", "psutil", "memcnn")
    everything = {name.replace("-", "_"): MISSING for name in NAMES}
    names = installationSteps(judge(report(**everything), 0, separate=True), separate=True)[1].names
    assert {"numpy", "SimpleITK"} <= set(names), "a separate Python needs them"
    wanted = judge(report(**everything), 0)
    assert not {"numpy", "SimpleITK"} & {name for step in installationSteps(wanted) for name in step.names}


def test_what_installing_will_do_can_be_read_beforehand():
    dependencies = Dependencies()
    assert dependencies.planned == []
    dependencies.preflight = judge(report(torch={"version": "2.9.1"}), 0)
    assert [line[:2] for line in dependencies.planned] == ["\u2022 "] * len(installationSteps(dependencies.preflight))
    assert any("torch" in line for line in dependencies.planned)


@pytest.mark.parametrize("torch", [{"version": "2.9.1"}, {"imports": False, "error": "OSError: x"}])
def test_a_wrong_torch_goes_before_another_comes(torch):
    broken = {"imports": False, "needs": "torch"}
    steps = installationSteps(judge(report(torch=torch, memcnn=broken, psutil=broken), 0))
    assert [step.kind for step in steps] == ["uninstall", "clear", "torch"]
    assert steps[0].names == ("torch", "torchvision")


def test_a_broken_package_is_taken_out_first_and_what_lacks_another_gets_it():
    steps = installationSteps(judge(report(scipy={"imports": False, "error": "ImportError: x"}), 0))
    assert [(step.kind, step.names) for step in steps] == [
        ("uninstall", ("scipy",)),
        ("clear", ("scipy",)),
        ("packages", ("scipy",)),
    ]
    steps = installationSteps(judge(report(scikit_image={"imports": False, "needs": "networkx"}), 0))
    assert steps[0].names == ("scikit-image", "networkx")
    steps = installationSteps(judge(report(memcnn={"imports": False, "needs": "torchvision"}, psutil=MISSING), 0))
    assert [(step.kind, step.names) for step in steps] == [("packages", ("psutil", "torchvision"))]


def test_constraints_hold_what_is_there():
    assert constraints([("numpy", "2.4.6"), ("torch", "2.10.0+cu126"), ("x", "")]) == "numpy==2.4.6\ntorch==2.10.0\n"


# --- in Slicer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What Slicer's installers were asked for; settings are emptied."""
    done = []
    qt.QSettings().clear()
    monkeypatch.setattr(slicer.util, "pip_uninstall", lambda names: done.append(("uninstall", names)))

    def pip_ensure(requirements, constraints=None, prompt_install=True, requester=None, skip_in_testing=True):
        done.append(("ensure", requirements, Path(constraints).read_text(), requester))
        assert not prompt_install, "the panel has asked already"

    packaging = types.ModuleType("slicer.packaging")
    packaging.pip_ensure = pip_ensure
    monkeypatch.setitem(sys.modules, "slicer.packaging", packaging)

    class Logic:
        answer = object()

        def installTorch(self, askConfirmation=False, forceComputationBackend=None, torchVersionRequirement=None):
            done.append(("torch", askConfirmation, forceComputationBackend, torchVersionRequirement))
            return self.answer

    utilities = types.ModuleType("PyTorchUtils")
    utilities.PyTorchUtilsLogic = Logic
    monkeypatch.setitem(sys.modules, "PyTorchUtils", utilities)
    for name in ("torch", "torchvision"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield done
    qt.QSettings().clear()


def installed(monkeypatch, before, after=None):
    """Runs install on what was found before; the check behind it finds `after`."""
    dependencies, outcomes = Dependencies(), []
    dependencies.preflight = judge(before, 0)

    def check(onDone):
        dependencies.preflight = judge(report() if after is None else after, 0)
        onDone(dependencies.preflight)

    monkeypatch.setattr(dependencies, "check", check)
    dependencies.install(outcomes.append)
    standins.waitUntil(lambda: outcomes, 5)
    return dependencies, outcomes[0]


def test_torch_comes_by_the_pytorch_extension_and_the_rest_by_slicers_installer(monkeypatch, calls):
    dependencies, outcome = installed(monkeypatch, report(torch=MISSING, psutil=MISSING))
    assert outcome.state == "done" and not dependencies.installPending
    (what, asks, backend, requirement), (ensure, names, held, requester) = calls
    assert (what, asks, backend, requirement) == ("torch", False, None, ">=2.8,!=2.9.*")
    assert (ensure, names, requester) == ("ensure", ["psutil"], "InvResSegment")
    assert "numpy==1.0\n" in held and "SimpleITK==1.0\n" in held and re.search(r"^torch==[0-9.]+$", held, re.M)


def test_an_older_pytorch_extension_without_all_parameters_serves_too(monkeypatch, calls):
    class Logic:
        def installTorch(self, askConfirmation=False):
            calls.append(("old torch", askConfirmation))
            return object()

    sys.modules["PyTorchUtils"].PyTorchUtilsLogic = Logic
    assert installed(monkeypatch, report(torch=MISSING))[1].state == "done"
    assert calls == [("old torch", False)]


def test_slicer_5_10_and_no_pytorch_extension(monkeypatch, calls):
    monkeypatch.setitem(sys.modules, "slicer.packaging", None)
    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    texts = []

    def pip_install(arguments):
        texts.append(Path(arguments[-1]).read_text())
        calls.append(arguments[:-1])

    monkeypatch.setattr(slicer.util, "pip_install", pip_install)
    assert installed(monkeypatch, report(torch=MISSING, psutil=MISSING))[1].state == "done"
    assert calls == [["torch>=2.8,!=2.9.*", "torchvision", "--constraint"], ["psutil", "--constraint"]]
    assert all("numpy==1.0\n" in text and "SimpleITK==1.0\n" in text for text in texts)


def test_a_person_may_decline(monkeypatch, calls):
    sys.modules["PyTorchUtils"].PyTorchUtilsLogic.answer = None
    dependencies, outcome = installed(monkeypatch, report(torch=MISSING, psutil=MISSING))
    assert outcome.state == "declined" and [call[0] for call in calls] == ["torch"] and not dependencies.installPending


def test_a_failure_is_told_in_a_sentence(monkeypatch, calls):
    def fails(*_arguments, **_options):
        raise subprocess.CalledProcessError(1, "pip install")

    sys.modules["slicer.packaging"].pip_ensure = fails
    dependencies, outcome = installed(monkeypatch, report(psutil=MISSING))
    assert outcome.state == "failed" and outcome.message.startswith("The installation failed: ") and outcome.hint
    assert not dependencies.installPending

    def findsNothing(*_arguments, **_options):
        print("ERROR: No matching distribution found for psutil")  # as Slicer does, line by line
        raise subprocess.CalledProcessError(1, "pip install")

    sys.modules["slicer.packaging"].pip_ensure = findsNothing
    dependencies, outcome = installed(monkeypatch, report(psutil=MISSING))
    assert outcome.message == "The installation failed: No matching distribution found for psutil."
    assert "no version that fits" in outcome.hint and sys.stdout.write("") == 0
    outcome = installed(monkeypatch, report(torch=MISSING), after=report(torch={"imports": False, "error": "x"}))[1]
    assert outcome.state == "failed" and "half installed" in outcome.message


def test_a_torch_in_use_needs_a_restart_first_and_it_is_remembered(monkeypatch, calls):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    dependencies, outcome = installed(monkeypatch, report(torch={"version": "2.9.0"}))
    assert outcome.state == "restart" and calls == []
    assert dependencies.installPending and Dependencies().installPending, "it is kept in the settings"
    monkeypatch.delitem(sys.modules, "torch")
    dependencies, outcome = installed(monkeypatch, report(torch={"version": "2.9.0"}))
    assert outcome.state == "done" and [call[0] for call in calls] == ["uninstall", "torch"]
    assert not dependencies.installPending


def test_what_a_half_removed_torch_left_is_cleared(monkeypatch, calls, tmp_path):
    for name in ("torch/lib", "~orch/lib", "torchvision", "torchvision-0.2.dist-info", "torchmetrics", "numpy"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "torchvision-0.2.dist-info" / "RECORD").touch()
    python = {**PYTHON, "packages_folder": str(tmp_path)}
    installed(monkeypatch, report(python, torch={"version": None, "imports": False, "error": "x"}))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["numpy", "torchmetrics", "torchvision", "torchvision-0.2.dist-info"]


def test_nothing_is_begun_where_something_is_in_the_way(monkeypatch, calls):
    outcome = installed(monkeypatch, report({**PYTHON, "free_bytes": 1}, torch=MISSING))[1]
    assert outcome.state == "failed" and "free some space" in outcome.message and calls == []
    assert installed(monkeypatch, report())[1].state == "done" and calls == []


# --- the Python of the backend --------------------------------------------------------------------------------------


def test_slicers_python_is_found_on_the_path_or_beside_slicer(monkeypatch, calls, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: "/somewhere/PythonSlicer")
    assert backendCommand() == ["/somewhere/PythonSlicer", "-m", "invres", "worker"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="PythonSlicer"):
        pythonSlicer()
    beside = Path(slicer.app.slicerHome) / "bin" / ("PythonSlicer.exe" if os.name == "nt" else "PythonSlicer")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.touch()
    assert pythonSlicer() == str(beside)
    beside.unlink()


def test_the_environment_is_slicers_for_its_own_python_and_the_startup_one_for_another(monkeypatch, calls):
    monkeypatch.setenv("PYTHONHOME", "/opt/Slicer/lib/Python")
    monkeypatch.setenv("PYTHONPATH", "/opt/Slicer/bin/Python")
    monkeypatch.setenv("ITK_AUTOLOAD_PATH", "/opt/Slicer/lib/ITKFactories")
    own = backendEnvironment()
    assert "ITK_AUTOLOAD_PATH" not in own
    assert own["PYTHONHOME"] == "/opt/Slicer/lib/Python" and own["PYTHONUTF8"] == own["PYTHONUNBUFFERED"] == "1"
    assert own["PYTHONPATH"].split(os.pathsep) == [str(Paths.backendFolder()), "/opt/Slicer/bin/Python"]
    monkeypatch.setattr(slicer.util, "startupEnvironment", lambda: {"PATH": "/bin", "PYTHONHOME": "/left over"})
    setSeparatePython(sys.executable)
    other = backendEnvironment()
    assert other["PATH"] == "/bin" and "PYTHONHOME" not in other and other["PYTHONPATH"] == str(Paths.backendFolder())
    assert backendCommand("-V") == [sys.executable, "-V"]
    setSeparatePython("/not/there/python")
    with pytest.raises(FileNotFoundError, match="/not/there/python"):
        backendCommand()
    setSeparatePython("")
    assert separatePython() == ""


@pytest.fixture
def here(calls):
    """This very Python as the separate one."""
    setSeparatePython(sys.executable)
    yield
    setSeparatePython("")


def checked(dependencies, timeout=120):
    found = []
    dependencies.check(found.append)
    assert found == [], "it is told later, also where nothing can be started"
    standins.waitUntil(lambda: found, timeout)
    return found[0]


def test_a_child_looks_at_a_real_python(here):
    found = checked(Dependencies())
    assert found.ready, found.sentences
    assert found.python == sys.executable and {p.name for p in found.packages} == set(NAMES)
    assert found.torchBuild


def test_half_installed_packages_of_a_real_python_are_found(here, monkeypatch, tmp_path):
    (tmp_path / "psutil").mkdir()
    (tmp_path / "memcnn.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "psutil.py").write_text("raise OSError('a library cannot be loaded')")
    (tmp_path / "safetensors.py").write_text("import os; print('on the way'); os._exit(3)")
    monkeypatch.setattr(Paths, "backendFolder", lambda: f"{tmp_path}{os.pathsep}{BACKEND}")
    found = checked(Dependencies())
    assert not found.ready and found.package("safetensors").state == "broken"
    assert "Python crashes when it is imported (code 3)" in found.sentences[-1]
    (tmp_path / "safetensors.py").unlink()
    found = checked(Dependencies())
    states = {p.name: p.state for p in found.packages if p.state != "ok"}
    assert states["memcnn"] == "incomplete" and states["psutil"] == "broken"
    assert found.package("memcnn").needs == "a_package_that_is_not_there"
    assert "a library cannot be loaded" in found.package("psutil").sentence


def test_a_python_that_is_not_one_is_told(calls, tmp_path):
    setSeparatePython(str(Path(__file__)))
    found = checked(Dependencies(), 10)
    assert not found.ready and "does not start" in found.sentences[0]
    setSeparatePython(str(tmp_path / "gone"))
    assert "is not there" in checked(Dependencies(), 5).sentences[0]


def test_a_check_can_be_cancelled(here):
    dependencies, found = Dependencies(), []
    dependencies.check(found.append)
    dependencies.cancel()
    standins.pump(0.3)
    assert found == [] and not dependencies.busy


def test_a_separate_python_is_installed_into_by_pip_in_the_background(here, monkeypatch, tmp_path):
    (tmp_path / "pip.py").write_text(
        "import sys; print('pip', *sys.argv[1:])\nif 'psutil' in sys.argv: sys.exit('no network')"
    )
    monkeypatch.setattr(Paths, "backendFolder", lambda: f"{tmp_path}{os.pathsep}{BACKEND}")
    log, outcomes = [], []
    dependencies = Dependencies(log.append)
    dependencies.preflight = judge(report({**PYTHON, "executable": sys.executable}, torch=MISSING), 0)
    dependencies.install(outcomes.append)
    standins.waitUntil(lambda: outcomes, 120)
    assert outcomes[0].state == "done"
    assert "pip --disable-pip-version-check install torch>=2.8,!=2.9.* torchvision" in "".join(log)
    dependencies.preflight = judge(report(psutil=MISSING), 0)
    dependencies.install(outcomes.append)
    standins.waitUntil(lambda: len(outcomes) == 2, 30)
    assert outcomes[1].state == "failed" and outcomes[1].message == "Installing psutil failed: no network."


def test_the_probe_looks_for_what_the_package_requires():
    text = (BACKEND / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[1]
    wanted = {re.match(r"[\w-]+", line)[0]: line for line in re.findall(r'^ *"(.+)",', block, re.M)}
    sys.path.insert(0, str(BACKEND))
    from invres.probe import PACKAGES

    assert {name: name + requirement for name, _, requirement in PACKAGES} == wanted
    assert wanted["torch"] == f"torch{TORCH_REQUIREMENT}"


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "home", "wanted"),
    [
        ("/home/jane/x /home/jane", "/home/jane", "~/x ~"),
        ("C:\\Users\\Jane Doe\\y and c:/users/jane doe/z", "C:\\Users\\Jane Doe", "~\\y and ~/z"),
        ("/home/janet/x", "/home/jane", "~/x"),
        ("/Users/other/x", "/home/jane", "~/x"),
        ("built by jane.", "/home/jane", "built by <user>."),
        ("/opt/Slicer", "/root", "/opt/Slicer"),
    ],
)
def test_names_of_persons_are_left_out(text, home, wanted):
    assert withoutPersonalData(text, home) == wanted


def test_the_report_says_what_is_there_and_nothing_else(monkeypatch, calls):
    home = str(Path.home())
    python = {**PYTHON, "executable": f"{home}/Slicer/python-real", "packages_folder": f"{home}/Slicer/lib"}
    dependencies = Dependencies()
    assert "not examined yet" in dependencies.report()
    dependencies.preflight = judge(report(python, torch={"version": "2.9.0"}), 0)
    text = dependencies.report([("Device", "cuda:0")], ["crashed"])
    assert "Device: cuda:0" in text and "Last errors: crashed" in text and "torch 2.9.0: outdated" in text
    assert "Python of the backend\n  3.12.10  ~/Slicer/python-real" in text
    assert home not in text or len(home) < 2
    assert "Slicer: 5.12" in diagnosticReport(None, [("Slicer", "5.12")])


def test_a_launcher_that_keeps_its_input_to_itself_is_passed_over_from_then_on(monkeypatch, tmp_path):
    qt.QSettings().clear()
    monkeypatch.setattr(type(slicer.app), "slicerHome", str(tmp_path))
    program = tmp_path / "bin" / ("PythonSlicer.exe" if os.name == "nt" else "PythonSlicer")
    program.parent.mkdir()
    program.touch()
    monkeypatch.setenv("PATH", "")
    assert not passOverLauncher() and backendPython() == str(program)
    real = program.with_name(program.name.replace("PythonSlicer", "python-real"))
    real.touch()
    assert backendPython() == str(program)
    assert passOverLauncher() and backendPython() == str(real)
    assert not passOverLauncher(), "there is no third way"
    # Another Slicer may have another launcher; and a Python of one's own has none.
    monkeypatch.setattr(type(slicer.app), "slicerHome", str(tmp_path / "other"))
    assert not passOverLauncher()
    setSeparatePython(sys.executable)
    assert not passOverLauncher() and backendPython() == sys.executable
    qt.QSettings().clear()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python knows PYTHONSAFEPATH since 3.11")
def test_nothing_is_imported_from_the_folder_that_slicer_was_started_in(tmp_path):
    (tmp_path / "invres").mkdir()
    (tmp_path / "invres" / "__init__.py").write_text("raise SystemExit('the wrong one')", encoding="utf-8")
    command = [sys.executable, "-m", "invres", "--version"]
    done = subprocess.run(command, env=backendEnvironment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
