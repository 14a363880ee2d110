"""How well a network does on cases that it is not trained on: while it trains, and for the card of its model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from .cases import Dataset
from .config import LabelScheme, Recipe, TrainingConfig
from .faults import is_out_of_memory
from .metrics import dice_by_label
from .networks import SegmentationNetwork
from .pieces import clear_loose_pieces
from .prediction import SegmentOptions, confidence_of, predict_probabilities
from .preprocessing import PreparedCase, on_one_grid, scheme_targets
from .restoration import restore_probabilities
from .trainer import Validation
from .volume import Volume, read_volume

__all__ = ["card_scores", "labels_in_files", "mean_of_present", "validator"]

Triple = tuple[int, int, int]

VALIDATION_OVERLAP = 0.25  # between windows while training; less than for results, for speed


def validator(
    cases: list[PreparedCase], scheme: LabelScheme, config: TrainingConfig, device: torch.device
) -> Validation | None:
    """A function from a network to the mean Dice of each label and their "mean", of whole cases; None without cases.

    It is taken on the prepared grid, which is quick and tells one epoch from another; not what spacing costs. The mean,
    by which an epoch is chosen, is that of `mean_of_present`.
    """
    chosen = cases[: config.validation_cases] if config.validation_cases else cases
    if not chosen:
        return None
    options = SegmentOptions(overlap=VALIDATION_OVERLAP)

    def validate(network: SegmentationNetwork) -> dict[str, float]:
        scores, present = [], np.zeros(len(scheme.labels), dtype=bool)
        for case in chosen:
            probabilities = _predict(network, case, scheme.regions, config.patch, options, device)
            dice, there = _dice(probabilities, case, scheme)
            scores.append(dice)
            present |= there
        means = np.mean(scores, axis=0)
        return {
            **dict(zip(scheme.names, means.tolist(), strict=True)),
            "mean": mean_of_present(means, present),
        }

    return validate


def mean_of_present(means: np.ndarray, present: np.ndarray) -> float:
    """The mean over labels of their Dice, without those that no reference has; of all where none has any.

    A label that is nowhere scores 1 for not being found, from the first epoch on: that says nothing of the network.
    """
    return float(means[present].mean() if present.any() else means.mean())


def labels_in_files(names: Iterable[str], dataset: Dataset) -> np.ndarray:
    """Which labels have a voxel in the label map of any of the named cases, bool (labels); all where none has."""
    present = np.zeros(len(dataset.scheme.labels), dtype=bool)
    for name in names:
        path = dataset.case(name).label
        if path is not None and not present.all():
            reference = read_volume(path, kind="labels").array
            present |= [np.isin(reference, entry.values).any() for entry in dataset.scheme.labels]
    return present if present.any() else ~present


def card_scores(
    network: SegmentationNetwork,
    cases: Iterable[PreparedCase],
    dataset: Dataset,
    recipe: Recipe,
    device: torch.device,
) -> tuple[np.ndarray, list[float]]:
    """Dice (cases, labels) of labelled cases, and the confidence in each, as `evaluate --run` finds them.

    On the grids of the files, against their label maps (those of `dataset`, by the cases' names), so that what is lost
    by the spacing of the network counts; with the windows, the mirrored images and the pieces left out that the model
    segments with. One case at a time is in memory. Raises InvresError for a label map that cannot be read any more.
    """
    options = SegmentOptions(mirror_axes=recipe.mirror_axes)
    scores, confidences = [], []
    for case in cases:
        found = _predict(network, case, dataset.scheme.regions, recipe.window_or_patch, options, device)
        confidences.append(confidence_of(found, dataset.scheme.regions))
        probabilities = found.cpu().numpy()
        del found
        labels = restore_probabilities(probabilities, case.geometry, case.original, dataset.scheme)
        if recipe.one_piece:
            clear_loose_pieces(labels)
        scores.append(_file_dice(Volume(labels, case.original), case.name, dataset))
    return np.array(scores), confidences


def _predict(
    network: SegmentationNetwork,
    case: PreparedCase,
    regions: bool,
    window: Triple,
    options: SegmentOptions,
    device: torch.device,
) -> torch.Tensor:
    """Probabilities (K, D, H, W) on the prepared grid."""
    image = torch.from_numpy(np.array(case.image)).to(device)
    try:
        return predict_probabilities(network, image, window, regions, options)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # The maps of all labels of a whole image may not fit where a training step does.
    return predict_probabilities(network, image, window, regions, options, stitch_device="cpu")


def _dice(probabilities: torch.Tensor, case: PreparedCase, scheme: LabelScheme) -> tuple[list[float], np.ndarray]:
    """Dice of each label on the prepared grid, and which labels the reference has there."""
    assert case.label is not None  # validation cases are labelled
    reference = np.asarray(case.label)
    targets = scheme_targets(reference, scheme)
    if scheme.regions:
        predicted = (probabilities > 0.5).cpu().numpy()
    else:
        best = probabilities.argmax(dim=0).cpu().numpy()
        predicted = np.stack([best == index + 1 for index in range(len(scheme.labels))])
    return dice_by_label(predicted & (reference >= 0), targets), np.asarray(targets.any(axis=(1, 2, 3)))


def _file_dice(found: Volume, name: str, dataset: Dataset) -> list[float]:
    """Dice of each label of a segmentation on the grid of a case's files, label by label, as `evaluation` counts."""
    path, scheme = dataset.case(name).label, dataset.scheme
    assert path is not None  # validation cases are labelled
    (segmentation,), label = on_one_grid([found], read_volume(path, kind="labels"), ["segmentation"], name)
    assert label is not None  # one went in
    predicted, reference = segmentation.array, label.array
    counted = None if scheme.ignore_value is None else reference != scheme.ignore_value
    scores = []
    for entry in scheme.labels:
        # A region is whatever holds one of its values, also where a later region was written over it.
        mask = np.isin(predicted, entry.values) if scheme.regions else predicted == entry.output_value
        target = np.isin(reference, entry.values)
        if counted is not None:
            mask, target = mask & counted, target & counted
        scores += dice_by_label(mask[None], target[None])
    return scores
