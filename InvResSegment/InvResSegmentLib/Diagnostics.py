"""A report for asking for help: versions, packages and settings, and nothing about patients or persons."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from .Requirements import Preflight

__all__ = ["diagnosticReport", "withoutPersonalData"]


def diagnosticReport(
    preflight: Preflight | None,
    facts: Iterable[tuple[str, str]],
    errorCodes: Iterable[str] = (),
) -> str:
    """The report as text.

    facts: names and values about Slicer, the extension and its settings. errorCodes: of the last failures. Messages and
    logs are not in it: they name files, and files are named after patients.
    """
    lines = ["InvResSegment: diagnostic report", "(no patient data: no images, no file names, no log)", ""]
    lines += [f"{name}: {value}" for name, value in facts]
    lines += ["", "Last errors: " + (", ".join(errorCodes) or "none"), "", "Python of the backend"]
    if preflight is None:
        lines.append("  not examined yet")
    else:
        lines += [f"  {preflight.pythonVersion or 'does not start'}  {preflight.python}"]
        python = next((entry for entry in preflight.report if entry["event"] == "python"), {})
        for key in ("system", "machine", "packages_folder", "writable", "free_bytes", "long_paths"):
            if key in python:
                lines.append(f"  {key}: {python[key]}")
        for package in preflight.packages:
            lines.append(f"  {package.name} {package.version or '-'}: {package.state} {package.sentence}".rstrip())
        lines.append(
            f"  torch build: {preflight.torchBuild or '-'}; CUDA cards: {', '.join(preflight.cards) or 'none'}"
        )
        lines += [f"  ! {sentence}" for sentence in preflight.blockers]
    return withoutPersonalData("\n".join(lines) + "\n")


def withoutPersonalData(text: str, home: str | None = None) -> str:
    """The text with home folders shortened to ~ and the names of users left out."""
    home = home or os.fspath(Path.home())
    for spelling in {home, home.replace("\\", "/"), home.replace("/", "\\")}:
        if len(spelling) > 1:
            text = re.sub(re.escape(spelling) + r"(?![\w-])", "~", text, flags=re.IGNORECASE)
    text = re.sub(r"(?i)([a-z]:)?([/\\]+)(home|users)\2[^/\\\s:;,\"']+", "~", text)
    name = os.path.basename(home.rstrip("/\\"))
    if len(name) > 2 and name.lower() not in ("root", "home", "user", "users"):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<user>", text, flags=re.IGNORECASE)
    return text
