"""Label maps without images, as a data set to train on by synthesis."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import InvresError
from .cases import Dataset
from .config import ChannelPlan, Label, LabelScheme, PreparationPlan, Recipe, TrainingConfig
from .dataset_json import Case, list_volumes, stem_of
from .events import SILENT, Reporter
from .files import stamps_of, written_whole
from .labelmapbatches import LabelMapBatches
from .metrics import dice_by_label
from .networks import SegmentationNetwork
from .prediction import confidence_of, predict_probabilities
from .preprocessing import SAME_SPACING, nonzero_box
from .synthesisconfig import LabelMapConfig
from .validation import mean_of_present
from .volume import read_volume, resample

__all__ = ["CHANNEL", "SyntheticScenes", "label_map_batches", "label_map_plan", "read_label_maps"]

CHANNEL = "MR"
HELD_OUT_SEED = 1_000_000  # added, so that validation never draws an image of the training
LARGEST_VALUE = 32767
SCENES = 2  # synthetic images for each map that is validated on


def read_label_maps(root: Path, labels: Sequence[Label]) -> Dataset:
    """A folder of label maps, one file a person, as a data set of cases without images.

    labels: the recipe's, with the values of the files. Raises InvresError for a folder without label maps.
    """
    if not labels:
        raise InvresError(
            "A recipe with label_maps must list its labels.", hint='Add "labels": [{"name": ..., "values": [...]}].'
        )
    folder = root / "labels" if (root / "labels").is_dir() else root
    files = list_volumes(folder) if folder.is_dir() else []
    if not files:
        raise InvresError(
            f"There are no label maps in {root}.",
            hint="Give a folder with one label map (NIfTI, NRRD) for each person.",
        )
    cases = tuple(Case(stem_of(path), (), path) for path in files)
    return Dataset(root.name, (CHANNEL,), ("MR",), LabelScheme(tuple(labels)), cases, root, "label maps")


def label_map_plan(recipe: Recipe) -> PreparationPlan:
    """How real images are prepared for a model trained on label maps: one channel of any contrast."""
    if recipe.spacing_mm is None:
        raise InvresError(f"The recipe {recipe.name} has label_maps and must give its spacing_mm.")
    return PreparationPlan((ChannelPlan(CHANNEL, "MR"),), recipe.spacing_mm)


def label_map_batches(
    dataset: Dataset,
    names: Sequence[str],
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    report: Reporter = SILENT,
) -> LabelMapBatches:
    """Batches of the named label maps, which are read once and kept in `folder` for a resumed training."""
    maps = []
    report.progress("prepare.cases", 0, len(names))
    for count, name in enumerate(names, start=1):
        maps.append(_prepared(dataset.case(name), recipe, folder, report))
        report.progress("prepare.cases", count, len(names))
    return LabelMapBatches(maps, dataset.scheme, _settings(recipe), recipe.training, device)


class SyntheticScenes:
    """Synthetic images of label maps that are not trained on, always the same ones, to score a network on."""

    def __init__(
        self,
        dataset: Dataset,
        names: Sequence[str],
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        report: Reporter = SILENT,
    ):
        self._names, self._window = dataset.scheme.names, recipe.window_or_patch
        seed = (recipe.training.seed + HELD_OUT_SEED) % 2**32
        config = TrainingConfig(patch=self._window, batch_size=1, seed=seed)
        maps = [_prepared(dataset.case(name), recipe, folder, report) for name in names]
        self._count = SCENES * len(maps)
        settings = dataclasses.replace(_settings(recipe), beginning=None, beginning_iterations=0)
        self._batches = LabelMapBatches(maps, dataset.scheme, settings, config, device, complete=False)

    def validate(self, network: SegmentationNetwork) -> dict[str, float]:
        """The mean Dice of each label, and of all that the maps have as "mean"."""
        scores, _, present = self._looked_at(network)
        means = scores.mean(axis=0)
        return {**dict(zip(self._names, means.tolist(), strict=True)), "mean": mean_of_present(means, present)}

    def scores(self, network: SegmentationNetwork) -> tuple[np.ndarray, list[float]]:
        """Dice (scenes, labels), and the confidence of each scene."""
        scores, confidences, _ = self._looked_at(network)
        return scores, confidences

    def _looked_at(self, network: SegmentationNetwork) -> tuple[np.ndarray, list[float], np.ndarray]:
        """What `scores` gives, and which labels any of the scenes has."""
        scores, confidences, labels = [], [], range(1, len(self._names) + 1)
        present = np.zeros(len(labels), dtype=bool)
        for number in range(self._count):
            image, target = self._batches.batch(number)
            probabilities = predict_probabilities(network, image[0], self._window, False)
            confidences.append(confidence_of(probabilities, False))
            found = probabilities.argmax(dim=0)
            predicted, reference = (
                np.stack([(array == label).cpu().numpy() for label in labels]) for array in (found, target[0])
            )
            scores.append(dice_by_label(predicted, reference))
            present |= reference.any(axis=(1, 2, 3))
        return np.array(scores), confidences, present


def _settings(recipe: Recipe) -> LabelMapConfig:
    assert recipe.label_maps is not None  # the caller has looked
    return recipe.label_maps


def _prepared(case: Case, recipe: Recipe, folder: Path, report: Reporter) -> np.ndarray:
    """The label map in canonical orientation on the finer spacing, cropped to what is not background: int16."""
    assert case.label is not None and recipe.spacing_mm is not None
    spacing = tuple(size / _settings(recipe).finer for size in recipe.spacing_mm)
    key = json.dumps([stamps_of([case.label]), spacing])
    kept = folder / f"labelmap-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if kept.is_file():
        return np.load(kept)
    volume = read_volume(case.label, kind="labels", report=report).canonical()
    grid = volume.geometry.with_spacing((spacing[0], spacing[1], spacing[2]))
    if not np.allclose(volume.geometry.spacing_mm, spacing, rtol=SAME_SPACING, atol=0):
        volume = resample(volume, grid, interpolation="label")
    lowest, highest = int(volume.array.min()), int(volume.array.max())
    if lowest < 0 or highest > LARGEST_VALUE:
        raise InvresError(
            f"The label map {case.label.name} has values from {lowest} to {highest}; 0 to {LARGEST_VALUE} are allowed.",
            hint="Renumber its labels.",
        )
    if not highest:
        raise InvresError(f"The label map {case.label.name} is empty.", hint="Remove it from the folder.")
    array = np.ascontiguousarray(volume.array[nonzero_box([volume.array])]).astype(np.int16)
    with written_whole(kept) as temporary, open(temporary, "wb") as stream:
        np.save(stream, array)
    return array
