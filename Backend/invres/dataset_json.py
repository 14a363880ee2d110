"""Cases and data sets as plain records, and the two formats that describe themselves in a dataset.json."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import InvresError
from .alignment import align_channels, check_label_place
from .config import Label, LabelScheme
from .events import SILENT, Reporter
from .volume import Geometry, Volume, read_channels, read_geometry, read_volume

__all__ = [
    "Case",
    "Dataset",
    "distinct",
    "file_names",
    "is_number",
    "label_pairs",
    "list_files",
    "list_folders",
    "list_volumes",
    "make_dataset",
    "plain_scheme",
    "read_json",
    "read_json_layout",
    "stem_of",
]

# Longest first: "a.seg.nrrd" is the case "a". Analyze and NIfTI pairs are listed by their header alone.
ENDINGS = (".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr")


@dataclass(frozen=True)
class Case:
    """One examination: files only, nothing is loaded.

    images: one file per channel in the data set's channel order, or one 4D file that holds all channels. None, or a
    path where nothing is, stands for a channel that the case lacks.
    label: the label map; None for a case that is only segmented.
    patient: cases of one patient never lie on both sides of a split; the case's name where nothing else is known.
    fingerprints: of the whole images that these were cut out of (see `fingerprints`); () where they are whole.
    """

    name: str
    images: tuple[Path | None, ...]
    label: Path | None = None
    patient: str = ""
    fingerprints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.name)


@dataclass(frozen=True)
class Dataset:
    """A data set as it lies on disk.

    modalities: "CT" or "MR" for each channel.
    layout: which format was recognised, in words.
    channels_in_one_file: each case has one file with all channels (4D) instead of one file per channel.
    aligned: channels on other grids than the first one of their case are resampled to its grid when they are loaded.
    """

    name: str
    channel_names: tuple[str, ...]
    modalities: tuple[str, ...]
    scheme: LabelScheme
    cases: tuple[Case, ...]
    root: Path
    layout: str
    channels_in_one_file: bool = False
    aligned: bool = False

    @property
    def labelled_cases(self) -> tuple[Case, ...]:
        """The cases that can be trained on."""
        return tuple(case for case in self.cases if case.label is not None)

    def case(self, name: str) -> Case:
        """The case of that name. Raises InvresError where there is none."""
        for case in self.cases:
            if case.name == name:
                return case
        raise InvresError(
            f"The data set {self.name} has no case {name!r}.", hint="Give one of the names that `invres check` lists."
        )

    def present(self, case: Case) -> tuple[bool, ...]:
        """Whether the case has a file, for each entry of its `images`."""
        return tuple(image is not None and image.exists() for image in case.images)

    def geometry(self, case: Case) -> Geometry:
        """The grid of a case's first image that is there, from its header alone."""
        there = [image for image in case.images if image is not None and image.exists()]
        return read_geometry(there[0] if there else self._first(case))

    def load(self, case: Case, report: Reporter = SILENT) -> tuple[list[Volume | None], Volume | None]:
        """The image volumes of a case in channel order, None for one that it lacks, and its label map if it has one.

        Raises InvresError for an unreadable file, for a case without any image, for a number of channels other than the
        data set's, and where `aligned` asks for what cannot be (`alignment`).
        """
        if not any(self.present(case)):
            self.geometry(case)  # says which file is not there
        volumes: list[Volume | None] = []
        for image in case.images:
            volumes += read_channels(image, report=report) if image is not None and image.exists() else [None]
        if len(volumes) != len(self.channel_names):
            raise InvresError(
                f"The case {case.name} has {len(volumes)} image volumes ({file_names(case.images)}), but the data set "
                f"has {len(self.channel_names)} channels ({', '.join(self.channel_names)}).",
                hint="Add or remove image files until each case has one for every channel.",
            )
        label = None if case.label is None else read_volume(case.label, kind="labels", report=report)
        if self.aligned:
            if label is not None:
                check_label_place(label, volumes, self.channel_names, case.name)
            volumes, _ = align_channels(volumes, self.channel_names, case.name)
        return volumes, label

    def _first(self, case: Case) -> Path:
        """The first of a case's files, there or not. Raises InvresError where none is named."""
        for image in case.images:
            if image is not None:
                return image
        raise InvresError(f"The case {case.name} has no image file.", hint="Give it one, or leave the case out.")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InvresError for a missing file, broken JSON and a key given twice."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise InvresError(f"{path} has the key {twice[0]!r} twice.", hint="Rename or remove one of the two.")
        return dict(pairs)

    try:
        # Editors on Windows put a byte order mark in front.
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_duplicates)
    except FileNotFoundError:
        raise InvresError(f"There is no file {path}.", hint="Check the path for a typing mistake.") from None
    except (OSError, ValueError) as error:
        raise InvresError(f"{path} is not readable JSON: {error}.", hint="Correct the file at that place.") from None


def read_json_layout(path: Path) -> Dataset:
    """A data set described by a dataset.json of nnU-Net v2 or of the Medical Segmentation Decathlon."""
    description = read_json(path)
    if isinstance(description, dict) and "channel_names" in description:
        return _nnunet(path, description)
    if isinstance(description, dict) and "modality" in description:
        return _decathlon(path, description)
    raise InvresError(
        f"{path} has neither `channel_names` (nnU-Net v2) nor `modality` (Decathlon).",
        hint='Add "channel_names": {"0": "T1"} with one entry for each channel.',
    )


# --- formats with a dataset.json ---------------------------------------------------------------------------------


def _nnunet(path: Path, description: dict[str, Any]) -> Dataset:
    """nnU-Net v2 raw: imagesTr/CASE_0000.ext, labelsTr/CASE.ext, or the paths listed under `dataset`."""
    root = path.parent
    channels = _numbered(path, "channel_names", description["channel_names"])
    scheme = _nnunet_scheme(path, description)
    in_one_file = bool(description.get("channels_in_one_file", False))
    if "dataset" in description:
        cases = [_listed_case(path, name, entry) for name, entry in _mapping(path, "dataset", description).items()]
        layout = "nnU-Net v2 (dataset.json that lists its files)"
    else:
        files = 1 if in_one_file else len(channels)
        cases = _nnunet_cases(path, str(description.get("file_ending", ".nii.gz")), files)
        layout = "nnU-Net v2"
    return make_dataset(str(description.get("name") or root.name), channels, scheme, cases, root, layout, in_one_file)


def _nnunet_cases(path: Path, ending: str, channels: int) -> list[Case]:
    folder = path.parent / "imagesTr"
    found: dict[str, set[int]] = {}
    for file in list_files(folder):
        if match := re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", file.name):
            found.setdefault(match[1], set()).add(int(match[2]))
    label_folder = path.parent / "labelsTr"
    labels = [file.name.removesuffix(ending) for file in list_files(label_folder) if file.name.endswith(ending)]
    # Where label files exist at all each case needs one; an absent one is reported as a missing file.
    cases = []
    for name in sorted(found.keys() | set(labels)):
        # A channel that is not there gets the path where it should lie; one too many is left to be reported.
        numbers = sorted(found.get(name, set()) | set(range(channels)))
        images = tuple(folder / f"{name}_{number:04d}{ending}" for number in numbers)
        cases.append(Case(name, images, label_folder / f"{name}{ending}" if labels else None))
    return cases


def _listed_case(path: Path, name: str, entry: Any) -> Case:
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), list):
        raise InvresError(
            f"{path}: the case {name!r} under `dataset` must be an object with a list `images`, got {entry!r}.",
            hint='Write {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}.',
        )
    label = entry.get("label")
    return Case(
        name,
        tuple(None if image is None else path.parent / str(image) for image in entry["images"]),
        path.parent / str(label) if label else None,
        str(entry.get("patient") or ""),
    )


def _decathlon(path: Path, description: dict[str, Any]) -> Dataset:
    """Medical Segmentation Decathlon: one 4D file per case, all channels in it."""
    root = path.parent
    cases = []
    for entry in description.get("training") or []:
        if not isinstance(entry, dict) or "image" not in entry:
            raise InvresError(
                f"{path}: each entry of `training` must have `image` and `label`, got {entry!r}.",
                hint='Write {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}.',
            )
        image = root / str(entry["image"])
        cases.append(Case(stem_of(image), (image,), root / str(entry["label"]) if entry.get("label") else None))
    channels = _numbered(path, "modality", description["modality"])
    scheme = plain_scheme(label_pairs(path, _mapping(path, "labels", description)))
    layout = "Medical Segmentation Decathlon"
    return make_dataset(str(description.get("name") or root.name), channels, scheme, cases, root, layout, True)


def _numbered(path: Path, key: str, value: Any) -> list[str]:
    """{"0": "T1", "1": "T2"} as a list in the order of the numbers."""
    if not isinstance(value, dict) or not value or not all(str(number).isdigit() for number in value):
        raise InvresError(
            f"{path}: `{key}` must number the channels, got {value!r}.",
            hint=f'Write "{key}": {{"0": "T1", "1": "T2"}}.',
        )
    return distinct(str(value[number]).strip() for number in sorted(value, key=int))


def _mapping(path: Path, key: str, description: dict[str, Any]) -> dict[str, Any]:
    value = description.get(key)
    if not isinstance(value, dict):
        raise InvresError(f"{path}: `{key}` must be an object, got {value!r}.", hint=f"Add or correct `{key}`.")
    return value


# --- labels ------------------------------------------------------------------------------------------------------


def label_pairs(path: Path, labels: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, values) of each label, from {"name": value or list of values} as well as from {"value": "name"}."""
    pairs = []
    by_value = all(is_number(key) for key in labels) and not all(is_number(value) for value in labels.values())
    for key, value in labels.items():
        name, raw = (str(value), key) if by_value else (key, value)
        values = raw if isinstance(raw, list) else [raw]
        if not values or not all(is_number(item) for item in values):
            raise InvresError(
                f"{path}: the label {name!r} must have a whole number or a list of them, got {raw!r}.",
                hint='Write "labels": {"background": 0, "tumour": 1}.',
            )
        pairs.append((name.strip(), tuple(sorted({int(item) for item in values}))))
    return pairs


def is_number(value: Any) -> bool:
    """Whether a JSON value is a whole number, or a text that holds one."""
    return not isinstance(value, bool) and re.fullmatch(r"\s*-?\d+\s*", str(value)) is not None


def _nnunet_scheme(path: Path, description: dict[str, Any]) -> LabelScheme:
    pairs = label_pairs(path, _mapping(path, "labels", description))
    ignore_value = next((values[0] for name, values in pairs if name == "ignore"), None)
    foreground = [(name, values) for name, values in pairs if name != "ignore" and values != (0,)]
    if all(len(values) == 1 for _, values in foreground):
        return plain_scheme(foreground, ignore_value)
    order = description.get("regions_class_order")
    wanted = f"{len(foreground)} whole numbers for {', '.join(name for name, _ in foreground)}"
    if not isinstance(order, list) or len(order) != len(foreground) or not all(is_number(value) for value in order):
        raise InvresError(
            f"{path}: labels with several values need `regions_class_order` with {wanted}, got {order!r}.",
            hint="List the value to write for each region; later ones overwrite earlier ones.",
        )
    names = distinct(name for name, _ in foreground)
    regions = zip(names, foreground, order, strict=True)
    labels = tuple(Label(name, values, int(output)) for name, (_, values), output in regions)
    return LabelScheme(labels, regions=True, ignore_value=ignore_value)


def plain_scheme(pairs: Iterable[tuple[str, tuple[int, ...]]], ignore_value: int | None = None) -> LabelScheme:
    """Labels that exclude one another; value 0 is the background and is left out."""
    foreground = sorted((values[0], name) for name, values in pairs if values != (0,))
    twice = [value for value, count in Counter(value for value, _ in foreground).items() if count > 1]
    if twice:
        both = " and ".join(name for value, name in foreground if value == twice[0])
        raise InvresError(f"The label value {twice[0]} stands for {both}.", hint="Give each label its own value.")
    names = distinct(name for _, name in foreground)
    labels = tuple(Label(name, (value,), value) for name, (value, _) in zip(names, foreground, strict=True))
    return LabelScheme(labels, ignore_value=ignore_value)


# --- helpers of all formats ----------------------------------------------------------------------------------------


def make_dataset(
    name: str,
    channels: list[str],
    scheme: LabelScheme,
    cases: list[Case],
    root: Path,
    layout: str,
    in_one_file: bool = False,
) -> Dataset:
    """A data set with its cases sorted; a channel called CT is CT, every other one MR."""
    modalities = tuple("CT" if channel.strip().upper() == "CT" else "MR" for channel in channels)
    ordered = tuple(sorted(cases, key=lambda case: case.name))
    return Dataset(name, tuple(channels), modalities, scheme, ordered, root, layout, in_one_file)


def distinct(names: Iterable[str]) -> list[str]:
    """The names with a number behind repeated ones, so that each can be a key."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def stem_of(path: Path) -> str:
    """The file name without a volume ending, compressed or not."""
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), path.suffix)
    return path.name[: len(path.name) - len(ending)]


def list_files(folder: Path) -> list[Path]:
    """Files of a folder, sorted; none where it does not exist. Names with a leading dot are macOS leftovers."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def list_volumes(folder: Path) -> list[Path]:
    """Volume files of a folder, sorted."""
    return [file for file in list_files(folder) if file.name.lower().endswith(ENDINGS)]


def list_folders(folder: Path, pattern: str = ".+") -> list[Path]:
    """Folders in a folder whose whole name matches `pattern`, sorted; none where it does not exist."""
    if not folder.is_dir():
        return []
    names = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path for path in names if re.fullmatch(pattern, path.name))


def file_names(paths: Iterable[Path | None]) -> str:
    """The bare names for a sentence."""
    return ", ".join(path.name for path in paths if path is not None) or "none"
