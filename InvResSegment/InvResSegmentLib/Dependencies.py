"""What the backend's Python lacks, and making it whole: examining, installing and repairing, by child processes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import qt
import slicer
from slicer.i18n import tr as _

from . import Settings
from .BackendPython import backendCommand, backendEnvironment, separatePython
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

__all__ = ["Dependencies", "InstallOutcome"]

_INSTALL_PENDING = "InvResSegment/InstallPending"
PROBE_LIMIT_MS = 300_000
FOLDER_LIMIT_MS = 60_000  # a share that has gone may let one wait for ever


@dataclass(frozen=True)
class InstallOutcome:
    """state: "done", "failed", "declined" or "restart" (Slicer must be restarted; then it goes on by itself)."""

    state: str
    message: str = ""
    hint: str = ""


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
        package installer, which shows its progress. In a separate Python, and where a folder of packages is chosen,
        pip runs in the background; all comes from the folder, and has to be found there before anything is changed.
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

        if not separate and _mustRestartFirst(steps):
            self.installPending = True
            message = _("torch is in use by another module, so it cannot be replaced now.")
            self._end(onDone, InstallOutcome("restart", message, _("Restart Slicer; the installation then goes on.")))
            return

        def begin() -> None:
            # Finished by `_verify`; what a crash or a restart leaves is gone on with at the next start.
            self.installPending = not separate
            run = self._installByPip if separate or Settings.packagesFolder() else self._installInSlicer
            run(steps, preflight, onDone)

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

        def onEnd(succeeded: bool, said: str, lastWords: str) -> None:
            # A pip before 22.2 rehearses nothing.
            if succeeded or "no such option" in said:
                begin()
                return
            message = folderFailure(said) or _("The packages in {folder} cannot be installed: {reason}.").format(
                folder=folder, reason=lastWords
            )
            onDone(InstallOutcome("failed", message, failureHint(said, folder)))

        pip = ["install", "--dry-run", *wantedNames(steps), *fromFolder(folder)]
        self._pip(pip, _held(preflight, withTorch=False), onEnd)

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
        utilities = _pyTorchUtils()
        if utilities is None:
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

    def _installByPip(
        self, steps: Sequence[Step], preflight: Preflight, onDone: Callable[[InstallOutcome], None]
    ) -> None:
        if not steps:
            self._verify(onDone)
            return
        step, *others = steps
        self._log(f"{step.text}\n")
        if step.kind == "clear":
            _clearLeftovers(preflight, step.names)
            self._installByPip(others, preflight, onDone)
            return
        folder = Settings.packagesFolder()

        def onEnd(succeeded: bool, said: str, lastWords: str) -> None:
            if succeeded:
                self._installByPip(others, preflight, onDone)
                return
            self.installPending = False
            message = _("{step} failed: {reason}.").format(step=step.text, reason=lastWords)
            onDone(InstallOutcome("failed", message, failureHint(said, folder)))

        if step.kind == "uninstall":
            self._pip(["uninstall", "--yes", *step.names], [], onEnd)
        else:
            held = _held(preflight, withTorch=step.kind == "packages")
            self._pip(["install", *step.names, *fromFolder(folder)], held, onEnd)

    def _pip(
        self, arguments: Sequence[str], held: Sequence[tuple[str, str]], onDone: Callable[[bool, str, str], None]
    ) -> None:
        """onDone: gets whether pip has done it, what it said, and its last words."""
        notes, tail = tempfile.TemporaryDirectory(), TextTail()

        def onEnd(exitCode: int, reason: str, errors: TextTail) -> None:
            notes.cleanup()
            lastWords = (errors.lastLine or reason).removeprefix("ERROR: ").rstrip(".")
            onDone(exitCode == 0 and not reason, tail.text + errors.text, lastWords)

        pip = ["-m", "pip", "--disable-pip-version-check", *arguments]
        pip += ["--constraint", _written(held, notes.name)] if held else []
        self._run(pip, lambda data: self._log(tail.feed(data)), onEnd)

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
    """Packages with the version that pip must leave as it is; none of a separate Python, which no one else uses."""
    if separatePython():
        return []
    importlib.invalidate_caches()
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
    packaging = _packaging()
    with tempfile.TemporaryDirectory() as notes:
        path = _written(held, notes)
        if packaging is None:
            slicer.util.pip_install([*names, "--constraint", path])
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
    return InstallOutcome("failed", message, failureHint(printed + str(error)))
