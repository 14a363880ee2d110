"""Scores a folder of segmentations against their references: per case, per label, with the spread over patients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import InvresError
from .alignment import LABEL_TOLERANCE_MM
from .config import Label, LabelScheme
from .events import SILENT, Reporter, aligned, listed
from .intervals import spread_over_patients
from .metrics import EMPTY_DISTANCE_MM, LabelScore, score_case
from .volume import Volume, read_volume

__all__ = ["case_name", "evaluate", "score_pairs", "summary_table"]

_ENDINGS = (".seg.nrrd", ".nii.gz", ".seg.nhdr", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr")
_WORST_CASES = 3
_DISTANCES = {"HD95": 2, "HD": 2, "ASD": 3, "MHD": 3}
"""In mm, with the decimals that the table shows."""
_WITHIN = {**dict.fromkeys(("Dice", "IoU", "NSD"), (0.0, 1.0)), **dict.fromkeys(_DISTANCES, (0.0, np.inf))}


def evaluate(
    predictions: Path,
    references: Path,
    scheme: LabelScheme | None = None,
    report: Reporter = SILENT,
    tolerance_mm: float = 1.0,
    patients: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Scores every prediction that has a reference of the same name (without ending), or one file against one.

    predictions, references: a folder or a file each; label volumes on the same grid. patients: as `score_pairs` takes
    them.
    Returns what `score_pairs` does, with the further keys `missing_predictions` and `missing_references`.
    A name that only one side has is left out, listed and warned of.
    Raises: InvresError for a missing path, no common name, two files of one name, and as `score_pairs` does.
    """
    pairs, missing_predictions, missing_references = _pairs(Path(predictions), Path(references))
    _warn_of_missing(missing_predictions, missing_references, len(pairs), report)
    found = score_pairs(pairs, scheme, report, tolerance_mm, patients)
    return {**found, "missing_predictions": missing_predictions, "missing_references": missing_references}


def score_pairs(
    pairs: Sequence[tuple[str, Path, Path]],
    scheme: LabelScheme | None = None,
    report: Reporter = SILENT,
    tolerance_mm: float = 1.0,
    patients: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Scores label files against their references: (name of the case, prediction, reference), on the same grid each.

    scheme: the labels to score; None takes every value but 0 found in the references.
    tolerance_mm: of the normalised surface Dice (NSD). patients: of the cases by name; one that it does not have is a
    patient of its own.

    Returns plain JSON values, finite throughout, with the keys of nnU-Net v2's summary.json (`metric_per_case`, `mean`,
    `foreground_mean`; labels keyed "1", regions "(1, 2)"). Unlike nnU-Net, a label that is empty in prediction and
    reference counts, with Dice 1; `mean` and `foreground_mean` are over cases, as its are. Further keys: `summary` (by
    label name and metric: mean, sd and median over patients, whose cases count as one, by their mean; n of cases,
    n_patients, and the 95 % interval of the mean by Student's t, None for one patient; and under "empty" in how many
    cases which mask was empty), `label_names`, `tolerance_mm`, `empty_distance_mm`.
    Raises: InvresError for a file that cannot be read, different grids, no labels.
    """
    if scheme is None:
        scheme = _scheme_of([reference for _, _, reference in pairs])
    if not scheme.labels:
        raise InvresError("There are no labels to score: every reference is empty.", hint="Check the references.")

    keys = {label.name: _key(label) for label in scheme.labels}
    cases: list[dict[str, Any]] = []
    scores: list[dict[str, LabelScore]] = []
    for done, (name, prediction, reference) in enumerate(pairs):
        report.progress("evaluate.cases", done, len(pairs))
        score = _score_files(name, prediction, reference, scheme, tolerance_mm, report)
        scores.append(score)
        cases.append(
            {
                "name": name,
                "patient": (patients or {}).get(name) or name,
                "reference_file": str(reference),
                "prediction_file": str(prediction),
                "metrics": {keys[label]: _values(of_label) for label, of_label in score.items()},
                "empty": {keys[label]: of_label.empty for label, of_label in score.items()},
            }
        )
    report.progress("evaluate.cases", len(pairs), len(pairs))

    of_patients = [case["patient"] for case in cases]
    metrics = tuple(_values(next(iter(scores[0].values()))))
    mean = {
        key: {metric: float(np.mean([case["metrics"][key][metric] for case in cases])) for metric in metrics}
        for key in keys.values()
    }
    return {
        "metric_per_case": cases,
        "mean": mean,
        "foreground_mean": {
            metric: float(np.mean([of_label[metric] for of_label in mean.values()])) for metric in metrics
        },
        "summary": {name: _summary([score[name] for score in scores], of_patients) for name in scheme.names},
        "label_names": {key: name for name, key in keys.items()},
        "tolerance_mm": float(tolerance_mm),
        "empty_distance_mm": EMPTY_DISTANCE_MM,
    }


def summary_table(metrics: dict[str, Any]) -> str:
    """What `evaluate` returned as an aligned table for people: a row per label, then the cases of lowest Dice."""
    rows = [["label", "n", "Dice mean ± sd [95 % CI]", "NSD", "volume error ml", "empty p/r/both"]]
    distances = [["label", *(f"{metric} mm" for metric in _DISTANCES)]]
    for name, of_label in metrics["summary"].items():
        empty = of_label["empty"]
        rows.append(
            [
                name,
                str(of_label["Dice"]["n"]),
                f"{_mean_sd(of_label['Dice'], 3)} {_interval(of_label['Dice'], 3)}",
                _mean_sd(of_label["NSD"], 3),
                _mean_sd(of_label["VolumeError_ml"], 2),
                f"{empty['predicted']}/{empty['reference']}/{empty['both']}",
            ]
        )
        distances.append([name, *(_mean_sd(of_label[metric], digits) for metric, digits in _DISTANCES.items())])
    lines = [*_ruled(rows), "", *_ruled(distances)]
    lines += [
        "",
        f"NSD within {metrics['tolerance_mm']:g} mm. Empty masks (p: only the predicted, r: only the reference): "
        f"Dice 0, distance {metrics['empty_distance_mm']} mm; both: Dice 1, distance 0.",
    ]
    cases, patients = len(metrics["metric_per_case"]), len({case["patient"] for case in metrics["metric_per_case"]})
    if patients != cases:
        of = "1 patient" if patients == 1 else f"{patients} patients"
        lines.append(
            f"The {cases} cases are of {of}, over whom means, sd and intervals are: all cases of one count as one, by "
            "their mean."
        )
    if both := {name: of["empty"]["both"] for name, of in metrics["summary"].items() if of["empty"]["both"]}:
        counts = ", ".join(f"{name} {count} of {metrics['summary'][name]['Dice']['n']}" for name, count in both.items())
        lines.append(f"Cases in these means that count as Dice 1 for being empty in both: {counts}.")
    for key, what in (("missing_predictions", "no prediction"), ("missing_references", "no reference")):
        if metrics.get(key):
            lines.append(f"Not scored, {what}: {listed(metrics[key])}.")
    lines += ["", "Lowest Dice (mean over labels):", *aligned(_worst_cases(metrics))]
    return "\n".join(lines)


def case_name(path: Path) -> str:
    """The name of a volume file without its ending; .nii.gz and .seg.nrrd are endings of two parts."""
    name = Path(path).name
    ending = next((ending for ending in _ENDINGS if name.lower().endswith(ending)), Path(path).suffix)
    return name[: len(name) - len(ending)]


def _pairs(predictions: Path, references: Path) -> tuple[list[tuple[str, Path, Path]], list[str], list[str]]:
    """(name, prediction, reference) by name; names without a prediction; names without a reference."""
    if predictions.is_file() and references.is_file():
        return [(case_name(references), predictions, references)], [], []
    predicted, wanted = _volumes(predictions, "predictions"), _volumes(references, "references")
    common = sorted(predicted.keys() & wanted.keys())
    if not common:
        raise InvresError(
            f"No prediction in {predictions} has a reference of the same name in {references}: "
            f"predictions are {listed(sorted(predicted))}, references are {listed(sorted(wanted))}.",
            hint="Name both alike, for example case_01.nii.gz; the ending may differ.",
        )
    # A single file is a choice of one case: the rest of the other folder is not missing.
    missing_predictions = [] if predictions.is_file() else sorted(wanted.keys() - predicted.keys())
    missing_references = [] if references.is_file() else sorted(predicted.keys() - wanted.keys())
    return [(name, predicted[name], wanted[name]) for name in common], missing_predictions, missing_references


def _volumes(path: Path, what: str) -> dict[str, Path]:
    """Volume files by name: of a folder, or the one file."""
    if path.is_file():
        return {case_name(path): path}
    if not path.is_dir():
        raise InvresError(f"There is no file or folder of {what} {path}.")
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.name.startswith(".") or not file.name.lower().endswith(_ENDINGS) or not file.is_file():
            continue
        name = case_name(file)
        if name in found:
            raise InvresError(
                f"The {what} hold two volumes of the name {name!r}: {found[name].name} and {file.name}.",
                hint="Keep one of them in the folder.",
            )
        found[name] = file
    if not found:
        raise InvresError(f"The folder of {what} {path} holds no volume file; the endings are {', '.join(_ENDINGS)}.")
    return found


def _warn_of_missing(predictions: list[str], references: list[str], scored: int, report: Reporter) -> None:
    for missing, what in ((predictions, "no prediction"), (references, "no reference")):
        if missing:
            counted = "1 case is" if scored == 1 else f"{scored} cases are"
            report.warning(f"{counted} scored; left out for there is {what} of them: {listed(missing)}.")


def _scheme_of(references: list[Path]) -> LabelScheme:
    """One label for every value but 0 that the references hold."""
    values: set[int] = set()
    for path in references:
        values.update(int(value) for value in np.unique(read_volume(path, kind="labels").array))
    found = sorted(values - {0})
    return LabelScheme(tuple(Label(name=f"label {value}", values=(value,), output_value=value) for value in found))


def _score_files(
    name: str, prediction: Path, reference: Path, scheme: LabelScheme, tolerance_mm: float, report: Reporter
) -> dict[str, LabelScore]:
    predicted, wanted = read_volume(prediction, kind="labels"), read_volume(reference, kind="labels")
    predicted, wanted = _on_one_grid(name, predicted, wanted)
    known = {0} | {value for label in scheme.labels for value in label.values}
    if scheme.ignore_value is not None:
        known.add(scheme.ignore_value)
    for values, what in ((predicted.array, "prediction"), (wanted.array, "reference")):
        foreign = np.unique(values[np.isin(values, sorted(known), invert=True)])
        if foreign.size:
            held = listed([str(value) for value in foreign])
            report.warning(f"The {what} of {name} holds values that are no label and count as background: {held}.")
    return score_case(predicted.array, wanted.array, scheme, wanted.geometry.spacing_mm, tolerance_mm)


def _on_one_grid(name: str, predicted: Volume, wanted: Volume) -> tuple[Volume, Volume]:
    """Both in one axis order. Raises InvresError where they do not cover the same voxels in space."""
    if not predicted.geometry.same_as(wanted.geometry, tolerance_mm=LABEL_TOLERANCE_MM):
        # The same voxels may be stored in another axis order, as some programs rewrite them.
        predicted, wanted = predicted.canonical(), wanted.canonical()
    if not predicted.geometry.same_as(wanted.geometry, tolerance_mm=LABEL_TOLERANCE_MM):
        raise InvresError(
            f"The prediction of {name} lies on another grid than its reference: "
            f"{predicted.geometry.difference(wanted.geometry)}.",
            hint="Segment the image that the reference was drawn on, or resample one of them on to the other's grid.",
        )
    return predicted, wanted


def _key(label: Label) -> str:
    """nnU-Net's key: "1" for a label, "(1, 2)" for a region."""
    return str(label.values[0]) if len(label.values) == 1 else str(tuple(label.values))


def _values(score: LabelScore) -> dict[str, float]:
    """One label of one case under nnU-Net's names and ours."""
    return {
        "Dice": score.dice,
        "IoU": score.iou,
        "TP": score.tp,
        "FP": score.fp,
        "FN": score.fn,
        "TN": score.tn,
        "n_pred": score.tp + score.fp,
        "n_ref": score.tp + score.fn,
        "HD": score.hausdorff_mm,
        "HD95": score.hd95_mm,
        "ASD": score.asd_mm,
        "MHD": score.mhd_mm,
        "NSD": score.nsd,
        "VolumePredicted_ml": score.volume_predicted_ml,
        "VolumeReference_ml": score.volume_reference_ml,
        "VolumeError_ml": score.volume_error_ml,
    }


def _summary(scores: list[LabelScore], patients: Sequence[str]) -> dict[str, Any]:
    """Spread of each metric of one label over patients."""
    values = [_values(score) for score in scores]
    volumes = ("VolumePredicted_ml", "VolumeReference_ml", "VolumeError_ml")
    shown = ("Dice", "IoU", *_DISTANCES, "NSD", *volumes)
    summary: dict[str, Any] = {
        metric: spread_over_patients(
            [case[metric] for case in values], patients, _WITHIN.get(metric, (-np.inf, np.inf))
        )
        for metric in shown
    }
    relative = [score.volume_error_relative for score in scores]
    there = [number for number, value in enumerate(relative) if value is not None]
    summary["VolumeError_relative"] = spread_over_patients(
        [value for value in relative if value is not None], [patients[number] for number in there]
    )
    counts = Counter(score.empty for score in scores)
    summary["empty"] = {kind: counts[kind] for kind in ("none", "both", "predicted", "reference")}
    return summary


def _worst_cases(metrics: dict[str, Any]) -> list[list[str]]:
    """The cases of lowest Dice (mean over labels), with their worst label."""

    def mean_dice(case: dict[str, Any]) -> float:
        return float(np.mean([of_label["Dice"] for of_label in case["metrics"].values()]))

    rows = []
    for case in sorted(metrics["metric_per_case"], key=mean_dice)[:_WORST_CASES]:
        key, worst = min(case["metrics"].items(), key=lambda item: item[1]["Dice"])
        label = f"worst {metrics['label_names'][key]}: Dice {worst['Dice']:.3f}, HD95 {worst['HD95']:.2f} mm"
        rows.append([f"  {case['name']}", f"{mean_dice(case):.3f}", label])
    return rows


def _ruled(rows: list[list[str]]) -> list[str]:
    """`aligned`, with a rule below the headings."""
    lines = aligned(rows)
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _mean_sd(spread: dict[str, Any], decimals: int) -> str:
    if spread["sd"] is None:
        return "n/a" if spread["mean"] is None else f"{spread['mean']:.{decimals}f}"
    return f"{spread['mean']:.{decimals}f} ± {spread['sd']:.{decimals}f}"


def _interval(spread: dict[str, Any], decimals: int) -> str:
    if spread["ci95"] is None:
        return "[n/a]"
    return "[{:.{d}f}, {:.{d}f}]".format(*spread["ci95"], d=decimals)
