"""What all commands share: speaking to a person, finding models and recipes, common checks."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from . import InvresError
from .events import JsonReporter, Reporter
from .modelpackage import ModelPackage, bundled_models_dir, find_package

__all__ = [
    "check_sizes",
    "package_named",
    "parse_bytes",
    "recipes_dir",
    "say",
    "segmenter_named",
    "spread",
    "user_models_dir",
]


def recipes_dir() -> Path:
    """The named recipes that come with InvResSegment."""
    return bundled_models_dir().parent / "Recipes"


def user_models_dir() -> Path:
    """Where `models import` puts packages unless told otherwise."""
    return Path.home() / "InvResSegment" / "Models"


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
    if min(options.patch) < 1:
        raise InvresError(f"--patch must be three sizes of 1 voxel or more, got {options.patch}.")
    if vars(options).get("batch", 1) < 1:
        raise InvresError(f"--batch must be 1 or more, got {options.batch}.")


def parse_bytes(text: str) -> int:
    """8GB, 8GiB, 500MB or plain bytes; as on the boxes of graphics cards, a GB has 2^30 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmg])i?b?)?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise InvresError(f"An amount of memory is given as 8GB or 500MB, got {text!r}.")
    return round(float(match[1]) * 2 ** {None: 0, "k": 10, "m": 20, "g": 30}[match[2]])
