"""Looks what a Python has of the packages that the backend needs, without needing any of them.

`python -m invres.probe` writes one JSON object a line to stdout: first {"event": "python", ...}, then
{"event": "importing", "name": ...} and {"event": "package", ...} for each package, at last {"event": "end"}. A package
that takes Python down when it is imported is the one that was last announced. With a folder as its argument it writes
{"event": "folder", ...} and {"event": "wheel", ...} for each wheel in it, and whether that fits this Python, instead.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any

__all__ = ["PACKAGES", "examine"]

# Distribution, the name that it is imported by, and what is required of it; a test holds this to pyproject.toml.
PACKAGES = (
    ("numpy", "numpy", ""),
    ("SimpleITK", "SimpleITK", ""),
    ("torch", "torch", ">=2.8,!=2.9.*"),
    ("scipy", "scipy", ""),
    ("scikit-image", "skimage", ""),
    ("safetensors", "safetensors", ""),
    ("pydicom", "pydicom", ""),
    ("psutil", "psutil", ""),
    ("memcnn", "memcnn", ""),  # last, as the panel does without: its failure must hide nothing
)
DRIVER_LIMIT_S = 10


def examine() -> Iterator[dict[str, Any]]:
    """The report of this Python, object by object."""
    folder = sysconfig.get_paths()["purelib"]
    yield {
        "event": "python",
        "version": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "machine": platform.machine(),
        "packages_folder": folder,
        "writable": os.access(folder, os.W_OK),
        "free_bytes": _free_bytes(folder),
        "long_paths": _long_paths(),
        "platforms": list(dict.fromkeys(tag.platform for tag in _supported_tags())),
    }
    for distribution, name, requirement in PACKAGES:
        yield {"event": "importing", "name": distribution}
        yield {"event": "package", **_package(distribution, name), "requirement": requirement}
    yield {"event": "end"}


def _package(distribution: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": distribution, "version": None, "imports": False, "present": False, "error": ""}
    try:
        found["version"] = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        pass
    except Exception as error:  # half a folder of metadata
        found["error"] = f"{type(error).__name__}: {error}"
    try:
        found["present"] = util.find_spec(name) is not None
        module = importlib.import_module(name)
        found["imports"] = True
        # A folder that pip left behind is imported as an empty namespace.
        if getattr(module, "__file__", None) is None:
            found["imports"], found["error"] = False, "Only an empty folder is left of it."
    except ModuleNotFoundError as error:
        if error.name != name:
            found["needs"] = (error.name or "").partition(".")[0]
            found["error"] = f"It needs {error.name}, which is not installed."
    except BaseException as error:  # a damaged package may do anything, also end Python
        found["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if name == "torch" and found["imports"]:
        found.update(_torch())
    return found


def _torch() -> dict[str, Any]:
    try:
        import torch

        cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        # A torch whose libraries are incomplete imports and fails here.
        torch.nn.functional.conv3d(torch.zeros(1, 1, 3, 3, 3), torch.zeros(1, 1, 3, 3, 3))
        found = {"build": torch.__version__, "cuda": torch.version.cuda, "cards": cards}
        if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
            found["idle_cards"] = _nvidia_cards()
        return found
    except Exception as error:
        return {"imports": False, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def _nvidia_cards() -> list[str]:
    """Names of the NVIDIA cards, as their driver tells them; [] where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "-L"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=DRIVER_LIMIT_S,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE)


def examine_folder(folder: str) -> Iterator[dict[str, Any]]:
    """The report of a folder of packages, which may be a share that takes its time, or has gone."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield {"event": "folder", "path": folder, "error": error.strerror or str(error)}
        return
    yield {"event": "folder", "path": folder, "error": ""}
    supported = frozenset(_supported_tags())
    utilities = _packaging("utils")
    for name in names if utilities else ():
        if not name.endswith(".whl"):
            continue
        try:
            distribution, version, _build, tags = utilities.parse_wheel_filename(name)
        except ValueError:
            continue
        fits = not supported.isdisjoint(tags)
        yield {"event": "wheel", "file": name, "name": distribution, "version": str(version), "fits": fits}


def _supported_tags() -> list[Any]:
    """The tags of wheels that fit this Python, the best first; [] where pip is missing."""
    library = _packaging("tags")
    return list(library.sys_tags()) if library else []


def _packaging(module: str) -> Any:
    """A module of `packaging`: pip's own copy, as pip decides in the end; None where there is none."""
    for library in ("pip._vendor.packaging", "packaging"):
        try:
            return importlib.import_module(f"{library}.{module}")
        except Exception:  # half a pip
            continue
    return None


def _free_bytes(folder: str) -> int | None:
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _long_paths() -> bool:
    """Whether paths may have more than 260 characters."""
    if os.name != "nt":
        return True
    try:
        registry: Any = importlib.import_module("winreg")
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return bool(registry.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:
        return False


def main() -> None:
    """Writes the report to stdout; what packages print goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n")
    os.dup2(2, 1)
    for entry in examine_folder(sys.argv[1]) if sys.argv[1:] else examine():
        stream.write(json.dumps(entry, ensure_ascii=True) + "\n")
        stream.flush()
    stream.close()


if __name__ == "__main__":
    main()
