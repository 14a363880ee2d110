"""The Python that runs the backend: which one, its command line and its environment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import qt
import slicer
from slicer.i18n import tr as _

from . import Paths

__all__ = [
    "backendCommand",
    "backendEnvironment",
    "backendPython",
    "passOverLauncher",
    "pythonSlicer",
    "separatePython",
    "setSeparatePython",
]

_SEPARATE_PYTHON = "InvResSegment/PythonExecutable"
_WITHOUT_LAUNCHER = "InvResSegment/WithoutLauncher"


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
