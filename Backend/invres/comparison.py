"""Before and after: base and tuned model on the same cases, case by case, and what that proves."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage, stats

from . import InvresError
from .cases import Case, Dataset
from .config import ChannelPlan, LabelScheme, to_dict
from .events import SILENT, Reporter
from .files import written_whole
from .inference import segment_volumes
from .metrics import score_masks
from .modelpackage import ModelPackage
from .networks import SegmentationNetwork
from .prediction import SegmentOptions
from .preprocessing import LABEL_TOLERANCE_MM
from .transfer import match_names
from .volume import Volume, write_segmentation

__all__ = [
    "CaseComparison",
    "Contender",
    "can_segment",
    "channels_for",
    "compare_case",
    "comparison_table",
    "interval",
    "summarise",
    "write_comparison",
]

METRICS = ("Dice", "HD95_mm", "VolumeError_ml")
LARGER_IS_BETTER = {"Dice": True, "HD95_mm": False, "VolumeError_ml": False}
AS_GOOD = 0.01
"""A difference in Dice that does not matter (chosen): an interval within it means "as good as before"."""
FEWEST_RESAMPLED = 5
"""Below this many patients resampling shows hardly any of the uncertainty; Student's t is wide where it must be."""
RESAMPLES = 2000
FEWEST_TOLD = 3
"""Below this many patients nothing is claimed, whatever the interval."""
NOT_ENOUGH = "not enough data to tell"


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
    label.
    """

    case: str
    patient: str
    base: dict
    tuned: dict
    worst_point_mm: tuple[float, float, float] | None = None
    files: dict = field(default_factory=dict)
    reference_values: dict = field(default_factory=dict)

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
) -> CaseComparison:
    """Segments one labelled case with both models and scores them against its label map, on the case's own grid.

    base: None where it cannot take the case's channels. folder: where both segmentations are written, if anywhere.
    Labels of `dataset` are matched to those of each model by name.
    Raises InvresError for a case that cannot be read, or that lacks a channel which a model needs.
    """
    volumes, label = dataset.load(case, report)
    if label is None or case.label is None:
        raise InvresError(f"The case {case.name} has no label to compare with.", hint="Leave it out.")
    scores: dict[str, dict[str, dict[str, float]]] = {"base": {}}
    files: dict[str, Any] = {}
    if folder is not None:
        images = [str(path.absolute()) for path in case.images if path is not None]
        files = {"images": images, "reference": str(case.label.absolute())}
    wrong: np.ndarray | None = None
    for key, contender in (("base", base), ("tuned", tuned)):
        if contender is None:
            continue
        manifest = contender.package.manifest
        chosen = channels_for(manifest.plan.channels, dataset.channel_names)
        if chosen is None:
            raise InvresError(
                f"The model {manifest.name} takes the channels {', '.join(c.name for c in manifest.plan.channels)}, "
                f"which {dataset.name} does not have.",
                hint=f"Its channels are {', '.join(dataset.channel_names)}; rename them if they are the same.",
            )
        ordered = [None if place is None else volumes[place] for place in chosen]
        found, _, _ = segment_volumes(contender.package, contender.network, ordered, SegmentOptions(), report)
        predicted, reference = _on_one_grid(found, label, case.name)
        scores[key], wrong = _scores(predicted, reference, manifest.scheme, dataset.scheme)
        if folder is not None:
            path = folder / f"{_safe(case.name)}_{key}.seg.nrrd"
            write_segmentation(path, found, manifest.scheme)
            files[key] = str(path)
    assert wrong is not None  # the tuned model is never None
    return CaseComparison(
        case.name,
        case.patient,
        scores["base"],
        scores["tuned"],
        _worst_point(wrong, reference),
        files,
        {one.name: list(one.values) for one in dataset.scheme.labels} if files else {},
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


def interval(values: Sequence[float]) -> tuple[tuple[float, float] | None, str]:
    """A 95 % interval of the mean, None for one value, and its method: "bootstrap" (percentile), "t" below 5 values."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return None, ""
    if n < FEWEST_RESAMPLED:
        half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        return (mean - half, mean + half), "t"
    drawn = np.random.default_rng(0).integers(0, n, size=(RESAMPLES, n))
    low, high = np.percentile(np.asarray(values)[drawn].mean(axis=1), (2.5, 97.5))
    return (float(low), float(high)), "bootstrap"


def summarise(
    cases: Sequence[CaseComparison], held_out: bool, scheme: LabelScheme, which: str = "held out from training"
) -> dict[str, Any]:
    """All that is said of a comparison, as plain JSON values.

    `labels`: by name and metric the spread of base and tuned, and of their paired difference with its interval.
    `difference`: of Dice, mean over labels, patient by patient (cases of one patient are not independent).
    `verdict`: better, worse, as good, not enough data to tell; or nothing to compare, where the base model has none of
    the labels or cannot take the channels. `promotable`: held out and not worse as far as can be seen.
    `worse_labels`: whose own Dice got worse beyond doubt, whatever the mean did. `cases`: worst first.
    held_out: False where the model was trained on these very cases, which proves nothing. which: cases, in words.
    """
    ordered = sorted(cases, key=lambda one: (one.difference() or 0.0, _mean_dice(one.tuned)))
    by_patient: dict[str, list[float]] = {}
    for one in cases:
        if (value := one.difference()) is not None:
            by_patient.setdefault(one.patient, []).append(value)
    differences = [float(np.mean(values)) for values in by_patient.values()]
    overall = _difference(differences)
    verdict = _verdict(overall, held_out)
    labels = {name: _label_summary(name, cases) for name in scheme.names}
    worse = [name for name, of_label in labels.items() if _verdict(of_label["Dice"]["difference"], held_out) == "worse"]
    tuned_dice = float(np.mean([_mean_dice(one.tuned) for one in cases])) if cases else 0.0
    return {
        "held_out": held_out,
        "n_cases": len(cases),
        "n_patients": len({one.patient for one in cases}),
        "verdict": verdict,
        "promotable": held_out and _promotable(verdict, overall, tuned_dice),
        "sentence": _sentence(verdict, overall, cases, held_out, worse, which),
        "difference": overall,
        "labels": labels,
        "worse_labels": worse,
        "cases": [
            {**to_dict(one), "difference": one.difference(), "worst_label": _worst_label(one)} for one in ordered
        ],
    }


def write_comparison(folder: Path, content: Mapping[str, Any]) -> Path:
    """comparison.json and comparison.txt in `folder`, each whole or not at all. Returns the path of the first."""
    path = folder / "comparison.json"
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for target, lines in ((path, text), (folder / "comparison.txt", comparison_table(content) + "\n")):
        try:
            with written_whole(target) as temporary:
                temporary.write_text(lines, encoding="utf-8")
        except OSError as error:
            raise InvresError(
                f"The comparison cannot be written to {target}: {error.strerror or error}.",
                hint="Free some space and go on with --resume.",
                code="write_failed",
            ) from None
    return path


def comparison_table(content: Mapping[str, Any]) -> str:
    """What `summarise` returned as text: a row for each label and metric, then the cases, worst first."""
    rows = [["label", "metric", "base", "tuned", "difference [95 % interval]", "n"]]
    for name, of_label in content["labels"].items():
        for metric in METRICS:
            values = of_label[metric]
            decimals = 3 if metric == "Dice" else 2
            rows.append(
                [
                    name if metric == METRICS[0] else "",
                    metric,
                    _mean(values["base"], decimals),
                    _mean(values["tuned"], decimals),
                    _signed(values["difference"], decimals),
                    str(values["tuned"]["n"]),
                ]
            )
    lines = [content["sentence"], "", *_aligned(rows), "", "Cases, worst first (difference in Dice, mean over labels):"]
    cases = [["  case", "difference", "Dice base", "Dice tuned", "worst label"]]
    for one in content["cases"]:
        base = "-" if not one["base"] else f"{_mean_dice(one['base']):.3f}"
        change = "-" if one["difference"] is None else f"{one['difference']:+.3f}"
        tuned = f"{_mean_dice({k: v for k, v in one['tuned'].items() if k in one['base'] or not one['base']}):.3f}"
        cases.append([f"  {one['case']}", change, base, tuned, one["worst_label"]])
    return "\n".join([*lines, *_aligned(cases)])


def _scores(
    predicted: Volume, reference: Volume, scheme: LabelScheme, wanted: LabelScheme
) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """Metrics of the labels that a model's scheme shares with the data's, and where the model is wrong."""
    counted = np.ones(reference.array.shape, dtype=bool)
    if wanted.ignore_value is not None:
        counted = reference.array != wanted.ignore_value
    wrong = np.zeros(reference.array.shape, dtype=bool)
    scores = {}
    for label, place in zip(wanted.labels, match_names(wanted.names, scheme.names), strict=True):
        if place is None:
            continue
        own = scheme.labels[place]
        inside = np.isin(predicted.array, own.values if scheme.regions else [own.output_value]) & counted
        truth = np.isin(reference.array, label.values) & counted
        score = score_masks(inside, truth, reference.geometry.spacing_mm)
        wrong |= inside != truth
        scores[label.name] = {
            "Dice": score.dice,
            "HD95_mm": score.hd95_mm,
            "VolumeError_ml": abs(score.volume_error_ml),
        }
    return scores, wrong


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


def _spread(values: Sequence[float]) -> dict[str, Any]:
    found: dict[str, Any] = {"mean": None, "sd": None, "median": None, "n": len(values)}
    if values:
        found |= {"mean": float(np.mean(values)), "median": float(np.median(values))}
    if len(values) > 1:
        found["sd"] = float(np.std(values, ddof=1))
    return found


def _difference(values: Sequence[float]) -> dict[str, Any]:
    found = {**_spread(values), "ci95": None, "ci95_method": ""}
    if values:
        bounds, method = interval(values)
        found |= {"ci95": None if bounds is None else list(bounds), "ci95_method": method}
    return found


def _label_summary(name: str, cases: Sequence[CaseComparison]) -> dict[str, Any]:
    summary = {}
    for metric in METRICS:
        by_patient: dict[str, list[float]] = {}
        for one in cases:
            if name in one.base:
                by_patient.setdefault(one.patient, []).append(one.tuned[name][metric] - one.base[name][metric])
        summary[metric] = {
            "base": _spread([one.base[name][metric] for one in cases if name in one.base]),
            "tuned": _spread([one.tuned[name][metric] for one in cases if name in one.tuned]),
            "difference": _difference([float(np.mean(values)) for values in by_patient.values()]),
            "larger_is_better": LARGER_IS_BETTER[metric],
        }
    return summary


def _verdict(overall: Mapping[str, Any], held_out: bool) -> str:
    if not overall["n"]:
        return "nothing to compare"
    if not held_out or overall["n"] < FEWEST_TOLD:
        return NOT_ENOUGH
    low, high = overall["ci95"]
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "as good" if low >= -AS_GOOD and high <= AS_GOOD else NOT_ENOUGH


def _promotable(verdict: str, overall: Mapping[str, Any], tuned_dice: float) -> bool:
    if verdict == "nothing to compare":
        return tuned_dice > 0
    return verdict in ("better", "as good") or (verdict == NOT_ENOUGH and overall["mean"] >= 0)


def _sentence(
    verdict: str,
    overall: Mapping[str, Any],
    cases: Sequence[CaseComparison],
    held_out: bool,
    worse: Sequence[str],
    which: str,
) -> str:
    if not cases:
        return "No case was held out, so there is no proof: not enough data to tell."
    count = "1 case" if len(cases) == 1 else f"{len(cases)} cases"
    where = f"On {count} {which}"
    if not held_out:
        where = f"With one patient no case can be held out; on the {count} that it was trained on"
    if verdict == "nothing to compare":
        dice = float(np.mean([_mean_dice(one.tuned) for one in cases]))
        return f"{where} the tuned model has a Dice of {dice:.3f}; the base model has nothing to compare it with."
    base = float(np.mean([_mean_dice(one.base) for one in cases if one.base]))
    tuned = float(np.mean([_mean_dice({n: one.tuned[n] for n in one.base}) for one in cases if one.base]))
    change = f"{where} the Dice went from {base:.3f} to {tuned:.3f}"
    if overall["ci95"] is not None:
        low, high = overall["ci95"]
        change += f" (difference {overall['mean']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})"
    if not held_out:
        return f"{change}, which proves nothing about other cases: {NOT_ENOUGH}."
    words = {"as good": "as good as before", NOT_ENOUGH: NOT_ENOUGH}
    told = f"{change}: {words.get(verdict, f'{verdict} than before')}."
    return f"{told} Labels that got worse: {', '.join(worse)}." if worse else told


def _worst_label(one: CaseComparison) -> str:
    return min(one.tuned, key=lambda name: one.tuned[name]["Dice"]) if one.tuned else ""


def _mean_dice(scores: Mapping[str, Mapping[str, float]]) -> float:
    return float(np.mean([of_label["Dice"] for of_label in scores.values()])) if scores else 0.0


def _mean(spread: Mapping[str, Any], decimals: int) -> str:
    if spread["mean"] is None:
        return "-"
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.{decimals}f}"
    return f"{spread['mean']:.{decimals}f}{sd}"


def _signed(difference: Mapping[str, Any], decimals: int) -> str:
    if difference["mean"] is None:
        return "-"
    bounds = difference["ci95"]
    text = "[n/a]" if bounds is None else "[{:+.{d}f}, {:+.{d}f}]".format(*bounds, d=decimals)
    return f"{difference['mean']:+.{decimals}f} {text}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _safe(name: str) -> str:
    """The name as part of a file name; one that had to be changed is told from others by a checksum."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:80]
    return plain if plain == name else f"{plain}_{zlib.crc32(name.encode()):08x}"
