"""Data sets: recognising and checking what lies on disk, writing dataset.json, splitting patient by patient."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import InvresError
from .alignment import IMAGE_TOLERANCE_MM, resampled_sentence, same_place
from .dataset_json import Case, Dataset, file_names, list_volumes, read_json, read_json_layout, stem_of
from .events import Reporter
from .files import written_whole
from .layouts import FOLDER_PAIRS, FOLDER_READERS
from .runfolder import RUN
from .volume import read_geometry

__all__ = [
    "SPLITS",
    "WITHOUT_LABELS",
    "Case",
    "Dataset",
    "aligned_as_begun",
    "case_problems",
    "channels_told",
    "described",
    "read_dataset",
    "read_splits",
    "report_missing_channels",
    "report_resampled",
    "split_by_count",
    "split_cases",
    "write_dataset_json",
    "write_splits",
]

SPLITS = "splits_final.json"  # of nnU-Net
Split = tuple[tuple[str, ...], tuple[str, ...]]

FORMATS = (
    "a dataset.json (nnU-Net v2 or Decathlon), folders images and labels, a folder per case, "
    "BIDS, iSeg, BraTS 2020 or 2023, KiTS19 or HCP"
)


WITHOUT_LABELS = (
    "Label maps alone are for `invres train --recipe brain-any-contrast`, scans without labels for `--recipe iqt` or "
    "`--recipe iqt-t1`."
)


def read_dataset(path: Path | str, *, checked: bool = True, partial: bool = False, aligned: bool = False) -> Dataset:
    """Reads a data set from a dataset.json or from its folder and recognises the layout by itself.

    Only paths and JSON are read; label files are opened only where nothing states the label values.
    checked False leaves missing files and wrong channel counts in the result, for the data doctor to list.
    partial: a case may lack channels, as long as it has one. aligned: see `Dataset`.
    Raises InvresError for a path that is no data set, for broken JSON, and (checked) for the first case with a
    missing file, a wrong number of channels or a name given twice.
    """
    path = Path(path)
    if path.is_dir():
        dataset = _read_folder(path)
    elif path.is_file() and path.suffix.lower() == ".json":
        dataset = read_json_layout(path)
    elif path.exists():
        raise InvresError(
            f"{path.name} is no data set: a dataset.json or a folder is wanted.", hint="Give the folder with the cases."
        )
    else:
        raise InvresError(f"There is no data set at {path}.", hint="Check the path for a typing mistake.")
    if not dataset.cases:
        raise InvresError(
            f"The data set {path} ({dataset.layout}) has no training case.",
            hint="Put image files where its format wants them, or correct `file_ending` or `training` in dataset.json.",
        )
    if checked and (problems := case_problems(dataset, partial)):
        more = f" ({len(problems) - 1} more problems were found.)" if len(problems) > 1 else ""
        hint = "Run `invres check` on the data set for the whole list."
        if problems[0][1] == "missing_channel":
            hint = f"Train with --channel-dropout for a model that can do without a channel. {hint}"
        raise InvresError(problems[0][2] + more, hint=hint)
    return dataclasses.replace(dataset, aligned=aligned)


def aligned_as_begun(dataset: Dataset, run: Path, report: Reporter) -> Dataset:
    """The data set with its channels aligned, or not, as in the run that was begun in the folder `run`.

    Warns where it is asked for now and was not then. A damaged run.json is left to whoever reads it as a whole.
    """
    try:
        aligned = bool(json.loads((run / RUN).read_text(encoding="utf-8"))["plan"].get("aligned", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return dataset
    if dataset.aligned and not aligned:
        report.warning("The run goes on as it was started, without --align.")
    return dataclasses.replace(dataset, aligned=aligned)


def _read_folder(folder: Path) -> Dataset:
    if (folder / "dataset.json").is_file():
        return read_json_layout(folder / "dataset.json")
    for reader in FOLDER_READERS:
        if (dataset := reader(folder)) is not None:
            return dataset
    if any(folder.name in pair and all((folder.parent / name).is_dir() for name in pair) for pair in FOLDER_PAIRS):
        raise InvresError(f"{folder} is a part of a data set.", hint=f"Give its parent, {folder.parent}.")
    hint = "Give the folder that directly holds the cases, or write a dataset.json for it."
    if list_volumes(folder) or list_volumes(folder / "labels"):
        hint += f" {WITHOUT_LABELS}"
    raise InvresError(f"No data set format was recognised in {folder}; known are {FORMATS}.", hint=hint)


def case_problems(dataset: Dataset, partial: bool = False) -> list[tuple[str, str, str]]:
    """What is wrong with the files of each case: (case name, code, one sentence), without opening a volume.

    Codes: duplicate_name, channel_count, missing_file, and missing_channel where the case has other channels; with
    `partial` the last is no problem.
    """
    counts = Counter(case.name for case in dataset.cases)
    problems = [
        (name, "duplicate_name", f"The case name {name} occurs {count} times; each case needs its own name.")
        for name, count in counts.items()
        if count > 1
    ]
    wanted = 1 if dataset.channels_in_one_file else len(dataset.channel_names)
    for case in dataset.cases:
        if len(case.images) != wanted:
            sentence = (
                f"The case {case.name} has {len(case.images)} image files ({file_names(case.images)}), but the data "
                f"set has {wanted} a case, for the channels {', '.join(dataset.channel_names)}."
            )
            problems.append((case.name, "channel_count", sentence))
        present = dataset.present(case)
        code = "missing_channel" if any(present) else "missing_file"
        for number, (image, there) in enumerate(zip(case.images, present, strict=True)):
            if not there and not (partial and any(present)):
                what = f"image file {image} of {case.name} does not exist"
                if image is None:
                    channel = dataset.channel_names[number] if number < len(dataset.channel_names) else number
                    what = f"case {case.name} has no file of {channel}"
                problems.append((case.name, code, f"The {what}."))
        # A DICOM series is a folder.
        if case.label is not None and not case.label.exists():
            sentence = f"The label file {case.label} of {case.name} does not exist."
            problems.append((case.name, "missing_file", sentence))
    return problems


def report_missing_channels(dataset: Dataset, names: Sequence[str], report: Reporter) -> None:
    """Tells how many of the named cases lack a channel. Raises InvresError for a channel that all of them lack."""
    cases = [dataset.case(name) for name in names]
    counts = _channel_counts(dataset, cases)
    if dataset.channels_in_one_file or not cases:
        return
    if 0 in counts:
        channel = dataset.channel_names[counts.index(0)]
        raise InvresError(
            f"No case has the channel {channel}, so nothing can be learnt of it.",
            hint="Leave it out of the data set's channels.",
        )
    if lacking := sum(not all(dataset.present(case)) for case in cases):
        each = ", ".join(f"{name} {count}" for name, count in zip(dataset.channel_names, counts, strict=True))
        report.note(f"{lacking} of {len(names)} cases lack a channel; there are {each}.")


def report_resampled(dataset: Dataset, cases: Sequence[Case], report: Reporter) -> None:
    """Tells, once, which channels of the cases are resampled when they are loaded; from their headers alone."""
    if dataset.aligned and (sentence := resampled_sentence([_other_grids(dataset, case) for case in cases])):
        report.note(sentence)


def _other_grids(dataset: Dataset, case: Case) -> list[str]:
    """The channels of a case that lie on another grid than its first; none where one cannot be read."""
    if dataset.channels_in_one_file or len(case.images) != len(dataset.channel_names):
        return []
    files = zip(dataset.channel_names, case.images, dataset.present(case), strict=True)
    try:
        grids = [(name, read_geometry(image)) for name, image, there in files if image is not None and there]
    except (InvresError, OSError, RuntimeError, ValueError):  # told of when it is loaded
        return []
    return [name for name, grid in grids if not same_place(grids[0][1], grid, IMAGE_TOLERANCE_MM)]


def channels_told(dataset: Dataset) -> list[str]:
    """The names of the channels, with the number of cases where some lack one."""
    counts, cases = _channel_counts(dataset, dataset.cases), len(dataset.cases)
    return [
        name if count == cases else f"{name} (in {count} of {cases} cases)"
        for name, count in zip(dataset.channel_names, counts, strict=True)
    ]


def _channel_counts(dataset: Dataset, cases: Sequence[Case]) -> list[int]:
    """How many of the cases have each channel."""
    if dataset.channels_in_one_file:
        return [len(cases)] * len(dataset.channel_names)
    present = [dataset.present(case) for case in cases]
    places = range(len(dataset.channel_names))
    return [sum(place < len(there) and there[place] for there in present) for place in places]


def described(dataset: Dataset) -> dict[str, Any]:
    """What a data set holds, for programs: channels, labels and cases with the full paths of their files."""
    return {
        "root": str(dataset.root.absolute()),
        "channels": [
            {"name": name, "modality": modality}
            for name, modality in zip(dataset.channel_names, dataset.modalities, strict=True)
        ],
        "channels_in_one_file": dataset.channels_in_one_file,
        "labels": [
            {"name": label.name, "values": list(label.values), "output_value": label.output_value}
            for label in dataset.scheme.labels
        ],
        "regions": dataset.scheme.regions,
        "ignore_value": dataset.scheme.ignore_value,
        "splits": _splits(dataset),
        "cases": [
            {
                "name": case.name,
                "images": [None if image is None else str(image.absolute()) for image in case.images],
                "label": None if case.label is None else str(case.label.absolute()),
                "patient": case.patient,
            }
            for case in dataset.cases
        ],
    }


def _splits(dataset: Dataset) -> list[dict[str, list[str]]]:
    """The folds of a splits_final.json; none where it is broken, of which the doctor speaks."""
    file = dataset.root / SPLITS
    with contextlib.suppress(InvresError):
        if file.is_file():
            return [{"train": list(train), "val": list(held)} for train, held in read_splits(file, dataset)]
    return []


def write_dataset_json(dataset: Dataset, path: Path | str) -> None:
    """Writes `dataset` as an nnU-Net v2 dataset.json that lists its files, with paths relative to the json.

    The file appears whole or not at all. `read_dataset` gives back the same channels, labels and cases.
    Raises InvresError where the file cannot be written.
    """
    path = Path(path)
    first = next(image for case in dataset.cases for image in case.images if image is not None)
    labels: dict[str, Any] = {"background": 0}
    for label in dataset.scheme.labels:
        labels[label.name] = list(label.values) if dataset.scheme.regions else label.values[0]
    if dataset.scheme.ignore_value is not None:
        labels["ignore"] = dataset.scheme.ignore_value
    description: dict[str, Any] = {
        "name": dataset.name,
        "channel_names": {str(index): name for index, name in enumerate(dataset.channel_names)},
        "labels": labels,
        "numTraining": len(dataset.cases),
        "file_ending": first.name.removeprefix(stem_of(first)),
    }
    if dataset.scheme.regions:
        description["regions_class_order"] = [label.output_value for label in dataset.scheme.labels]
    if dataset.channels_in_one_file:
        description["channels_in_one_file"] = True
    description["dataset"] = {case.name: _case_entry(case, path.parent) for case in dataset.cases}
    _write_json(path, description)


def _case_entry(case: Case, root: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"images": [None if image is None else _relative(image, root) for image in case.images]}
    if case.label is not None:
        entry["label"] = _relative(case.label, root)
    if case.patient != case.name:
        entry["patient"] = case.patient
    return entry


def _relative(path: Path, root: Path) -> str:
    try:
        return Path(os.path.relpath(path.absolute(), root.absolute())).as_posix()
    except ValueError:  # another drive on Windows
        return path.absolute().as_posix()


def split_cases(
    dataset: Dataset, seed: int = 0, folds: int = 5, fold: int = 0, root: Path | str | None = None
) -> Split:
    """The names of the training and of the validation cases of one fold; both sorted.

    A splits_final.json in `root` (default: the data set's folder) is used as it is; seed and folds then count for
    nothing. Otherwise patients are sorted, shuffled by `seed` and cut into `folds` parts as scikit-learn's KFold
    does (seed 12345 repeats nnU-Net's split), at most one part per patient, so 2 to 4 patients are left out one by
    one. With a single patient training and validation are the same cases: (names, names). Cases without a label
    take no part.

    Raises InvresError for a fold that does not exist, a data set without labels, or a splits_final.json that names
    unknown cases.
    """
    file = Path(root or dataset.root) / SPLITS
    splits = read_splits(file, dataset) if file.is_file() else _folds(dataset, seed, folds)
    if not 0 <= fold < len(splits):
        raise InvresError(
            f"There is no fold {fold}; the data set has the folds 0 to {len(splits) - 1}.",
            hint="Choose one of them; folds are never more than patients.",
        )
    return splits[fold]


def split_by_count(dataset: Dataset, validation_count: int, seed: int = 0) -> Split:
    """A seeded split with `validation_count` cases for validation; both sides sorted.

    Whole patients are taken, so it may be a few cases more where patients have several.
    Raises InvresError where that leaves no case on one of the sides.
    """
    patients = _shuffled_patients(dataset, seed)
    labelled = len(dataset.labelled_cases)
    if not 1 <= validation_count < labelled:
        raise InvresError(
            f"validation_count must be 1 to {labelled - 1} for {labelled} labelled cases, got {validation_count}.",
            hint="Choose a smaller number of validation cases." if validation_count > 0 else "Choose at least 1.",
        )
    sizes = Counter(case.patient for case in dataset.labelled_cases)
    enough = int(np.searchsorted(np.cumsum([sizes[patient] for patient in patients]), validation_count)) + 1
    if enough == len(patients):
        raise InvresError(
            f"{validation_count} validation cases of whole patients leave no patient for training.",
            hint="Choose a smaller number of validation cases.",
        )
    return _sides(dataset, set(patients[:enough]))


def read_splits(path: Path | str, dataset: Dataset) -> list[Split]:
    """All folds of an nnU-Net splits_final.json. Raises InvresError for a wrong form, for unknown case names, and
    for a patient on both sides of a split."""
    content = read_json(Path(path))
    if not isinstance(content, list) or not content or not all(_is_fold(fold) for fold in content):
        raise InvresError(
            f'{path} must be a list of {{"train": [...], "val": [...]}} with case names in both.',
            hint="Correct the file, or remove it to have the cases split anew.",
        )
    unknown = {name for fold in content for name in (*fold["train"], *fold["val"])}
    unknown -= {case.name for case in dataset.labelled_cases}
    if unknown:
        raise InvresError(
            f"{path} names {min(unknown)!r}, which is no labelled case of the data set ({len(unknown)} such names).",
            hint="Correct the file, or remove it to have the cases split anew.",
        )
    patients = {case.name: case.patient for case in dataset.labelled_cases}
    for fold in content:
        if both := {patients[name] for name in fold["train"]} & {patients[name] for name in fold["val"]}:
            raise InvresError(
                f"A split of {path} has cases of the patient {min(both)} on both sides.",
                hint="Put all cases of a patient on one side, or remove the file to have the cases split anew.",
            )
    return [(tuple(fold["train"]), tuple(fold["val"])) for fold in content]


def write_splits(dataset: Dataset, folder: Path | str, seed: int = 0, folds: int = 5) -> Path:
    """Writes splits_final.json with all folds into `folder`, whole or not at all, and returns its path."""
    path = Path(folder) / SPLITS
    splits = _folds(dataset, seed, folds)
    _write_json(path, [{"train": list(train), "val": list(validation)} for train, validation in splits])
    return path


def _is_fold(fold: Any) -> bool:
    if not isinstance(fold, dict) or not {"train", "val"} <= fold.keys():
        return False
    sides = (fold["train"], fold["val"])
    return all(isinstance(side, list) and side and all(isinstance(name, str) for name in side) for side in sides)


def _folds(dataset: Dataset, seed: int, folds: int) -> list[Split]:
    if folds < 2:
        raise InvresError(f"folds must be 2 or more, got {folds}.", hint="5 is usual.")
    patients = _shuffled_patients(dataset, seed)
    if len(patients) == 1:
        return [_sides(dataset, set(), everything_twice=True)]
    parts = np.array_split(np.arange(len(patients)), min(folds, len(patients)))
    return [_sides(dataset, {patients[index] for index in part}) for part in parts]


def _shuffled_patients(dataset: Dataset, seed: int) -> list[str]:
    patients = sorted({case.patient for case in dataset.labelled_cases})
    if not patients:
        raise InvresError(
            f"The data set {dataset.name} has no case with a label to train on.",
            hint="Add label files, or use `invres segment` to segment its images.",
        )
    # RandomState's stream never changes between numpy versions, Generator's may.
    np.random.RandomState(seed).shuffle(patients)
    return patients


def _sides(dataset: Dataset, validation_patients: set[str], *, everything_twice: bool = False) -> Split:
    cases = sorted(dataset.labelled_cases, key=lambda case: case.name)
    train = tuple(case.name for case in cases if case.patient not in validation_patients)
    validation = tuple(case.name for case in cases if case.patient in validation_patients)
    return train, train if everything_twice else validation


def _write_json(path: Path, content: Any) -> None:
    try:
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvresError(f"{path} cannot be written: {error.strerror}.", hint="Choose a folder with room.") from error
