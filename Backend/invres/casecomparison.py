"""One case before and after: base and tuned model segment it and are scored against its label map."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from . import InvresError
from .alignment import LABEL_TOLERANCE_MM
from .cases import Case, Dataset
from .config import ChannelPlan, LabelScheme
from .events import SILENT, Reporter
from .files import safe_name
from .fingerprints import fingerprints
from .inference import segment_volumes
from .manifest import Manifest
from .metrics import score_masks
from .modelpackage import ModelPackage
from .networks import SegmentationNetwork
from .prediction import SegmentOptions, confidence_of
from .transfer import match_names
from .volume import Volume, write_segmentation

__all__ = ["CaseComparison", "Contender", "can_segment", "channels_for", "compare_case"]


@dataclass(frozen=True)
class Contender:
    """A model that takes part. network: with its weights, on its device."""

    package: ModelPackage
    network: SegmentationNetwork


@dataclass(frozen=True)
class CaseComparison:
    """One case.

    base, tuned: label name -> metric -> value; volume errors are absolute. A label that the base model does not have
    is missing in `base`. worst_point_mm: RAS, the middle of the tuned model's largest error; None where there is none.
    files: where segmentations were written, their paths by "base" and "tuned", and what they were made of and compared
    with: "images" (a list, in the data's order of channels) and "reference". reference_values: of that label map, by
    label. without: channel that was left out -> label name -> Dice of the tuned
    model, for each channel that it can do without. confidence: of the tuned model (`prediction.confidence_of`).
    empty: by "base" and "tuned", label name -> which mask is empty (`metrics.LabelScore.empty`).
    base_knows: the base model was trained on one of the case's images.
    """

    case: str
    patient: str
    base: dict
    tuned: dict
    worst_point_mm: tuple[float, float, float] | None = None
    files: dict = field(default_factory=dict)
    reference_values: dict = field(default_factory=dict)
    without: dict = field(default_factory=dict)
    confidence: float = 0.0
    empty: dict = field(default_factory=dict)
    base_knows: bool = False

    def difference(self, metric: str = "Dice") -> float | None:
        """Tuned minus base, mean over the labels that both have; None where there is none."""
        values = [self.tuned[name][metric] - self.base[name][metric] for name in self.base]
        return float(np.mean(values)) if values else None


def compare_case(
    dataset: Dataset,
    case: Case,
    base: Contender | None,
    tuned: Contender,
    folder: Path | None = None,
    report: Reporter = SILENT,
    leave_out: bool = False,
) -> CaseComparison:
    """Segments one labelled case with both models and scores them against its label map, on the case's own grid.

    base: None where it cannot take the case's channels. folder: where both segmentations are written, if anywhere.
    leave_out: also score the tuned model without each channel that it can do without, one at a time.
    Labels of `dataset` are matched to those of each model by name.
    Raises InvresError for a case that cannot be read, or that lacks a channel which a model needs.
    """
    volumes, label = dataset.load(case, report)
    if label is None or case.label is None:
        raise InvresError(f"The case {case.name} has no label to compare with.", hint="Leave it out.")
    scores: dict[str, dict[str, dict[str, float]]] = {"base": {}}
    empty: dict[str, dict[str, str]] = {"base": {}}
    files: dict[str, Any] = {}
    if folder is not None:
        images = [str(path.absolute()) for path in case.images if path is not None]
        files = {"images": images, "reference": str(case.label.absolute())}
    for key, contender in (("base", base), ("tuned", tuned)):
        if contender is None:
            continue
        scheme = contender.package.manifest.scheme
        given = _ordered(contender.package.manifest, dataset, volumes)
        found, probabilities, _ = segment_volumes(contender.package, contender.network, given, SegmentOptions(), report)
        confidence = confidence_of(probabilities, scheme.regions)
        del probabilities  # it would stand beside those of the next model
        predicted, reference = _on_one_grid(found, label, case.name)
        scores[key], empty[key], wrong = _scores(predicted, reference, scheme, dataset.scheme, scores["base"])
        if folder is not None:
            path = folder / f"{safe_name(case.name)}_{key}.seg.nrrd"
            write_segmentation(path, found, scheme)
            files[key] = str(path)
    # The tuned model is the last, and always there.
    worst = _worst_point(wrong, reference)
    without: dict[str, dict[str, float]] = {}
    for place, channel in enumerate(tuned.package.manifest.plan.channels) if leave_out else ():
        rest = [None if other == place else volume for other, volume in enumerate(given)]
        if channel.optional and given[place] is not None and any(volume is not None for volume in rest):
            found, _, _ = segment_volumes(tuned.package, tuned.network, rest, SegmentOptions(), report)
            predicted, reference = _on_one_grid(found, label, case.name)
            rescored, _, _ = _scores(predicted, reference, scheme, dataset.scheme)
            without[channel.name] = {name: of_label["Dice"] for name, of_label in rescored.items()}
    values = {one.name: list(one.values) for one in dataset.scheme.labels} if files else {}
    learned = () if base is None else base.package.manifest.trained_on
    knows = bool(learned) and not {*learned}.isdisjoint(case.fingerprints or fingerprints(volumes))
    return CaseComparison(
        case.name,
        case.patient,
        scores["base"],
        scores["tuned"],
        worst,
        files,
        values,
        without,
        confidence,
        empty,
        knows,
    )


def channels_for(wanted: Sequence[ChannelPlan], names: Sequence[str]) -> list[int | None] | None:
    """Places, among `names`, of a model's channels in its order, None for an optional one that is missing.

    None instead of a list where one that is not optional is missing, or all are.
    """
    places = match_names([channel.name for channel in wanted], names, alone=True)
    needed = any(place is None and not channel.optional for place, channel in zip(places, wanted, strict=True))
    return None if needed or all(place is None for place in places) else places


def can_segment(wanted: Sequence[ChannelPlan], dataset: Dataset, case: Case) -> bool:
    """Whether a case has the channels that a model of these needs."""
    if dataset.channels_in_one_file:
        return channels_for(wanted, dataset.channel_names) is not None
    places = channels_for(wanted, dataset.channel_names)
    there = dict(enumerate(dataset.present(case)))
    found = [place is not None and there.get(place, False) for place in places or ()]
    return any(found) and all(here or channel.optional for here, channel in zip(found, wanted, strict=True))


def _ordered(manifest: Manifest, dataset: Dataset, volumes: Sequence[Volume | None]) -> list[Volume | None]:
    """The case's volumes in the order of the model's channels."""
    chosen = channels_for(manifest.plan.channels, dataset.channel_names)
    if chosen is None:
        raise InvresError(
            f"The model {manifest.name} takes the channels {', '.join(c.name for c in manifest.plan.channels)}, "
            f"which {dataset.name} does not have.",
            hint=f"Its channels are {', '.join(dataset.channel_names)}; rename them if they are the same.",
        )
    return [None if place is None else volumes[place] for place in chosen]


def _scores(
    predicted: Volume, reference: Volume, scheme: LabelScheme, wanted: LabelScheme, known: Collection[str] = ()
) -> tuple[dict[str, dict[str, float]], dict[str, str], np.ndarray]:
    """Metrics of the labels that a model's scheme shares with the data's, which of their masks is empty, and where the
    model is wrong.

    known: labels that the other model has. What this one has given up counts as not found: it was forgotten.
    """
    counted = np.ones(reference.array.shape, dtype=bool)
    if wanted.ignore_value is not None:
        counted = reference.array != wanted.ignore_value
    wrong = np.zeros(reference.array.shape, dtype=bool)
    scores: dict[str, dict[str, float]] = {}
    empty: dict[str, str] = {}
    for label, place in zip(wanted.labels, match_names(wanted.names, scheme.names), strict=True):
        if place is None and label.name not in known:
            continue
        values: tuple[int, ...] = ()
        if place is not None:
            own = scheme.labels[place]
            values = own.values if scheme.regions else (own.output_value,)
        inside = np.isin(predicted.array, values) & counted
        truth = np.isin(reference.array, label.values) & counted
        score = score_masks(inside, truth, reference.geometry.spacing_mm)
        wrong |= inside != truth
        scores[label.name] = {
            "Dice": score.dice,
            "HD95_mm": score.hd95_mm,
            "VolumeError_ml": abs(score.volume_error_ml),
        }
        empty[label.name] = score.empty
    return scores, empty, wrong


def _on_one_grid(predicted: Volume, reference: Volume, name: str) -> tuple[Volume, Volume]:
    if not predicted.geometry.same_as(reference.geometry, tolerance_mm=LABEL_TOLERANCE_MM):
        predicted, reference = predicted.canonical(), reference.canonical()
    if not predicted.geometry.same_as(reference.geometry, tolerance_mm=LABEL_TOLERANCE_MM):
        raise InvresError(
            f"The label of {name} lies on another grid than its image "
            f"({predicted.geometry.difference(reference.geometry)}).",
            hint="Resample the label to the image's grid with nearest neighbours.",
        )
    return predicted, reference


def _worst_point(wrong: np.ndarray, grid: Volume) -> tuple[float, float, float] | None:
    """RAS mm of the wrong voxel that lies deepest inside an error."""
    if not wrong.any():
        return None
    # The border of the volume counts as right, so that an error there has a middle too.
    depth = ndimage.distance_transform_edt(np.pad(wrong, 1), sampling=grid.geometry.spacing_mm)
    index = np.array(np.unravel_index(int(depth.argmax()), depth.shape)) - 1
    x, y, z = (float(value) for value in (grid.geometry.affine @ [*index, 1])[:3])
    return x, y, z
