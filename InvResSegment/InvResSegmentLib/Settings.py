"""What the panel remembers of this computer, in Slicer's settings (the scene's choices are in the parameter node)."""

import qt

from .Paths import defaultModelsFolder, defaultRunsFolder

__all__ = [
    "device",
    "modelsFolder",
    "packagesFolder",
    "runsFolder",
    "setDevice",
    "setModelsFolder",
    "setPackagesFolder",
    "setRunsFolder",
]

_DEVICE = "InvResSegment/Device"
_MODELS_FOLDER = "InvResSegment/ModelsFolder"
_RUNS_FOLDER = "InvResSegment/RunsFolder"
_PACKAGES_FOLDER = "InvResSegment/PackagesFolder"


def device() -> str:
    """The device to compute on, as the backend's `--device` takes it; "auto" until another was chosen."""
    return str(qt.QSettings().value(_DEVICE) or "auto")


def setDevice(name: str) -> None:
    """Remember the device."""
    qt.QSettings().setValue(_DEVICE, name)


def modelsFolder() -> str:
    """The folder of own models: the one that was chosen, or the default one."""
    return str(qt.QSettings().value(_MODELS_FOLDER) or defaultModelsFolder())


def setModelsFolder(path: str) -> None:
    """Remember the folder of own models; "" goes back to the default."""
    qt.QSettings().setValue(_MODELS_FOLDER, path)


def runsFolder() -> str:
    """The folder of fine-tunings: the one that was chosen, or the default one."""
    return str(qt.QSettings().value(_RUNS_FOLDER) or defaultRunsFolder())


def setRunsFolder(path: str) -> None:
    """Remember the folder of fine-tunings; "" goes back to the default."""
    qt.QSettings().setValue(_RUNS_FOLDER, path)


def packagesFolder() -> str:
    """The folder of packages (wheels) that is installed from; "" for the internet."""
    return str(qt.QSettings().value(_PACKAGES_FOLDER) or "")


def setPackagesFolder(path: str) -> None:
    """Remember the folder of packages; "" goes back to the internet."""
    qt.QSettings().setValue(_PACKAGES_FOLDER, path)
