"""The Python that runs the backend: which one, what it lacks, installing and repairing it, by child processes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import qt
import slicer
from slicer.i18n import tr as _

from . import Paths, Settings
from .ChildProcess import ChildProcess
from .Diagnostics import diagnosticReport
from .Protocol import LineSplitter, TextTail, parsedEvent
from .Requirements import (
    TORCH_REQUIREMENT,
    TORCHVISION,
    Preflight,
    Step,
    constraints,
    failureHint,
    installationAdvice,
    installationSteps,
    judge,
)
from .WheelFolder import downloadCommand, folderFailure, fromFolder, wantedNames, withFolder

__all__ = [
    "Dependencies",
    "InstallOutcome",
    "backendCommand",
    "backendEnvironment",
    "backendPython",
    "passOverLauncher",
    "pythonSlicer",
    "separatePython",
    "setSeparatePython",
]

_SEPARATE_PYTHON = "InvResSegment/PythonExecutable"
_INSTALL_PENDING = "InvResSegment/InstallPending"
_WITHOUT_LAUNCHER = "InvResSegment/WithoutLauncher"
PROBE_LIMIT_MS = 300_000
FOLDER_LIMIT_MS = 60_000  # a share that has gone may let one wait for ever


@dataclass(frozen=True)
class InstallOutcome:
    """state: "done", "failed", "declined" or "restart" (Slicer must be restarted; then it goes on by itself)."""

    state: str
    message: str = ""
    hint: str = ""


# -------------------------------------------------------------------- which Python


def separatePython() -> str:
    """The Python that was chosen for the backend instead of Slicer's own; "" for Slicer's."""
    return str(qt.QSettings().value(_SEPARATE_PYTHON) or "")


def setSeparatePython(path: str) -> None:
    """Remembers the choice; "" goes back to Slicer's own Python."""
    qt.QSettings().setValue(_SEPARATE_PYTHON, str(path).strip())


def pythonSlicer() -> str:
    """Slicer's own Python as a program. Raises FileNotFoundError, in a plain sentence, where there is none."""
    beside = Path(slicer.app.slicerHome) / "bin" / ("PythonSlicer.exe" if os.name == "nt" else "PythonSlicer")
    found = shutil.which("PythonSlicer") or (str(beside) if beside.is_file() else "")
    if not found:
        raise FileNotFoundError(_("Slicer's Python (PythonSlicer) was not found."))
    return found


def passOverLauncher() -> bool:
    """To be called when PythonSlicer runs but hands nothing on that is written to it.

    True if from now on the Python that it launches is started in its place; this Slicer's environment, which is that
    of the launcher, is all that it needs. Remembered for this Slicer: another one may have another launcher.
    """
    if separatePython() or _launcherPassedOver() or not _launchedPython().is_file():
        return False
    qt.QSettings().setValue(_WITHOUT_LAUNCHER, slicer.app.slicerHome)
    return True


def _launcherPassedOver() -> bool:
    return qt.QSettings().value(_WITHOUT_LAUNCHER) == slicer.app.slicerHome and _launchedPython().is_file()


def _launchedPython() -> Path:
    return Path(slicer.app.slicerHome) / "bin" / ("python-real.exe" if os.name == "nt" else "python-real")


def backendPython() -> str:
    """The Python that the backend runs on. Raises FileNotFoundError where it is not there."""
    separate = separatePython()
    if separate and not Path(separate).is_file():
        raise FileNotFoundError(
            _("The Python that was chosen for the backend is not there: {path}.").format(path=separate)
        )
    if separate:
        return separate
    return str(_launchedPython()) if _launcherPassedOver() else pythonSlicer()


def backendCommand(*arguments: str) -> list[str]:
    """The command line of the worker, or of another verb or module option of the backend's package."""
    return [backendPython(), *(arguments or ("-m", "invres", "worker"))]


def backendEnvironment() -> dict[str, str]:
    """The whole environment of the backend's process.

    A Python that is not Slicer's gets the environment that Slicer itself was started in: with Slicer's own PYTHONHOME
    and libraries it would load the wrong files.
    """
    if separatePython():
        environment = dict(slicer.util.startupEnvironment())
        for name in ("PYTHONHOME", "PYTHONPATH"):
            environment.pop(name, None)
    else:
        environment = dict(os.environ)
    for name in ("ITK_AUTOLOAD_PATH", "SITK_AUTOLOAD_PATH"):
        environment.pop(name, None)  # Slicer's readers of its own scene, which would only warn of every file there
    paths = [str(Paths.backendFolder()), environment.get("PYTHONPATH") or ""]
    environment.update(
        PYTHONPATH=os.pathsep.join(filter(None, paths)),
        PYTHONSAFEPATH="1",  # no packages from the folder that Slicer happens to have been started in
        PYTHONUTF8="1",
        PYTHONUNBUFFERED="1",
        OMP_WAIT_POLICY=environment.get("OMP_WAIT_POLICY") or "PASSIVE",
    )
    return environment


# -------------------------------------------------------------------- what it has, and making it whole


class Dependencies:
    """Examines and installs what the backend needs. Nothing happens until it is asked for.

    onLog: gets what pip and the probe say.
    """

    def __init__(self, onLog: Callable[[str], None] | None = None) -> None:
        self._onLog = onLog
        self._child: ChildProcess | None = None
        self.preflight: Preflight | None = None

    @property
    def busy(self) -> bool:
        """Whether it examines or installs."""
        return self._child is not None

    def check(self, onDone: Callable[[Preflight], None]) -> None:
        """Imports every package in a child Python and tells what it found; takes seconds, blocks nothing.

        A check that is under way is begun anew, and its callback not called.
        """
        separate, folder = bool(separatePython()), Settings.packagesFolder()

        def onPackages(entries: list[dict], exitCode: int, lastWords: str) -> None:
            found = judge(entries, exitCode, lastWords, separate)
            # A folder that has gone, or is slow, is no matter to one who needs nothing from it.
            if folder and not found.ready and found.pythonVersion:
                self._probe([folder], FOLDER_LIMIT_MS, lambda told, *end: onFolder(found, told, *end))
            else:
                end(found)

        def onFolder(found: Preflight, entries: list[dict], _exitCode: int, lastWords: str) -> None:
            told = entries or [{"event": "folder", "path": folder, "error": lastWords}]
            end(withFolder(found, told, separate))

        def end(found: Preflight) -> None:
            self.preflight = found
            onDone(found)

        self._probe([], PROBE_LIMIT_MS, onPackages)

    @property
    def planned(self) -> list[str]:
        """What `install` would do now, a line a step; [] before the first check."""
        if self.preflight is None:
            return []
        return [f"\u2022 {step.text}" for step in installationSteps(self.preflight, bool(separatePython()))]

    @property
    def advice(self) -> list[str]:
        """What a person should know before `install`, in sentences; [] before the first check."""
        if self.preflight is None:
            return []
        withExtension = _pyTorchUtils() is not None
        return installationAdvice(self.preflight, bool(separatePython()), withExtension, Settings.packagesFolder())

    def downloadCommand(self, build: str) -> str:
        """What fills a folder of packages on a computer with internet, see `WheelFolder.downloadCommand`; "" before the
        first check."""
        if self.preflight is None:
            return ""
        return downloadCommand(self.preflight, bool(separatePython()), build)

    def install(self, onDone: Callable[[InstallOutcome], None]) -> None:
        """Does what the last `check` calls for, then checks again. Asks nothing: who calls it has shown `planned` and
        `advice`.

        In Slicer's own Python torch comes through the PyTorch extension where it is there, the rest by Slicer's own
        package installer, which shows its progress. In a separate Python pip runs in the background. Where a folder of
        packages is chosen, all comes from it by pip, which has to find everything there before anything is changed.
        """
        preflight = self.preflight
        if preflight is None:
            self.check(lambda _found: self.install(onDone))
            return
        if preflight.blockers:
            self._end(onDone, InstallOutcome("failed", preflight.blockers[0]))
            return
        separate = bool(separatePython())
        steps = installationSteps(preflight, separate)
        if not steps:
            self._end(onDone, InstallOutcome("done", _("Everything is installed.")))
            return

        def begin() -> None:
            if separate:
                self._installSeparately(steps, onDone)
            else:
                self._installInSlicer(steps, preflight, onDone)

        if Settings.packagesFolder():
            self._rehearse(steps, preflight, begin, onDone)
        else:
            begin()

    def cancel(self) -> None:
        """Ends a check, or an installation in a separate Python; its callback is not called."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    @property
    def installPending(self) -> bool:
        """Whether an installation was begun that a restart of Slicer interrupted."""
        return str(qt.QSettings().value(_INSTALL_PENDING) or "") == "1"

    @installPending.setter
    def installPending(self, pending: bool) -> None:
        qt.QSettings().setValue(_INSTALL_PENDING, "1" if pending else "")

    def report(self, facts: Sequence[tuple[str, str]] = (), errorCodes: Sequence[str] = ()) -> str:
        """The diagnostic report; facts: more lines of it. Has no patient data and no names."""
        about = [
            ("Slicer", f"{slicer.app.applicationVersion}, revision {slicer.app.revision}"),
            ("System", f"{slicer.app.os} {slicer.app.arch}"),
            ("Separate Python", separatePython() or "no"),
            ("Packages from a folder", "yes" if Settings.packagesFolder() else "no"),
            ("PyTorch extension", "yes" if _pyTorchUtils() is not None else "no"),
            ("Slicer's package installer", "yes" if _packaging() is not None else "no"),
        ]
        return diagnosticReport(self.preflight, [*about, *facts], errorCodes)

    # ---------------------------------------------------------------- inside

    def _probe(self, arguments: Sequence[str], limitMs: int, onDone: Callable[[list[dict], int, str], None]) -> None:
        """onDone: gets what the probe has told, its exit code, and its last words or why it has ended."""
        entries: list[dict] = []
        lines = LineSplitter()

        def onOutput(data: bytes) -> None:
            entries.extend(event for event in map(parsedEvent, lines.feed(data)) if event is not None)

        def onEnd(exitCode: int, reason: str, errors: TextTail) -> None:
            onDone(entries, exitCode, errors.lastLine or reason)

        self._run(("-m", "invres.probe", *arguments), onOutput, onEnd, limitMs)

    def _rehearse(
        self,
        steps: Sequence[Step],
        preflight: Preflight,
        begin: Callable[[], None],
        onDone: Callable[[InstallOutcome], None],
    ) -> None:
        """Lets pip find everything in the folder of packages, also what the packages need in their turn, without
        changing anything; then begins."""
        folder = Settings.packagesFolder()
        self._log(_("Looking whether all packages are in {folder}").format(folder=folder) + "\n")
        notes = tempfile.TemporaryDirectory()
        held = [] if separatePython() else ["--constraint", _written(_held(preflight, withTorch=False), notes.name)]
        tail = TextTail()

        def onEnd(exitCode: int, reason: str, errors: TextTail) -> None:
            notes.cleanup()
            # A pip before 22.2 rehearses nothing.
            if (exitCode == 0 and not reason) or "no such option" in errors.text:
                begin()
                return
            said = tail.text + errors.text
            message = folderFailure(said) or _("The packages in {folder} cannot be installed: {reason}.").format(
                folder=folder, reason=(errors.lastLine or reason).removeprefix("ERROR: ").rstrip(".")
            )
            onDone(InstallOutcome("failed", message, failureHint(said, folder)))

        pip = ["-m", "pip", "--disable-pip-version-check", "install", "--dry-run", *wantedNames(steps)]
        self._run([*pip, *fromFolder(folder), *held], lambda data: self._log(tail.feed(data)), onEnd)

    def _verify(self, onDone: Callable[[InstallOutcome], None]) -> None:
        def onChecked(found: Preflight) -> None:
            self.installPending = False
            if found.ready:
                onDone(InstallOutcome("done", _("Everything is installed and works.")))
            else:
                sentence = found.sentences[0] if found.sentences else _("The examination did not come to its end.")
                onDone(InstallOutcome("failed", sentence, _("Restart Slicer and press Install again.")))

        self.check(onChecked)

    def _installInSlicer(
        self, steps: Sequence[Step], preflight: Preflight, onDone: Callable[[InstallOutcome], None]
    ) -> None:
        if _mustRestartFirst(steps):
            self.installPending = True
            message = _("torch is in use by another module, so it cannot be replaced now.")
            self._end(onDone, InstallOutcome("restart", message, _("Restart Slicer; the installation then goes on.")))
            return
        # Finished by `_verify`; what a crash or a restart leaves is gone on with at the next start.
        self.installPending = True
        printed = _Printed(self._log)
        try:
            with contextlib.redirect_stdout(printed):
                for step in steps:
                    self._log(f"{step.text}\n")
                    if not self._doInSlicer(step, preflight):
                        self.installPending = False
                        self._end(onDone, InstallOutcome("declined", _("The installation was cancelled.")))
                        return
        except Exception as error:
            self.installPending = False
            self._end(onDone, _failed(error, printed.tail))
            return
        self._verify(onDone)

    def _doInSlicer(self, step: Step, preflight: Preflight) -> bool:
        """Does one step in Slicer's own Python; False if the person has declined."""
        if step.kind == "uninstall":
            slicer.util.pip_uninstall(" ".join(step.names))
        elif step.kind == "clear":
            _clearLeftovers(preflight, step.names)
        elif step.kind == "torch":
            return self._installTorch(step, preflight)
        else:
            _pipInstall(step.names, _held(preflight, withTorch=True))
        return True

    def _installTorch(self, step: Step, preflight: Preflight) -> bool:
        utilities, folder = _pyTorchUtils(), Settings.packagesFolder()
        if utilities is None or folder:
            if not folder:
                self._log(_("The PyTorch extension is not installed, so torch comes from PyPI.") + "\n")
            _pipInstall(step.names, _held(preflight, withTorch=False))
            return True
        logic = utilities.PyTorchUtilsLogic()
        wishes = {
            "askConfirmation": False,
            "forceComputationBackend": None,
            "torchVersionRequirement": TORCH_REQUIREMENT,
        }
        known = inspect.signature(logic.installTorch).parameters
        # It ends with importing torch; None means that a person has declined, whatever it was told about asking.
        return logic.installTorch(**{name: value for name, value in wishes.items() if name in known}) is not None

    def _installSeparately(self, steps: list[Step], onDone: Callable[[InstallOutcome], None]) -> None:
        step, *others = steps
        self._log(f"{step.text}\n")
        if step.kind == "clear":
            if self.preflight is not None:
                _clearLeftovers(self.preflight, step.names)
            self._next(others, onDone)
            return
        folder = Settings.packagesFolder()
        pip = ["-m", "pip", "--disable-pip-version-check"]
        removing = step.kind == "uninstall"
        pip += ["uninstall", "--yes", *step.names] if removing else ["install", *step.names, *fromFolder(folder)]

        def onEnd(exitCode: int, reason: str, errors: TextTail) -> None:
            if exitCode == 0 and not reason:
                self._next(others, onDone)
            else:
                said = (errors.lastLine or reason).removeprefix("ERROR: ").rstrip(".")
                message = _("{step} failed: {reason}.").format(step=step.text, reason=said)
                onDone(InstallOutcome("failed", message, failureHint(tail.text + errors.text, folder)))

        tail = TextTail()
        self._run(pip, lambda data: self._log(tail.feed(data)), onEnd)

    def _next(self, steps: list[Step], onDone: Callable[[InstallOutcome], None]) -> None:
        if steps:
            self._installSeparately(steps, onDone)
        else:
            self._verify(onDone)

    def _run(
        self,
        arguments: Sequence[str],
        onOutput: Callable[[bytes], None],
        onEnd: Callable[[int, str, TextTail], None],
        limitMs: int = 0,
    ) -> None:
        """Runs the backend's Python with arguments; onEnd gets exit code, reason and the end of its errors. limitMs:
        after which it is ended; 0 for none."""
        self.cancel()
        errors = TextTail()
        try:
            command, environment = backendCommand(*arguments), backendEnvironment()
        except OSError as error:
            message = str(error)
            qt.QTimer.singleShot(0, lambda: onEnd(-1, message, errors))
            return

        def ended(exitCode: int, reason: str) -> None:
            if self._child is child:
                self._child = None
                onEnd(exitCode, reason, errors)

        def tooLong() -> None:
            if self._child is child:
                child.kill()
                ended(-1, _("it took too long"))

        child = ChildProcess(
            command,
            environment,
            onOutput,
            lambda data: self._log(errors.feed(data)),
            # Later, as the program may fail to start before this one has returned.
            lambda exitCode, reason: qt.QTimer.singleShot(0, lambda: ended(exitCode, reason)),
        )
        self._child = child
        child.start()
        child.closeInput()
        if limitMs:
            qt.QTimer.singleShot(limitMs, tooLong)

    @staticmethod
    def _end(onDone: Callable[[InstallOutcome], None], outcome: InstallOutcome) -> None:
        qt.QTimer.singleShot(0, lambda: onDone(outcome))

    def _log(self, text: str) -> None:
        if self._onLog is not None and text:
            self._onLog(text)


def _mustRestartFirst(steps: Sequence[Step]) -> bool:
    """Whether a package that has to go is loaded in this very process, so that its files are held or half replaced."""
    leaving = {name for step in steps if step.kind == "uninstall" for name in step.names}
    return any(name.replace("-", "_") in sys.modules for name in leaving)


def _pyTorchUtils():
    """The module of the PyTorch extension, or None where the extension is not installed."""
    try:
        return importlib.import_module("PyTorchUtils")
    except ImportError:
        return None


def _packaging():
    """Slicer's package installer, which came with 5.12, or None."""
    try:
        module = importlib.import_module("slicer.packaging")
    except ImportError:
        return None
    return module if hasattr(module, "pip_ensure") else None


def _held(preflight: Preflight, withTorch: bool) -> list[tuple[str, str]]:
    """Packages with the version that pip must leave as it is."""
    held = [(package.name, package.version) for package in preflight.packages if package.state == "ok"]
    if withTorch:
        held = [entry for entry in held if entry[0] != "torch"]
        for name in ("torch", TORCHVISION):
            try:
                held.append((name, importlib.metadata.version(name)))
            except importlib.metadata.PackageNotFoundError:
                continue
    return held


def _pipInstall(names: Sequence[str], held: Sequence[tuple[str, str]]) -> None:
    """Installs into Slicer's own Python without replacing what it has."""
    importlib.invalidate_caches()
    folder, packaging = Settings.packagesFolder(), _packaging()
    with tempfile.TemporaryDirectory() as notes:
        path = _written(held, notes)
        if folder or packaging is None:  # pip_ensure takes packages and no options
            slicer.util.pip_install([*names, *fromFolder(folder), "--constraint", path])
            return
        packaging.pip_ensure(
            list(names), constraints=path, prompt_install=False, requester="InvResSegment", skip_in_testing=False
        )


def _written(held: Sequence[tuple[str, str]], folder: str) -> str:
    """The path of a constraints file in a folder."""
    path = Path(folder) / "constraints.txt"
    path.write_text(constraints(held), encoding="utf-8")
    return str(path)


def _clearLeftovers(preflight: Preflight, names: Sequence[str]) -> None:
    """Removes folders of packages that pip does not know any more: a half-installed one has lost its list of files."""
    python = next((entry for entry in preflight.report if entry["event"] == "python"), {})
    folder = Path(str(python.get("packages_folder") or ""))
    if not folder.is_absolute() or not folder.is_dir():
        return
    for name in names:
        module = {"scikit-image": "skimage"}.get(name, name)
        if (folder / module).is_dir() and not any(_distributions(folder, name)):
            shutil.rmtree(folder / module, ignore_errors=True)
        # What pip could not remove, it has renamed with a tilde in the place of the first letter.
        for rest in folder.glob(f"~{module[1:]}*"):
            shutil.rmtree(rest, ignore_errors=True)


def _distributions(folder: Path, name: str) -> list[Path]:
    """Metadata folders of a package with a list of its files."""
    pattern = f"{name.replace('-', '_')}-*.dist-info"
    return [entry for entry in folder.glob(pattern) if (entry / "RECORD").is_file()]


class _Printed:
    """Stands for standard output, where Slicer's installers print what pip says: passes it on and keeps its end."""

    LONGEST_TAIL = 4000

    def __init__(self, onText: Callable[[str], None]) -> None:
        self._stream, self._onText = sys.stdout, onText
        self.tail = ""

    def write(self, text: str) -> int:
        self._stream.write(text)
        self.tail = (self.tail + text)[-self.LONGEST_TAIL :]
        if text.strip():  # a line end comes by itself
            self._onText(text)
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _failed(error: Exception, printed: str) -> InstallOutcome:
    """printed: the end of what the installers have printed, which says more than their exceptions."""
    errors = [line.strip() for line in printed.splitlines() if line.lstrip().startswith("ERROR: ")]
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = (errors[-1].removeprefix("ERROR: ") if errors else lines[-1]).rstrip(".")
    message = _("The installation failed: {reason}.").format(reason=reason)
    return InstallOutcome("failed", message, failureHint(printed + str(error), Settings.packagesFolder()))
