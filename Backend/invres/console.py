"""What all commands share: speaking to a person, finding models and recipes, common checks."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from . import InvresError
from .config import Recipe
from .configjson import nearest
from .events import JsonReporter, Reporter
from .interruption import postponed
from .modelpackage import ModelPackage, bundled_models_dir, find_package

__all__ = [
    "check_sizes",
    "load_torch",
    "package_named",
    "parse_bytes",
    "recipe_named",
    "recipes_dir",
    "say",
    "segmenter_named",
    "spread",
    "user_models_dir",
]


def recipes_dir() -> Path:
    """The named recipes that come with InvResSegment."""
    return bundled_models_dir().parent / "Recipes"


def recipe_named(name: str) -> Recipe:
    """A recipe by file or by name."""
    if name.endswith(".json") or Path(name).is_file():
        return Recipe.read(Path(name))
    path = recipes_dir() / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in recipes_dir().glob("*.json"))
        raise InvresError(
            f"There is no recipe {name!r}; the recipes are {', '.join(known)}, or give a JSON file.",
            hint=nearest(name, known),
        )
    return Recipe.read(path)


def user_models_dir() -> Path:
    """Where `models import` puts packages unless told otherwise."""
    return Path.home() / "InvResSegment" / "Models"


def load_torch(report: Reporter, module: str = "inference") -> None:
    """The first import takes seconds, and in a damaged installation it fails in many ways.

    module: of this package, whose imports are needed too. Raises KeyboardInterrupt afterwards for a signal meanwhile.
    """
    report.progress("start", 0, 1)
    try:
        with postponed():
            importlib.import_module("torch")
            importlib.import_module(f"{__package__}.{module}")
    except Exception as error:
        name = "torch" if "torch" not in sys.modules else getattr(error, "name", None)
        package = f"The package {name}" if name else "A package that is needed"
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InvresError(
            f"{package} is not installed or damaged: {reason}.",
            hint="Install it (in Slicer: Install in the Setup section of the panel), then try again.",
            code="missing_package",
        ) from None
    report.progress("start", 1, 1)


def say(report: Reporter, text: str) -> None:
    """The human form of a result; programs read the result event instead."""
    if not isinstance(report, JsonReporter):
        print(text)


def spread(values: dict[str, Any]) -> str:
    """Mean, standard deviation and number of cases, as far as a manifest has them."""
    mean, sd = (f"{value:.4f}" if isinstance(value := values.get(key), (int, float)) else "" for key in ("mean", "sd"))
    return f"{mean or 'not known'}{f' ± {sd}' if sd else ''} (n = {values.get('n', 'not known')})"


def package_named(model: str, folder: Path | None = None) -> ModelPackage:
    """A model by path or by name."""
    return find_package(model, [bundled_models_dir(), folder or user_models_dir()])


def segmenter_named(model: str) -> ModelPackage:
    """The same for a model that segments; raises InvresError for one that enhances images."""
    package = package_named(model)
    if package.manifest.enhancement is not None:
        raise InvresError(
            f"{package.name} enhances images; it does not segment them.", hint="Use `invres enhance` with this model."
        )
    return package


def check_sizes(options: argparse.Namespace) -> None:
    if options.patch is not None and min(options.patch) < 1:
        raise InvresError(f"--patch must be three sizes of 1 voxel or more, got {options.patch}.")
    if (batch := vars(options).get("batch")) is not None and batch < 1:
        raise InvresError(f"--batch must be 1 or more, got {batch}.")


def parse_bytes(text: str) -> int:
    """8GB, 8GiB, 500MB, or plain bytes from a MiB up; as on the boxes of graphics cards, a GB has 2^30 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmg])i?b?)?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise InvresError(f"An amount of memory is given as 8GB or 500MB, got {text!r}.")
    if match[2] is None and float(match[1]) < 2**20:
        raise InvresError(f"--vram needs a unit, as in 8GB; {text.strip()} would be bytes.", hint="Write GB or MB.")
    return round(float(match[1]) * 2 ** {None: 0, "k": 10, "m": 20, "g": 30}[match[2]])
