"""Before and after: base and tuned model on the same cases, case by case, and what that proves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import InvresError
from .casecomparison import CaseComparison
from .config import LabelScheme
from .configjson import to_dict
from .events import aligned, listed
from .files import written_whole
from .intervals import patient_means, patient_spread
from .metrics import EMPTY_DISTANCE_MM
from .paireddifference import (
    NOT_ENOUGH,
    NOTHING,
    beyond_doubt,
    difference,
    mean_text,
    signed_text,
    told,
    verdict,
)

__all__ = ["comparison_table", "summarise", "write_comparison"]

METRICS = ("Dice", "HD95_mm", "VolumeError_ml")
LARGER_IS_BETTER = {"Dice": True, "HD95_mm": False, "VolumeError_ml": False}


def summarise(
    cases: Sequence[CaseComparison],
    held_out: bool,
    scheme: LabelScheme,
    which: str = "held out from training",
    dropped: Sequence[str] = (),
) -> dict[str, Any]:
    """All that is said of a comparison, as plain JSON values.

    `labels`: by name and metric the spread of base and tuned over patients (cases of one patient are not independent),
    and of their paired difference with its interval, of the cases that both could segment, or of all where the base
    model has none; under "empty" in how many cases which mask is empty, of base and tuned.
    `difference`: of Dice, mean over labels, patient by patient.
    `verdict`: better, worse, as good, not enough data to tell; or nothing to compare, where the base model has none of
    the labels or cannot take the channels. `promotable`: held out and not worse as far as can be seen, neither as a
    whole nor in a label. `worse_labels`: whose own Dice got worse beyond doubt, whatever the mean did; of many labels
    some seem to by chance, which is allowed for (`intervals.rejected`).
    `dropped_labels`: of the base model, which the tuned one no longer has, as given in dropped. `cases`: worst first.
    `without`: Dice of the tuned model by channel that was left out, mean over labels, beside that of the same cases
    with it.
    held_out: False where the model was trained on these very cases, which proves nothing. which: cases, in words.
    """
    ordered = sorted(cases, key=lambda one: (one.difference() or 0.0, _mean_dice(one.tuned)))
    overall = difference(
        patient_means((one.patient, value) for one in cases if (value := one.difference()) is not None)
    )
    claim = verdict(overall)
    if not held_out and claim != NOTHING:
        claim = NOT_ENOUGH
    labels = {name: _label_summary(name, cases) for name in scheme.names}
    worse = _worse_labels(scheme.names, cases) if held_out else []
    tuned_dice = float(np.mean([_mean_dice(one.tuned) for one in cases])) if cases else 0.0
    return {
        "held_out": held_out,
        "n_cases": len(cases),
        "n_patients": len({one.patient for one in cases}),
        "verdict": claim,
        "promotable": held_out and not worse and not dropped and _promotable(claim, overall, tuned_dice),
        "sentence": _sentence(claim, overall, cases, held_out, which) + _of_labels(worse, dropped) + _known(cases),
        "difference": overall,
        "labels": labels,
        "worse_labels": worse,
        "dropped_labels": list(dropped),
        "without": _without(cases),
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
    rows = [["label", "metric", "base", "tuned", "difference [95 % interval]", "n", "empty"]]
    penalised = False
    for name, of_label in content["labels"].items():
        lacking = [of["predicted"] + of["reference"] for of in (of_label["empty"]["base"], of_label["empty"]["tuned"])]
        penalised = penalised or any(lacking)
        for metric in METRICS:
            values = of_label[metric]
            decimals = 3 if metric == "Dice" else 2
            rows.append(
                [
                    name if metric == METRICS[0] else "",
                    metric,
                    mean_text(values["base"], decimals),
                    mean_text(values["tuned"], decimals),
                    signed_text(values["difference"], decimals),
                    str(values["tuned"]["n"]),
                    "/".join(map(str, lacking)) if metric == "HD95_mm" else "",
                ]
            )
    lines = [content["sentence"], "", *aligned(rows), ""]
    if content["n_patients"] != content["n_cases"]:
        lines += ["Means and differences are over patients: all cases of one count as one, by their mean.", ""]
    if penalised:
        lines += [
            "empty: in how many cases one mask of the two is empty, base/tuned; each counts in the mean of HD95 as "
            f"{EMPTY_DISTANCE_MM} mm.",
            "",
        ]
    both = {name: of["empty"]["tuned"]["both"] for name, of in content["labels"].items()}
    if any(both.values()):
        counts = ", ".join(f"{name} {count}" for name, count in both.items() if count)
        lines += [f"Cases that count as Dice 1 for being empty in reference and tuned result: {counts}.", ""]
    if content["without"]:
        lefts = [["  without", "Dice", "with it", "n"]]
        for channel, of_both in content["without"].items():
            means = [mean_text(of_both[which], 3) for which in ("without", "with")]
            lefts.append([f"  {channel}", *means, str(of_both["with"]["n"])])
        lines += ["The tuned model where a channel is left out (mean over labels):", *aligned(lefts), ""]
    lines.append("Cases, worst first (difference in Dice, mean over labels):")
    cases = [["  case", "difference", "Dice base", "Dice tuned", "worst label"]]
    for one in content["cases"]:
        base = "-" if not one["base"] else f"{_mean_dice(one['base']):.3f}"
        change = "-" if one["difference"] is None else f"{one['difference']:+.3f}"
        tuned = f"{_mean_dice({k: v for k, v in one['tuned'].items() if k in one['base'] or not one['base']}):.3f}"
        cases.append([f"  {one['case']}", change, base, tuned, one["worst_label"]])
    return "\n".join([*lines, *aligned(cases)])


def _patient_differences(name: str, metric: str, cases: Sequence[CaseComparison]) -> list[float]:
    """Tuned minus base of a label, a mean for each patient."""
    return patient_means(
        (one.patient, one.tuned[name][metric] - one.base[name][metric]) for one in cases if name in one.base
    )


def _worse_labels(names: Sequence[str], cases: Sequence[CaseComparison]) -> list[str]:
    differences = {name: _patient_differences(name, "Dice", cases) for name in names}
    distinct = beyond_doubt(differences)
    return [name for name in names if name in distinct and np.mean(differences[name]) < 0]


def _label_summary(name: str, cases: Sequence[CaseComparison]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    # Means whose difference stands beside them are of the same cases.
    both = [one for one in cases if name in one.base]
    for metric in METRICS:
        summary[metric] = {
            "base": _over_patients([(one.patient, one.base[name][metric]) for one in both]),
            "tuned": _over_patients([(one.patient, one.tuned[name][metric]) for one in both or cases]),
            "difference": difference(_patient_differences(name, metric, cases)),
            "larger_is_better": LARGER_IS_BETTER[metric],
        }
    summary["empty"] = {}
    for which in ("base", "tuned"):
        counts = Counter(one.empty.get(which, {}).get(name) for one in cases)
        summary["empty"][which] = {kind: counts[kind] for kind in ("predicted", "reference", "both")}
    return summary


def _over_patients(values: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """`patient_spread` of (patient, value) by case."""
    return patient_spread([value for _, value in values], [patient for patient, _ in values])


def _without(cases: Sequence[CaseComparison]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for channel in dict.fromkeys(channel for one in cases for channel in one.without):
        some = [one for one in cases if channel in one.without]
        found[channel] = {
            "without": _over_patients(
                [(one.patient, float(np.mean(list(one.without[channel].values())))) for one in some]
            ),
            "with": _over_patients([(one.patient, _mean_dice(one.tuned)) for one in some]),
        }
    return found


def _promotable(claim: str, overall: Mapping[str, Any], tuned_dice: float) -> bool:
    if claim == NOTHING:
        return tuned_dice > 0
    return claim in ("better", "as good") or (claim == NOT_ENOUGH and overall["mean"] >= 0)


def _sentence(
    claim: str,
    overall: Mapping[str, Any],
    cases: Sequence[CaseComparison],
    held_out: bool,
    which: str,
) -> str:
    if not cases:
        return "No case was held out, so there is no proof: not enough data to tell."
    count = "1 case" if len(cases) == 1 else f"{len(cases)} cases"
    where = f"On {count} {which}"
    if not held_out:
        where = f"With one patient no case can be held out; on the {count} that it was trained on"
    if claim == NOTHING:
        dice = _over_patients([(one.patient, _mean_dice(one.tuned)) for one in cases])["mean"]
        return f"{where} the tuned model has a Dice of {dice:.3f}; the base model has nothing to compare it with."
    both = [one for one in cases if one.base]
    base = _over_patients([(one.patient, _mean_dice(one.base)) for one in both])["mean"]
    tuned = _over_patients([(one.patient, _mean_dice({n: one.tuned[n] for n in one.base})) for one in both])["mean"]
    change = f"{where} the Dice went from {base:.3f} to {tuned:.3f}{told(overall)}"
    if not held_out:
        return f"{change}, which proves nothing about other cases: {NOT_ENOUGH}."
    words = {"as good": "as good as before", NOT_ENOUGH: NOT_ENOUGH}
    return f"{change}: {words.get(claim, f'{claim} than before')}."


def _of_labels(worse: Sequence[str], dropped: Sequence[str]) -> str:
    text = f" Labels that got worse: {', '.join(worse)}." if worse else ""
    return text + (f" Labels of the base model that it no longer has: {', '.join(dropped)}." if dropped else "")


def _known(cases: Sequence[CaseComparison]) -> str:
    known = [one.case for one in cases if one.base_knows]
    if not known:
        return ""
    which = "all of these cases" if len(known) == len(cases) else f"{len(known)} of these {len(cases)} cases"
    return f" The base model was itself trained on {which}, which flatters it ({listed(known)})."


def _worst_label(one: CaseComparison) -> str:
    return min(one.tuned, key=lambda name: one.tuned[name]["Dice"]) if one.tuned else ""


def _mean_dice(scores: Mapping[str, Mapping[str, float]]) -> float:
    return float(np.mean([of_label["Dice"] for of_label in scores.values()])) if scores else 0.0
