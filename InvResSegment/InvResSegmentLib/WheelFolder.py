"""A folder of packages to install from without internet: what it lacks for a Python, and the command that fills one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from slicer.i18n import tr as _

from .Requirements import OPTIONAL, TORCHVISION, Preflight, Step, constraints, installationSteps, satisfies

__all__ = [
    "TORCH_BUILDS",
    "TORCH_DOWNLOADED",
    "downloadCommand",
    "folderFailure",
    "fromFolder",
    "wantedNames",
    "withFolder",
]

# The one that is downloaded. Named with its version, because pip takes the newest of all indexes, and only beside an
# equal version does it take the build of pytorch.org (2.13.0+cu130) for the higher one.
TORCH_DOWNLOADED = "2.13.0"
TORCH_BUILDS = ("cpu", "cu130", "cu126")
"""Indexes of pytorch.org that have it: for the CPU, for NVIDIA cards from GTX 16 and RTX 20 on, and for older ones."""
# pip takes these tags as they are written: 2_28 does not stand for 2_27. torch needs 2_28, others have any below it.
OLDEST_GLIBC, NEWEST_GLIBC = 17, 28
PINNED = "The user requested (constraint) "  # pip's words for what is here and stays


def fromFolder(folder: str) -> list[str]:
    """The options with which pip installs from a folder and from nowhere else; [] for "", the internet."""
    if not folder:
        return []
    return ["--isolated", "--no-index", "--only-binary=:all:", "--find-links", folder]


def withFolder(preflight: Preflight, told: Sequence[dict], separate: bool) -> Preflight:
    """The preflight with what a folder of packages lacks, as far as the names of the files tell, as a blocker.

    told: what the probe says of the folder, first of it as a whole. What is optional and not in it is left out.
    """
    folder, *rest = told
    wheels = [entry for entry in rest if entry["event"] == "wheel"]
    leftOut = [name for name in (TORCHVISION, *OPTIONAL) if not _fitting(wheels, name)]
    if TORCHVISION in leftOut:
        leftOut += OPTIONAL
    found = dataclasses.replace(preflight, leftOut=tuple(dict.fromkeys(leftOut)))
    problem = _problem(folder, wheels, found, wantedNames(installationSteps(found, separate)))
    if not problem:
        return found
    way = _("Fill a folder with the command under Without internet, or choose none to install from the internet.")
    blocker = f"{problem} {way}"
    return dataclasses.replace(found, blockers=(blocker, *found.blockers), sentences=(blocker, *found.sentences))


def wantedNames(steps: Iterable[Step]) -> list[str]:
    """All that the steps of an installation ask pip for, as requirements."""
    return [name for step in steps if step.kind in ("torch", "packages") for name in step.names]


def downloadCommand(preflight: Preflight, separate: bool, build: str, folder: str = "packages") -> str:
    """The command line that fills a folder for this Python on a computer with internet and the same system; "" where
    this Python has not told which wheels fit it.

    build: one of `TORCH_BUILDS`; a Mac has one build only. What is here already is named with its version, so that
    what comes fits it.
    """
    platforms = _platforms(preflight.facts.get("platforms") or ())
    if not platforms:
        return ""
    parts = [f"python -m pip download --dest {folder} torch=={TORCH_DOWNLOADED} {TORCHVISION}"]
    for package in preflight.packages:
        # Nothing but Slicer's own SimpleITK will do, and nothing else depends on it.
        if package.name == "torch" or (package.name == "SimpleITK" and not separate):
            continue
        held = constraints([(package.name, package.version)]) if package.state == "ok" else ""
        parts.append(held.strip() or package.name)
    if not platforms[0].startswith("macosx"):
        parts += [f"--index-url https://download.pytorch.org/whl/{build}", "--extra-index-url https://pypi.org/simple"]
    parts += ["--only-binary=:all:", f"--python-version {_minor(preflight)}"]
    parts += [f"--platform {name}" for name in platforms]
    return " ".join(parts)


def folderFailure(said: str) -> str:
    """What pip has missed in a folder of packages, or what there does not go together, in a sentence; "" for others.

    said: what pip wrote, output and errors.
    """
    missed = re.search(r"that satisfies the requirement (\S+)(?: \(from (?!versions:)(\w+(?:[.-]\w+)*))?", said)
    if missed and missed[2]:
        return _("The folder of packages lacks {name}, which {other} needs, or has none that fits.").format(
            name=missed[1], other=missed[2]
        )
    if missed:
        return _("The folder of packages lacks {name}, or has none that fits.").format(name=missed[1])
    conflict = re.search(r"The conflict is caused by:\n((?: +\S.*\n)+)", said.replace("\r", ""))
    if conflict is None:
        return ""
    reasons = "; ".join(line.strip() for line in conflict[1].splitlines())
    return _(
        "What is in the folder of packages does not go together with itself or with what is here: {reasons}."
    ).format(reasons=reasons.replace(PINNED, ""))


def _problem(folder: dict, wheels: Sequence[dict], preflight: Preflight, wanted: Iterable[str]) -> str:
    path = str(folder["path"])
    if folder.get("error"):
        return _("The folder of packages cannot be read ({reason}): {folder}.").format(
            reason=folder["error"], folder=path
        )
    if not preflight.facts.get("platforms"):  # a Python without pip, which tells by itself that it is missing
        return ""
    if not wheels:
        return _("No packages (files with the ending .whl) are in {folder}.").format(folder=path)
    missing, unfit, outdated, example = [], [], [], ""
    for requirement in wanted:
        name, wish = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        there = [wheel for wheel in wheels if wheel["name"] == _canonical(name)]
        fitting = _fitting(wheels, name)
        if not there:
            missing.append(name)
        elif not fitting:
            unfit.append(name)
            example = example or str(there[-1]["file"])
        elif not any(satisfies(str(wheel["version"]), wish) for wheel in fitting):
            outdated.append(f"{name} {fitting[-1]['version']}")
    said = []
    if missing:
        said.append(_("The folder of packages lacks {names}.").format(names=", ".join(missing)))
    if unfit:
        said.append(
            _("In the folder of packages {names} are not for Python {version} on {system} ({example}).").format(
                names=", ".join(unfit), version=_minor(preflight), system=_system(preflight), example=example
            )
        )
    if outdated:
        said.append(
            _("In the folder of packages are other versions than are needed: {names}.").format(
                names=", ".join(outdated)
            )
        )
    return " ".join(said)


def _fitting(wheels: Sequence[dict], name: str) -> list[dict]:
    return [wheel for wheel in wheels if wheel["fits"] and wheel["name"] == _canonical(name)]


def _platforms(supported: Sequence[str]) -> list[str]:
    """The tags that pip has to be given for a system, of those that it supports, best first."""
    if not supported or not supported[0].startswith(("manylinux", "linux", "musllinux")):
        return list(supported[:1])  # of macOS pip knows itself that older versions fit, too
    chosen = []
    for name in supported:
        version = re.match(r"manylinux_2_(\d+)_", name)
        # Of 2014 pip knows that its forerunners fit, too.
        if name.startswith("manylinux2014_") or (version and OLDEST_GLIBC <= int(version[1]) <= NEWEST_GLIBC):
            chosen.append(name)
    return chosen


def _minor(preflight: Preflight) -> str:
    return ".".join(preflight.pythonVersion.split(".")[:2])


def _system(preflight: Preflight) -> str:
    return f"{preflight.system.partition('-')[0]} {preflight.facts.get('machine') or ''}".strip()


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
