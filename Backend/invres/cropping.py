"""Whole images as training cases of a model that learns from crops: one case around each labelled place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import InvresError
from .cases import SPLITS, Case, Dataset, read_splits
from .config import CropPlan
from .events import SILENT, Reporter
from .files import written_whole
from .inference import is_crop
from .locating import boxes_around
from .region import cut_out
from .volume import Volume, write_volume

__all__ = ["cropped"]


def cropped(dataset: Dataset, crop: CropPlan, folder: Path, report: Reporter = SILENT) -> Dataset:
    """The data set with every labelled case that shows more than a crop replaced by crops around its labels.

    Their files are written into `folder`, once: a run that goes on finds them there. They keep the patient, and are
    called NAME-1, NAME-2 from left to right, also in the split that lies with the data set. A case that cannot be
    read, or has no labelled voxel, stays as it is.
    """
    replaced: dict[str, list[Case]] = {}
    for case in dataset.cases:
        try:
            if parts := _parts(dataset, case, crop, folder):
                replaced[case.name] = parts
        except (InvresError, OSError):
            continue  # whoever prepares the case says what is wrong with it
    if not replaced:
        return dataset
    named = f"{', '.join([*replaced][:5])}{' and more' if len(replaced) > 5 else ''}"
    report.note(f"The model learns from crops around the {crop.around[0]}: around the labels of {named}.")
    root = dataset.root
    if (root / SPLITS).is_file():
        root = _split_again(dataset, {name: [part.name for part in parts] for name, parts in replaced.items()}, folder)
    cases = [part for case in dataset.cases for part in replaced.get(case.name, [case])]
    return dataclasses.replace(dataset, cases=tuple(cases), channels_in_one_file=False, root=root)


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
    values = [value for one in dataset.scheme.labels for value in one.values]
    grid = next(volume.geometry for volume in volumes if volume is not None)
    # The label lies on the image's grid, or the case is refused when it is prepared.
    boxes = boxes_around(np.isin(label.array, values), Volume(label.array, grid), crop.margin_mm)
    parts = []
    for number, box in enumerate(boxes, start=1):
        (*images, truth), _ = cut_out([*volumes, Volume(label.array, grid)], box)
        name = f"{case.name}-{number}"
        files = [
            None if image is None else _written(folder / f"{name}_{channel:04d}.nii.gz", image)
            for channel, image in enumerate(images)
        ]
        assert truth is not None
        parts.append(Case(name, tuple(files), _written(folder / f"{name}_label.nii.gz", truth), case.patient))
    return parts


def _written(path: Path, volume: Volume) -> Path:
    if not path.is_file():
        write_volume(path, volume)
    return path
