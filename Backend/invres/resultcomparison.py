"""Two results of `invres evaluate` on the same cases: paired differences by label, and what they prove."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import InvresError
from .dataset_json import read_json
from .events import SILENT, Reporter, aligned, listed
from .intervals import p_value, patient_means, patient_spread
from .paireddifference import (
    NOT_ENOUGH,
    beyond_doubt,
    difference,
    mean_text,
    signed_text,
    told,
    verdict,
)

__all__ = ["Result", "compare", "comparison_table", "read_result"]

LARGER_IS_BETTER = {"Dice": True, "HD95": False, "ASD": False, "MHD": False, "NSD": True}
_DECIMALS = {"Dice": 3, "HD95": 2, "ASD": 3, "MHD": 3, "NSD": 3}
_UNITS = {"HD95": " mm", "ASD": " mm", "MHD": " mm"}
WORST_CASES = 5
SAME_DATA = "Score both with the same --data."


@dataclass(frozen=True)
class Result:
    """What `invres evaluate` wrote into `path`.

    cases: by name, each as in `metric_per_case`. keys: label name -> its key in the metrics of a case.
    chosen_on: the cases whose Dice chose the epochs of the models.
    """

    path: Path
    cases: Mapping[str, Mapping[str, Any]]
    keys: Mapping[str, str]
    tolerance_mm: float
    empty_distance_mm: float
    chosen_on: frozenset[str]

    def value(self, case: str, label: str, metric: str) -> float:
        return float(self.cases[case]["metrics"][self.keys[label]][metric])

    def mean(self, case: str, metric: str) -> float:
        """Over the labels."""
        return float(np.mean([self.value(case, label, metric) for label in self.keys]))

    def metrics(self) -> list[str]:
        """Those of `LARGER_IS_BETTER` that the file has: earlier versions wrote fewer."""
        sides = [of_label for case in self.cases.values() for of_label in case["metrics"].values()]
        return [metric for metric in LARGER_IS_BETTER if all(metric in side for side in sides)]


def read_result(path: Path) -> Result:
    """Raises InvresError for a folder, for a file that cannot be read or is no result of `invres evaluate` on
    segmentations, and for one with a metric that is no finite number.
    """
    if path.is_dir():
        raise InvresError(f"{path} is a folder.", hint="Give the JSON file that `invres evaluate` wrote.")
    content = read_json(path)
    try:
        cases = {str(case["name"]): case for case in content["metric_per_case"]}
        result = Result(
            path,
            cases,
            {name: key for key, name in content["label_names"].items()},
            float(content["tolerance_mm"]),
            float(content["empty_distance_mm"]),
            frozenset(content.get("epoch_chosen_on", ())),
        )
        if not _whole(result, content):
            raise ValueError
        _check_numbers(result)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InvresError(
            f"{path} is no result of `invres evaluate` on segmentations.",
            hint="Give two files that it wrote by -p and -r, or by --run.",
        ) from None
    return result


def _whole(result: Result, content: Mapping[str, Any]) -> bool:
    """Whether each case stands there once, with its labels, and each label has a name of its own and a Dice."""
    cases = result.cases.values()
    return (
        0 < len(cases) == len(content["metric_per_case"])
        and 0 < len(result.keys) == len(content["label_names"])
        and all(isinstance(name, str) for name in result.keys)
        and all(isinstance(name, str) for name in result.chosen_on)
        and all(isinstance(case["metrics"][key], dict) for case in cases for key in result.keys.values())
        and all(isinstance(case.get("empty", {}), dict) for case in cases)
        and "Dice" in result.metrics()
    )


def _check_numbers(result: Result) -> None:
    """Raises InvresError for a metric that is no finite number."""
    numbers = {"tolerance_mm": result.tolerance_mm, "empty_distance_mm": result.empty_distance_mm} | {
        f"the {metric} of {label} in the case {case}": of["metrics"][key][metric]
        for case, of in result.cases.items()
        for label, key in result.keys.items()
        for metric in result.metrics()
    }
    for what, value in numbers.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise InvresError(
                f"{result.path} is damaged: {what} is {json.dumps(value)}, not a finite number.",
                hint="Score anew with `invres evaluate`.",
            )


def compare(a: Result, b: Result, report: Reporter = SILENT) -> dict[str, Any]:
    """B beside A on the cases that both have, as plain JSON values; every difference is B minus A.

    `compared`: both paths. `only_a`, `only_b`: cases that one alone has, which count nowhere. `overall`: by metric, of
    the mean over labels; `labels`: by name and metric. Each has the spread of `a` and of `b` over patients (cases of
    one patient are not independent), their `difference`, patient by patient, with its interval, and `p`, of the t test
    that it is 0. Those of labels say in `beyond_doubt` whether they differ when all labels of the metric are
    tested together. `both_empty`, `one_empty`: of a label, in how many cases of A and B both masks are empty (Dice 1),
    and one of them (Dice 0). `verdict`, of B by the Dice, mean over labels: better, worse, as good, not enough data to
    tell; and in words in `sentence`. `better_labels`, `worse_labels`: those whose Dice differs beyond doubt.
    `cases`: worst for B first.
    Warns of cases that only one has, and of those that were scored against other references.
    Raises InvresError for other labels or tolerances, for no common case, and for a case of two patients.
    """
    _check_alike(a, b)
    names = [name for name in a.cases if name in b.cases]
    if not names:
        raise InvresError(
            f"{a.path} and {b.path} have no case in common: {listed(list(a.cases))}; and {listed(list(b.cases))}.",
            hint="Cases are matched by name.",
        )
    only_a, only_b = [[name for name in one.cases if name not in other.cases] for one, other in ((a, b), (b, a))]
    for only, which in ((only_a, a), (only_b, b)):
        if only:
            report.warning(f"Only {which.path} has {_counted(only)}, left out here: {listed(only)}.")
    _warn_of_other_references(a, b, names, report)
    patients = [_patient(name, a, b) for name in names]
    labels, metrics = list(a.keys), [metric for metric in a.metrics() if metric in b.metrics()]
    of_labels: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for metric in metrics:
        values = {label: [[one.value(name, label, metric) for name in names] for one in (a, b)] for label in labels}
        distinct = beyond_doubt({label: _paired(pair, patients) for label, pair in values.items()})
        for label, pair in values.items():
            of_labels[label][metric] = {**_of_metric(metric, pair, patients), "beyond_doubt": label in distinct}
    for label in labels:
        of_labels[label]["both_empty"] = _empties(a, b, label, names, ("both",))
        of_labels[label]["one_empty"] = _empties(a, b, label, names, ("predicted", "reference"))
    overall = {
        metric: _of_metric(metric, [[one.mean(name, metric) for name in names] for one in (a, b)], patients)
        for metric in metrics
    }
    dice = {label: of_labels[label]["Dice"] for label in labels}
    sure = {label: of["difference"]["mean"] for label, of in dice.items() if of["beyond_doubt"]}
    better, worse = [[label for label, mean in sure.items() if sign * mean > 0] for sign in (1, -1)]
    claim = verdict(overall["Dice"]["difference"])
    return {
        "compared": {"a": str(a.path), "b": str(b.path)},
        "n_cases": len(names),
        "n_patients": len(set(patients)),
        "only_a": only_a,
        "only_b": only_b,
        "tolerance_mm": a.tolerance_mm,
        "empty_distance_mm": a.empty_distance_mm,
        "epoch_chosen_on": {key: sorted(one.chosen_on & set(names)) for key, one in (("a", a), ("b", b))},
        "verdict": claim,
        "sentence": _sentence(claim, overall["Dice"], len(names), len(set(patients)), better, worse),
        "overall": overall,
        "labels": of_labels,
        "better_labels": better,
        "worse_labels": worse,
        "cases": _cases(a, b, names, patients),
    }


def comparison_table(content: Mapping[str, Any]) -> str:
    """What `compare` returned as text: the verdict, a row for each label and metric, the cases worst for B."""
    rows = [["label", "metric", "A", "B", "B - A [95 % interval]", "p"]]
    blocks = {"mean of labels": content["overall"]} if len(content["labels"]) > 1 else {}
    for name, of_metrics in (blocks | content["labels"]).items():
        for metric in content["overall"]:
            of, decimals = of_metrics[metric], _DECIMALS[metric]
            rows.append(
                [
                    name if metric == "Dice" else "",
                    metric + _UNITS.get(metric, ""),
                    mean_text(of["a"], decimals),
                    mean_text(of["b"], decimals),
                    signed_text(of["difference"], decimals),
                    ("<0.001" if of["p"] < 0.001 else f"{of['p']:.3f}") + (" *" if of.get("beyond_doubt") else ""),
                ]
            )
    compared = content["compared"]
    lines = [f"A: {compared['a']}", f"B: {compared['b']}", content["sentence"], "", *aligned(rows), ""]
    lines += _footnotes(content)
    lines += ["", "Worst for B (difference in Dice, mean over labels):"]
    cases = [["  case", "B - A", "Dice A", "Dice B", "worst label"]]
    for one in content["cases"][:WORST_CASES]:
        dice = [f"{one['difference']:+.3f}", f"{one['a']:.3f}", f"{one['b']:.3f}"]
        cases.append([f"  {one['case']}", *dice, f"{one['worst_label']} {one['worst_difference']:+.3f}"])
    return "\n".join([*lines, *aligned(cases)])


def _check_alike(a: Result, b: Result) -> None:
    """Raises InvresError for results whose figures mean different things."""
    if a.keys.keys() != b.keys.keys():
        told_of = "; ".join(
            f"only {one.path} has {', '.join(names)}"
            for one, other in ((a, b), (b, a))
            if (names := [name for name in one.keys if name not in other.keys])
        )
        raise InvresError(f"The two results are of different labels: {told_of}.", hint=SAME_DATA)
    for name, key in a.keys.items():
        if b.keys[name] != key:
            raise InvresError(
                f"The label {name} has the values {key} in {a.path} and {b.keys[name]} in {b.path}.",
                hint=SAME_DATA,
            )
    if a.tolerance_mm != b.tolerance_mm:
        raise InvresError(
            f"The tolerance of the surface Dice is {a.tolerance_mm:g} mm in {a.path} and {b.tolerance_mm:g} mm in "
            f"{b.path}.",
            hint="Score both with the same --tolerance.",
        )


def _warn_of_other_references(a: Result, b: Result, names: Sequence[str], report: Reporter) -> None:
    def sizes(result: Result, case: str) -> list[Any]:
        return [result.cases[case]["metrics"][key].get("n_ref") for key in a.keys.values()]

    other = [name for name in names if sizes(a, name) != sizes(b, name)]
    if other:
        report.warning(
            f"In {_counted(other)} A and B were scored against different references, which are no pairs: "
            f"{listed(other)}."
        )


def _patient(name: str, a: Result, b: Result) -> str:
    """Whose case it is: files of earlier versions, and those scored without a data set, take each as its own."""
    said = {str(one.cases[name].get("patient") or name) for one in (a, b)} - {name}
    if len(said) > 1:
        first, second = (one.cases[name]["patient"] for one in (a, b))
        raise InvresError(
            f"The case {name} is of the patient {first} in {a.path} and of {second} in {b.path}.",
            hint=SAME_DATA,
        )
    return said.pop() if said else name


def _paired(pair: Sequence[Sequence[float]], patients: Sequence[str]) -> list[float]:
    """B minus A, a mean for each patient. pair: the values of A and of B by case."""
    return patient_means((patient, after - before) for patient, before, after in zip(patients, *pair, strict=True))


def _of_metric(metric: str, pair: Sequence[Sequence[float]], patients: Sequence[str]) -> dict[str, Any]:
    differences = _paired(pair, patients)
    return {
        "a": patient_spread(pair[0], patients),
        "b": patient_spread(pair[1], patients),
        "difference": difference(differences),
        "p": p_value(differences),
        "larger_is_better": LARGER_IS_BETTER[metric],
    }


def _empties(a: Result, b: Result, label: str, names: Sequence[str], kinds: Collection[str]) -> dict[str, int]:
    """In how many cases the masks of a label are empty in one of these ways (`metrics.LabelScore.empty`)."""
    return {
        key: sum(one.cases[name].get("empty", {}).get(one.keys[label]) in kinds for name in names)
        for key, one in (("a", a), ("b", b))
    }


def _sentence(
    claim: str, dice: Mapping[str, Any], cases: int, patients: int, better: Sequence[str], worse: Sequence[str]
) -> str:
    count = "1 case" if cases == 1 else f"{cases} cases"
    of = "" if patients == cases else f" of {patients} patient{'' if patients == 1 else 's'}"
    means = f"the Dice is {dice['a']['mean']:.3f} in A and {dice['b']['mean']:.3f} in B{told(dice['difference'])}"
    words = {"as good": "B is as good as A", NOT_ENOUGH: NOT_ENOUGH}
    text = f"On {count}{of} {means}: {words.get(claim, f'B is {claim} than A')}."
    for labels, what in ((better, "better"), (worse, "worse")):
        text += f" Labels that are {what} in B: {', '.join(labels)}." if labels else ""
    return text


def _cases(a: Result, b: Result, names: Sequence[str], patients: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for name, patient in zip(names, patients, strict=True):
        changes = {label: b.value(name, label, "Dice") - a.value(name, label, "Dice") for label in a.keys}
        worst = min(changes, key=lambda label: changes[label])
        before, after = (one.mean(name, "Dice") for one in (a, b))
        found.append(
            {
                "case": name,
                "patient": patient,
                "a": before,
                "b": after,
                "difference": after - before,
                "worst_label": worst,
                "worst_difference": changes[worst],
            }
        )
    return sorted(found, key=lambda one: (one["difference"], one["b"]))


def _footnotes(content: Mapping[str, Any]) -> list[str]:
    lines = [f"NSD within {content['tolerance_mm']:g} mm. p: t test that the mean difference is 0."]
    if len(content["labels"]) > 1:
        lines.append("*: the label differs beyond doubt, all labels of that metric tested together (Holm).")
    if content["n_patients"] != content["n_cases"]:
        lines.append("Means, differences and p are over patients: all cases of one count as one, by their mean.")
    for kind, text in (
        ("both_empty", "Empty in prediction and reference, which counts as Dice 1 (cases of A/B)"),
        ("one_empty", f"One mask empty, which counts as Dice 0 and {content['empty_distance_mm']} mm (cases of A/B)"),
    ):
        counts = {label: of[kind] for label, of in content["labels"].items() if any(of[kind].values())}
        if counts:
            told_of = ", ".join(f"{label} {of['a']}/{of['b']}" for label, of in counts.items())
            lines.append(f"{text}: {told_of}.")
    for key, chosen in content["epoch_chosen_on"].items():
        if chosen:
            lines.append(f"The epoch of {key.upper()} was chosen by the Dice of {_counted(chosen)}, which flatters it.")
    for key in ("a", "b"):
        if only := content[f"only_{key}"]:
            lines.append(f"Left out, as only {key.upper()} has them: {_counted(only)}: {listed(only)}.")
    return lines


def _counted(names: Sequence[str]) -> str:
    return "1 case" if len(names) == 1 else f"{len(names)} cases"
