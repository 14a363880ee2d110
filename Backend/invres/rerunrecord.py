"""What is needed to make a segmentation again: its record, the model and the inputs that it names, its settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import InvresError
from .events import SILENT, Reporter, listed
from .files import HEADERS_ALONE, SEGMENTATION, WRITABLE_ENDINGS, digest_of
from .modelpackage import ModelPackage
from .provenance import checked_record, read_provenance
from .segmentoptions import SegmentOptions

__all__ = ["InputFinder", "Record", "differences_told", "model_of", "read_records", "settings_of"]

ENDINGS = (*WRITABLE_ENDINGS, *HEADERS_ALONE)
SHOWN = 12  # digits of a sha256 in a sentence


@dataclass(frozen=True)
class Record:
    """How one segmentation came about. name: of the case, or of its file. output: the name of that file.

    stored: the segmentation that the record came with, None where it is not there."""

    name: str
    provenance: Mapping[str, Any]
    output: str
    stored: Path | None


def read_records(path: Path, cases: Sequence[str] = ()) -> list[Record]:
    """The record in the header of a .seg.nrrd, that in a file of `--provenance`, or those of the cases in a
    segmentations.json. cases: only these of the last kind; all if empty.

    Raises InvresError for another file, for one without a record, and for a case that is not there.
    """
    if path.name.lower().endswith(SEGMENTATION):
        found: dict[str, Record | None] = {path.name: Record(path.name, read_provenance(path), path.name, path)}
    else:
        found = _read_json(path)
    if unknown := [name for name in cases if name not in found]:
        raise InvresError(
            f"{path.name} has no case {unknown[0]}; it has {listed(list(found))}.",
            hint="Leave --case out for all of them.",
        )
    chosen = {name: record for name, record in found.items() if not cases or name in cases}
    if not chosen:
        raise InvresError(f"{path} has no case that is done.", hint="Segment them first, by the same command again.")
    if without := [name for name, record in chosen.items() if record is None]:
        raise InvresError(
            f"{path} was written by an earlier version, which did not note the sha256 of the inputs of "
            f"{listed(without)}.",
            hint="Give their .seg.nrrd, whose headers have them, or name other cases by --case.",
        )
    records = [record for record in chosen.values() if record is not None]
    if series := [record.name for record in records if "frames" in record.provenance["settings"]]:
        raise InvresError(
            f"The record of {listed(series)} is of all frames of a series, and only single images are made again.",
            hint="Segment the series once more with --frames, by the model and the settings of the record.",
        )
    return records


def _read_json(path: Path) -> dict[str, Record | None]:
    """The records by name; None for a case of an earlier version, which has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["cases"] if "cases" in content else {Path(content["output"]).name: content}
        found: dict[str, Record | None] = {}
        for name, entry in entries.items():
            if entry is content or "inputs" in entry:
                output = Path(entry["output"]).name
                stored = path.parent / output
                found[name] = Record(name, checked_record(entry), output, stored if stored.is_file() else None)
            elif "volumes_ml" in entry:  # done
                found[name] = None
        return found
    except OSError as error:
        raise InvresError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvresError(
            f"{path} does not say how a segmentation was made.",
            hint="Give a .seg.nrrd, a file that --provenance wrote, or the segmentations.json of `segment --data`.",
        ) from None


def model_of(
    told: Mapping[str, Any],
    installed: Sequence[ModelPackage],
    given: ModelPackage | None,
    option: str,
    report: Reporter,
) -> ModelPackage:
    """The model with the weights that a record tells of, by their sha256: the given one, or one that is installed.

    told: `provenance.model_told`. option: that names another one. Warns where its manifest is another one, by which
    images are prepared. Raises InvresError for other weights, and where no model has them.
    """
    name = f"{told['model']} {told['model_version']}"
    weights = f"sha256 {_short(told['model_sha256'])}"
    known = [given] if given is not None else installed
    fits = [package for package in known if package.manifest.sha256 == told["model_sha256"]]
    if not fits and given is not None:
        raise InvresError(
            f"The weights of {given.name} {given.manifest.version} (sha256 {_short(given.manifest.sha256)}) are not "
            f"those of the record, which are of {name} ({weights}).",
            hint=f"Give that model by {option}: its folder or .invres file.",
            code="other_model",
        )
    if not fits:
        alike = [package.manifest.version for package in known if package.name == told["model"]]
        has = f"installed of that name is {listed(alike)}, with other weights" if alike else "none of that name is here"
        raise InvresError(
            f"No installed model has the weights of the record, {name} ({weights}); {has}.",
            hint=f"Give that model by {option}: its folder or .invres file.",
            code="other_model",
        )
    package = next((one for one in fits if one.id == told["model_id"]), fits[0])
    if told["manifest_sha256"] not in (None, package.manifest_digest()):
        report.warning(
            f"The weights of {name} are those of the record, but its manifest is another one: images may be prepared "
            "otherwise, and labels be others."
        )
    return package


class InputFinder:
    """Files and DICOM folders by their content, whatever they are called. places: files, and folders to look in.

    deep: also in all folders below those. Every file is read once at most.
    """

    def __init__(self, places: Sequence[Path], deep: bool, report: Reporter = SILENT) -> None:
        for place in places:
            if not place.exists():
                raise InvresError(
                    f"There is no file or folder {place}.",
                    hint="Inputs are known by their content: give files, or folders to look in, without channels.",
                )
        self._places, self._deep, self._report = places, deep, report
        self._digests: dict[Path, str] = {}
        self._candidates: list[Path] | None = None

    def inputs_of(self, provenance: Mapping[str, Any]) -> dict[str, Path]:
        """Channel -> file or folder. Raises InvresError in one sentence for all that is not there or has changed."""
        found: dict[str, Path] = {}
        lacking: list[str] = []
        for one in provenance["inputs"]:
            path = self._find(one) if one["sha256"] else None
            if path is None:
                lacking.append(self._why(one))
            else:
                found[one["channel"]] = path
        if lacking:
            raise InvresError(
                f"{'; '.join(lacking)}.",
                hint="Say where the inputs are now, as they were then: --input FILE_OR_FOLDER.",
                code="other_input",
            )
        return found

    def _find(self, one: Mapping[str, str]) -> Path | None:
        ending = _ending(one["file"])
        candidates = [
            path
            for path in self._all()
            if _ending(path.name) == ending and (path.is_file() or (not ending and _has_files(path)))
        ]
        candidates.sort(key=lambda path: path.name != one["file"])  # the likely one first
        for done, path in enumerate(candidates):
            self._report.progress("rerun.search", done, len(candidates))
            if self._digest(path) == one["sha256"]:
                self._report.progress("rerun.search", len(candidates), len(candidates))
                return path
        return None

    def _why(self, one: Mapping[str, str]) -> str:
        channel = f" ({one['channel']})" if one["channel"] else ""
        if not one["sha256"]:
            return f"The input{channel} was an image in memory, which no file is known to be"
        changed = [path for path in self._all() if path.name == one["file"] and path in self._digests]
        if changed:
            now = self._digests[changed[0]]
            return (
                f"{changed[0]}{channel} is not what it was: its sha256 is {_short(now)}, the record has "
                f"{_short(one['sha256'])}"
            )
        where = listed([str(place) for place in self._places])
        return f"Nothing in {where} has the content of {one['file']}{channel}, sha256 {_short(one['sha256'])}"

    def _all(self) -> list[Path]:
        if self._candidates is None:
            self._candidates = list(dict.fromkeys(self._walk()))
        return self._candidates

    def _walk(self) -> Iterator[Path]:
        for place in self._places:
            yield place
            if not place.is_dir():
                continue
            for folder, folders, files in os.walk(place):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))
                yield from (Path(folder) / name for name in folders)
                if not self._deep:
                    break

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            try:
                self._digests[path] = digest_of(path)
            except OSError:  # may not be read, or is gone
                self._digests[path] = ""
        return self._digests[path]


def settings_of(provenance: Mapping[str, Any], device: str) -> SegmentOptions:
    """The recorded settings. Raises InvresError where they are damaged."""
    settings = provenance["settings"]
    try:
        return SegmentOptions(
            device=device,
            overlap=settings["overlap"],
            mirror_axes=tuple(settings["mirror_axes"]),
            window=tuple(settings["window"]),
            roi_mm=tuple(settings["roi_mm"]),
            sides=settings["sides"],
            one_piece=settings["one_piece"],
            align=settings["align"],
        )
    except (KeyError, TypeError):
        raise InvresError("The settings in the record are damaged or incomplete.") from None


def differences_told(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences on what may make other voxels of the same: software, device, and how it computes. Of what the older
    record does not say nothing is said."""
    software = [
        f"{name} {now['software'].get(name, 'not there')} (then {version})"
        for name, version in then["software"].items()
        if now["software"].get(name) != version
    ]
    sentences = []
    if software:
        sentences.append(f"Other software than then: {', '.join(software)}.")
    if then["device_title"] != now["device_title"]:
        sentences.append(f"Another device than then: {now['device_title']} (then {then['device_title']}).")
    for key in ("threads", "precision"):
        if then[key] is not None and then[key] != now[key]:
            sentences.append(f"Computed with {key} {now[key]} (then {then[key]}).")
    if then["settings"]["window"] != now["settings"]["window"]:
        sizes = ["x".join(map(str, told["settings"]["window"])) for told in (now, then)]
        sentences.append(f"The window was {sizes[0]} voxels (then {sizes[1]}).")
    return sentences


def _ending(name: str) -> str:
    """The ending of a volume file in small letters; "" for a DICOM folder or a file of one."""
    return max((ending for ending in ENDINGS if name.lower().endswith(ending)), key=len, default="")


def _has_files(folder: Path) -> bool:
    try:
        return any(path.is_file() for path in folder.iterdir())
    except OSError:
        return False


def _short(sha256: str) -> str:
    return sha256[:SHOWN]
