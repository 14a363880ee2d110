"""Where the backend, its data and the models are, in the source tree and in an installed extension alike."""

from __future__ import annotations

from pathlib import Path

__all__ = ["backendFolder", "bundledModelsFolder", "defaultModelsFolder", "defaultRunsFolder", "resourcesFolder"]


def backendFolder() -> Path:
    """The folder that holds the package `invres`: it goes into PYTHONPATH of the backend's process.

    Raises FileNotFoundError, in a plain sentence, where the extension is incomplete.
    """
    tried = []
    # Slicer may have been pointed at the source tree through a link.
    for here in (Path(__file__).absolute(), Path(__file__).resolve()):
        moduleFolder = here.parents[1]
        # Installed it lies beside the module's file, in the source tree one level higher.
        for folder in (moduleFolder / "Backend", moduleFolder.parent / "Backend"):
            if (folder / "invres" / "__init__.py").is_file():
                return folder
            tried.append(str(folder))
    places = ", ".join(dict.fromkeys(tried))
    raise FileNotFoundError(
        f"The extension InvResSegment is incomplete: its folder Backend is none of {places}. "
        "Install the extension again."
    )


def resourcesFolder() -> Path:
    """The folder of bundled models and recipes; beside the backend, and not the module's own Resources."""
    return backendFolder().parent / "Resources"


def bundledModelsFolder() -> Path:
    """Model packages that came with the extension; may not exist."""
    return resourcesFolder() / "Models"


def defaultModelsFolder() -> Path:
    """Where imported and trained models go unless another folder was chosen; may not exist yet."""
    return Path.home() / "InvResSegment" / "Models"


def defaultRunsFolder() -> Path:
    """Where fine-tunings work unless another folder was chosen; may not exist yet."""
    return defaultModelsFolder().with_name("Runs")
