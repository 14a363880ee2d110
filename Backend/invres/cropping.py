"""Whole images as training cases of a model that learns from crops: one case around each labelled place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import Cancelled, InvresError
from .cases import SPLITS, Case, Dataset, read_splits
from .config import CropPlan
from .configjson import to_dict
from .events import SILENT, Reporter
from .files import stamps_of, written_whole
from .fingerprints import fingerprints
from .inference import is_crop
from .locating import boxes_around
from .preprocessing import on_one_grid
from .region import cut_out
from .volume import Volume, write_volume

__all__ = ["CROPS", "REFERENCE_CROPS", "cropped"]


KNOWN = "crops.json"
CROPS, REFERENCE_CROPS = "crops", "crops_reference"
"""The folders of a run that crops are written into, of its own cases and of those that the base model is checked on."""


def cropped(
    dataset: Dataset,
    crop: CropPlan,
    folder: Path,
    report: Reporter = SILENT,
    stopped: Callable[[], bool] = lambda: False,
) -> Dataset:
    """The data set with every labelled case that shows more than a crop replaced by crops around its labels.

    Their files are written into `folder`, in canonical orientation; a run that goes on finds them there, and reads no
    image again of a case whose files are as they were. They keep the patient and the fingerprints of the whole images,
    and are called NAME-1, NAME-2 from left to right, also in the split that lies with the data set. A case that cannot
    be read, has no labelled voxel, or a label on another grid than its image, stays as it is.
    Raises InvresError where the disk refuses; Cancelled between two cases once `stopped` says so.
    """
    replaced: dict[str, list[Case]] = {}
    known = _Known(folder / KNOWN)
    report.progress("prepare.cases", 0, len(dataset.cases))
    for count, case in enumerate(dataset.cases, start=1):
        if stopped():
            raise Cancelled("Stopped while the cases were cropped.", hint="Give the same command again to go on.")
        stamp = _stamp(dataset, case, crop)
        parts = known.parts(case, stamp)
        if parts is None:
            try:
                parts = _parts(dataset, case, crop, folder)
            except (InvresError, OSError, RuntimeError, ValueError, MemoryError) as error:
                if isinstance(error, InvresError) and error.code == "write_failed":
                    raise
                parts = []  # whoever prepares the case says what is wrong with it
            else:
                known.add(case, stamp, parts)
        if parts:
            replaced[case.name] = parts
        report.progress("prepare.cases", count, len(dataset.cases))
    if not replaced:
        return dataset
    named = f"{', '.join([*replaced][:5])}{' and more' if len(replaced) > 5 else ''}"
    report.note(f"The model learns from crops around the {crop.around[0]}: around the labels of {named}.")
    root = dataset.root
    if (root / SPLITS).is_file():
        root = _split_again(dataset, {name: [part.name for part in parts] for name, parts in replaced.items()}, folder)
    cases = [part for case in dataset.cases for part in replaced.get(case.name, [case])]
    return dataclasses.replace(dataset, cases=tuple(cases), channels_in_one_file=False, root=root)


class _Known:
    """Which crops were made of which files, on disk. It is only ever a saving of time: what is odd in it counts not."""

    def __init__(self, path: Path):
        self._path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        self._entries: dict[str, Any] = content if isinstance(content, dict) else {}

    def parts(self, case: Case, stamp: str) -> list[Case] | None:
        """The crops of a case whose files are as they were, [] where it stays as it is; None where it is not known."""
        folder, found = self._path.parent, []
        try:
            entry = self._entries[case.name]
            if entry["stamp"] != stamp:
                return None
            for name, images, label in entry["parts"]:
                files = [None if image is None else folder / image for image in images]
                if not all(file.is_file() for file in (*files, folder / label) if file is not None):
                    return None
                # Without fingerprints it was made by an earlier version, and is made anew.
                found.append(Case(name, tuple(files), folder / label, case.patient, tuple(entry["fingerprints"])))
        except (KeyError, TypeError, ValueError):
            return None
        return found

    def add(self, case: Case, stamp: str, parts: Sequence[Case]) -> None:
        """Keeps what was made of a case. Raises InvresError where the disk refuses."""
        named = [
            (part.name, [None if image is None else image.name for image in part.images], part.label.name)
            for part in parts
            if part.label is not None
        ]
        whole = sorted({one for part in parts for one in part.fingerprints})
        self._entries[case.name] = {"stamp": stamp, "parts": named, "fingerprints": whole}
        try:
            with written_whole(self._path) as temporary:
                temporary.write_text(json.dumps(self._entries), encoding="utf-8")
        except OSError as error:
            raise InvresError(
                f"{self._path} cannot be written: {error.strerror or error}.",
                hint="Free some space and go on with --resume.",
                code="write_failed",
            ) from None


def _stamp(dataset: Dataset, case: Case, crop: CropPlan) -> str:
    """What changes with the files, the crop and the labels."""
    said = [stamps_of((*case.images, case.label)), to_dict(crop), to_dict(dataset.scheme)]
    content = json.dumps([*said, "aligned"] if dataset.aligned else said)
    return hashlib.sha256(content.encode()).hexdigest()


def _split_again(dataset: Dataset, names: dict[str, list[str]], folder: Path) -> Path:
    """Writes the data set's split with the new names into `folder`, which it returns."""

    def renamed(given: Sequence[str]) -> list[str]:
        return [new for name in given for new in names.get(name, [name])]

    splits = read_splits(dataset.root / SPLITS, dataset)
    sides = [{"train": renamed(train), "val": renamed(validation)} for train, validation in splits]
    with written_whole(folder / SPLITS) as temporary:
        temporary.write_text(json.dumps(sides), encoding="utf-8")
    return folder


def _parts(dataset: Dataset, case: Case, crop: CropPlan, folder: Path) -> list[Case]:
    if case.label is None:
        return []
    volumes, label = dataset.load(case)
    if label is None or is_crop(crop, volumes):
        return []
    known = fingerprints(volumes)  # of the crops it would change with every corrected label
    values = [value for one in dataset.scheme.labels for value in one.values]
    names = [name for name, volume in zip(dataset.channel_names, volumes, strict=True) if volume is not None]
    given, label = on_one_grid([volume for volume in volumes if volume is not None], label, names, case.name)
    assert label is not None
    drawn = Volume(label.array, given[0].geometry)  # a label may lie a hundredth of a millimetre beside
    left = iter(given)
    volumes = [None if volume is None else next(left) for volume in volumes]
    boxes = boxes_around(np.isin(drawn.array, values), drawn, crop.margin_mm)
    parts = []
    for number, box in enumerate(boxes, start=1):
        (*images, truth), _ = cut_out([*volumes, drawn], box)
        name = f"{case.name}-{number}"
        files = [
            None if image is None else _written(folder / f"{name}_{channel:04d}.nii.gz", image)
            for channel, image in enumerate(images)
        ]
        assert truth is not None
        target = _written(folder / f"{name}_label.nii.gz", truth)
        parts.append(Case(name, tuple(files), target, case.patient, known))
    return parts


def _written(path: Path, volume: Volume) -> Path:
    write_volume(path, volume)
    return path
