"""What the backend needs of a Python, what it has, and what to do about the difference: decisions, no actions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from slicer.i18n import tr as _

__all__ = [
    "OPTIONAL",
    "TORCHVISION",
    "TORCH_REQUIREMENT",
    "PackageState",
    "Preflight",
    "Step",
    "constraints",
    "failureHint",
    "installationAdvice",
    "installationSteps",
    "judge",
    "satisfies",
]

TORCH_REQUIREMENT = ">=2.8,!=2.9.*"
# Slicer brings them and is built with them: pip must never put others in their place.
SLICERS_OWN = ("numpy", "SimpleITK")
# memcnn names it; its version belongs to torch's, so it comes with torch and is held like it.
TORCHVISION = "torchvision"
# Nothing here needs it but one way of training that the panel does not offer: it comes along with the others.
OPTIONAL = ("memcnn",)
TORCH_BYTES = 8 * 1024**3
OTHER_BYTES = 1024**3
NO_VERSION = ("No matching distribution found", "Could not find a version that satisfies", "ResolutionImpossible")
NO_NETWORK = (
    *("Retrying (Retry(", "Max retries exceeded", "ConnectionError", "NameResolutionError", "TimeoutError"),
    *("ProxyError", "SSLError", "getaddrinfo failed", "Temporary failure in name resolution", "Network is unreachable"),
)
"""What pip says where nothing fits, and where it has not reached the index: then it says the first as well."""
# pip unpacks files of torch with about 170 characters below the folder of packages.
LONGEST_BASE = 260 - 170


@dataclass(frozen=True)
class PackageState:
    """One package. state: "ok", "missing", "outdated" (another version is needed), "incomplete" (it needs another
    package, `needs`), "broken" (it is there, but it fails).

    sentence: what is the matter, "" if ok.
    """

    name: str
    requirement: str
    version: str
    state: str
    sentence: str
    needs: str = ""


@dataclass(frozen=True)
class Preflight:
    """What was found. ready: everything works. sentences: in plain words, what is missing or in the way.

    blockers: those of them that installing cannot mend. cards: names of CUDA cards that torch sees; idleCards: of
    NVIDIA cards that it cannot use, being a torch for the CPU. leftOut: what is optional and cannot be installed from
    the folder of packages. report: the probe's answers as they came.
    """

    ready: bool
    python: str
    pythonVersion: str
    packages: tuple[PackageState, ...]
    sentences: tuple[str, ...]
    blockers: tuple[str, ...] = ()
    torchBuild: str = ""
    cards: tuple[str, ...] = ()
    idleCards: tuple[str, ...] = ()
    leftOut: tuple[str, ...] = ()
    report: tuple[dict, ...] = field(default=(), repr=False)

    def package(self, name: str) -> PackageState | None:
        """The state of one package."""
        return next((package for package in self.packages if package.name == name), None)

    @property
    def facts(self) -> dict:
        """What the probe has told of the Python itself; {} where it did not come so far."""
        return _pythonOf(self.report)

    @property
    def system(self) -> str:
        """Name and version of the operating system, as Python tells it."""
        return str(self.facts.get("system") or "")


@dataclass(frozen=True)
class Step:
    """One thing to do. kind: "uninstall", "clear" (remove what an uninstalled package left), "torch", "packages".

    names: the packages; text: what a person reads.
    """

    kind: str
    names: tuple[str, ...]
    text: str


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version fulfils e.g. ">=2.8,!=2.9.*"; a local part such as +cu126 does not count."""
    have = _numbers(version)
    for clause in filter(None, (part.strip() for part in requirement.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)\s*([0-9.]+?)(\.\*)?", clause)
        if match is None:
            raise ValueError(f"{clause!r} is no requirement of a version.")
        sign, wanted, prefix = match[1], _numbers(match[2]), bool(match[3])
        length = len(wanted) if prefix else max(len(have), len(wanted))
        mine, other = _padded(have, length), _padded(wanted, length)
        fulfilled = {
            ">=": mine >= other,
            "<=": mine <= other,
            "==": mine == other,
            "!=": mine != other,
            "<": mine < other,
            ">": mine > other,
        }[sign]
        if not fulfilled:
            return False
    return True


def judge(report: Iterable[dict], exitCode: int, lastWords: str = "", separate: bool = False) -> Preflight:
    """The preflight from what the probe has written until it ended.

    lastWords: the last line of its error output. separate: it ran in a Python of its own and not in Slicer's.
    """
    entries = tuple(report)
    python = _pythonOf(entries)
    if not python:
        said = f" ({lastWords})" if lastWords else ""
        sentence = _("The Python of the backend does not start{said}.").format(said=said)
        return Preflight(False, "", "", (), (sentence,), blockers=(sentence,), report=entries)
    packages = [_package(entry, separate) for entry in entries if entry["event"] == "package"]
    announced = [entry["name"] for entry in entries if entry["event"] == "importing"]
    # The probe did not survive the import that it announced last.
    crashed = announced[-1] if len(announced) > len(packages) else ""
    if crashed:
        sentence = _("{name} is damaged: Python crashes when it is imported (code {code}).")
        packages.append(PackageState(crashed, "", "", "broken", sentence.format(name=crashed, code=exitCode)))
    needed = [package for package in packages if package.name not in OPTIONAL]
    blockers = _blockers(python, needed, separate)
    sentences = [*blockers, *(package.sentence for package in needed if package.sentence)]
    # What is optional is looked at last, so nothing is hidden behind it.
    finished = any(entry["event"] == "end" for entry in entries) or crashed in OPTIONAL
    torch = next((e for e in entries if e["event"] == "package" and e["name"] == "torch"), {})
    idleCards = tuple(torch.get("idle_cards") or ())
    if idleCards:
        sentences.append(_idleSentence(idleCards[0], str(torch.get("version") or ""), separate))
    return Preflight(
        ready=finished and all(package.state == "ok" for package in needed),
        python=str(python.get("executable") or ""),
        pythonVersion=str(python.get("version") or ""),
        packages=tuple(packages),
        sentences=tuple(dict.fromkeys(sentences)),
        blockers=tuple(blockers),
        torchBuild=str(torch.get("build") or ""),
        cards=tuple(torch.get("cards") or ()),
        idleCards=idleCards,
        report=entries,
    )


def installationSteps(preflight: Preflight, separate: bool = False) -> list[Step]:
    """What to do, in order, to make the backend work; [] where nothing is needed.

    A torch of another version or a broken one goes first, with what it left behind, since pip would otherwise take it
    for good. torch comes before the rest, so that nothing brings another one. What is optional comes with what is not.
    """
    steps: list[Step] = []
    if preflight.ready:
        return steps
    torch = preflight.package("torch")
    torchComes = torch is None or torch.state != "ok"
    if torchComes:
        if torch is not None and torch.state in ("outdated", "broken"):
            names = ("torch", TORCHVISION)
            steps.append(Step("uninstall", names, _("Removing torch {version}").format(version=torch.version).rstrip()))
            steps.append(Step("clear", names, _("Clearing what is left of torch")))
        names = tuple(name for name in (f"torch{TORCH_REQUIREMENT}", TORCHVISION) if name not in preflight.leftOut)
        steps.append(Step("torch", names, _("Installing torch")))
    own = (*preflight.leftOut, *(() if separate else SLICERS_OWN))
    rest = [p for p in preflight.packages if p.name != "torch" and p.name not in own and p.state != "ok"]
    if not preflight.packages:
        return steps
    if broken := tuple(package.name for package in rest if package.state == "broken"):
        steps.append(Step("uninstall", broken, _("Removing the damaged {names}").format(names=", ".join(broken))))
        steps.append(Step("clear", broken, _("Clearing what is left of {names}").format(names=", ".join(broken))))
    known = {package.name for package in preflight.packages}
    # A probe that crashed has not looked at the packages behind.
    unseen = [
        name
        for name in ("scipy", "scikit-image", "safetensors", "pydicom", "psutil", "memcnn")
        if name not in known and name not in own
    ]
    coming = (TORCHVISION,) if torchComes else ()
    needed = [package.needs for package in rest if package.needs not in ("", "torch", *coming, *own)]
    # What only lacks torch has it now.
    wanted = [p.name + p.requirement for p in rest if p.needs not in ("torch", TORCHVISION)]
    names = tuple(dict.fromkeys([*wanted, *needed, *unseen]))
    if names:
        steps.append(Step("packages", names, _("Installing {names}").format(names=", ".join(names))))
    return steps


def installationAdvice(preflight: Preflight, separate: bool, withExtension: bool, folder: str = "") -> list[str]:
    """What a person should know before the steps are begun: how much is downloaded, and which torch it will be.

    withExtension: whether Slicer's extension PyTorch, which chooses by the GPU, is there. folder: where the packages
    come from in place of the internet; "" for the internet.
    """
    if folder:
        return [_("All packages come from this folder, and nothing is downloaded: {folder}").format(folder=folder)]
    if not any(step.kind == "torch" for step in installationSteps(preflight, separate)):
        return []
    said = [_("torch is a download of about 3 GB with CUDA, and of less than 1 GB for the CPU only.")]
    windows = preflight.system.startswith("Windows")
    if separate and windows:
        said.append(
            _(
                "On Windows pip brings the torch for the CPU only. For an NVIDIA GPU cancel, and install torch into "
                "this Python as pytorch.org says."
            )
        )
    elif not separate and not withExtension and not _isMac(preflight.system):
        source = _('The extension "PyTorch", which chooses the torch that fits your GPU, is not installed.') + " "
        if windows:
            source += _("What comes without it, from PyPI, computes on the CPU only on Windows.")
        else:
            source += _("Without it torch comes from PyPI, whatever your GPU is.")
        said.append(source)
        said.append(
            _(
                'Better: cancel, install "PyTorch" in the Extensions Manager, restart Slicer, and press Install again. '
                "Or go on all the same."
            )
        )
    return said


def failureHint(said: str, folder: str = "") -> str:
    """What to do when pip has failed, by what it said. folder: where the packages come from; "" for the internet."""
    if folder and any(words in said for words in NO_VERSION):
        return _(
            "The folder has to hold packages that fit one another, this Python and the packages that are here: fill "
            "it anew with the command under Setup, Without internet."
        )
    if folder:
        return _("Check the folder of packages and the free space, restart Slicer, and try again.")
    if any(words in said for words in NO_NETWORK):
        return _(
            "Check the network, restart Slicer, and try again. A computer without internet installs from a folder of "
            "packages: see Setup, Without internet."
        )
    if any(words in said for words in NO_VERSION):
        return _(
            "pip found no version that fits this Python, this computer and the packages that are here; the network and "
            "the disk are not to blame. Choose another Python under Setup: 3.10 to 3.13, 64 bit."
        )
    return _("Check the network and the free space, restart Slicer, and try again.")


def constraints(installed: Iterable[tuple[str, str]]) -> str:
    """The text of a constraints file that keeps pip from replacing packages which are there and work.

    installed: names and versions; a local part of a version (+cu126) is left out, as any build of it will do.
    """
    return "".join(f"{name}=={version.partition('+')[0]}\n" for name, version in installed if version)


def _package(entry: dict, separate: bool) -> PackageState:
    name, requirement = str(entry["name"]), str(entry.get("requirement") or "")
    version, error = str(entry.get("version") or ""), str(entry.get("error") or "")
    there = bool(entry.get("present")) or bool(version)

    def state(kind: str, sentence: str) -> PackageState:
        return PackageState(name, requirement, version, kind, sentence)

    if not entry.get("imports"):
        if name in SLICERS_OWN and not separate:
            return state(
                "broken", _("{name}, a part of Slicer itself, is damaged: install Slicer again.").format(name=name)
            )
        if not there:
            return state("missing", _("{name} is not installed.").format(name=name))
        needs = str(entry.get("needs") or "")
        if needs:
            sentence = _("{name} needs {needs}, which is not installed.").format(name=name, needs=needs)
            return PackageState(name, requirement, version, "incomplete", sentence, needs)
        reason = error or _("it cannot be imported")
        return state("broken", _("{name} is only half installed: {reason}").format(name=name, reason=_sentence(reason)))
    if requirement and version and not satisfies(version, requirement):
        if name == "torch" and satisfies(version, "==2.9.*"):
            return state(
                "outdated",
                _("torch {version} is much too slow for 3D networks; 2.8, or 2.10 and newer, are good.").format(
                    version=version
                ),
            )
        return state(
            "outdated",
            _("{name} {version} does not fit; {requirement} is needed.").format(
                name=name, version=version, requirement=requirement
            ),
        )
    return state("ok", "")


def _pythonOf(report: Iterable[dict]) -> dict:
    """What the probe has told of the Python itself; {} where it did not come so far."""
    return next((entry for entry in report if entry["event"] == "python"), {})


def _isMac(system: str) -> bool:
    return system.startswith(("macOS", "Darwin"))


def _idleSentence(card: str, version: str, separate: bool) -> str:
    sentence = _("torch {version} computes on the CPU only, and this computer has a GPU: {card}.").format(
        version=version, card=card
    )
    if separate:
        return f"{sentence} " + _("To use it, install torch for CUDA into this Python, as pytorch.org says.")
    return f"{sentence} " + _(
        'To use it, install the extension "PyTorch" in the Extensions Manager, uninstall torch in its module, restart '
        "Slicer, and press Install here."
    )


def _blockers(python: dict, packages: list[PackageState], separate: bool) -> list[str]:
    """What installing the packages, those that are needed, would fail on."""
    found = []
    version = _numbers(str(python.get("version") or ""))
    if version and not (3, 10) <= version[:2] < (3, 14):
        found.append(
            _("Python {version} does not fit; the backend runs on Python 3.10 to 3.13.").format(
                version=python["version"]
            )
        )
    if not separate:
        found += [p.sentence for p in packages if p.name in SLICERS_OWN and p.state != "ok"]
    if all(package.state == "ok" for package in packages):
        return found
    torchComes = all(package.name != "torch" or package.state != "ok" for package in packages)
    if torchComes and _isMac(str(python.get("system") or "")) and python.get("machine") == "x86_64":
        found.append(
            _(
                "This Python is one for Intel Macs (x86_64), for which torch ended with 2.2, and 2.8 is needed. On a "
                "Mac with Apple silicon choose an arm64 Python of your own under Setup; on an Intel Mac nothing helps "
                "but another computer."
            )
        )
    free = python.get("free_bytes")
    needed = TORCH_BYTES if torchComes else OTHER_BYTES
    if isinstance(free, int) and free < needed:
        found.append(
            _("The disk has {free:.1f} GB free, and {needed:.0f} GB are needed to install: free some space.").format(
                free=free / 1e9, needed=needed / 1e9
            )
        )
    folder = str(python.get("packages_folder") or "")
    if python.get("writable") is False:
        found.append(
            _(
                "Packages cannot be written to {folder}: start Slicer with the right to, or choose another Python."
            ).format(folder=folder)
        )
    if python.get("long_paths") is False and len(folder) > LONGEST_BASE:
        found.append(
            _(
                "The folder {folder} has {length} characters, too many for Windows with long paths switched off: "
                "switch them on, or install Slicer in a folder with a shorter name."
            ).format(folder=folder, length=len(folder))
        )
    return found


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _padded(numbers: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (numbers + (0,) * length)[:length]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
