"""How sure a mean over patients is: intervals, and which of many labels differ beyond doubt."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

__all__ = ["interval", "p_value", "patient_means", "patient_spread", "rejected", "spread", "spread_over_patients"]

LEVEL = 0.05


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None for fewer than two values.

    Not a percentile bootstrap, which of few values holds the true mean far less often than it says.
    """
    n = len(values)
    if n < 2:
        return None
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    mean = float(np.mean(values))
    return mean - half, mean + half


def p_value(differences: Sequence[float]) -> float:
    """Of the two-sided t test that the mean is 0; 1 for fewer than two values."""
    if len(differences) < 2:
        return 1.0
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def rejected(p_values: Mapping[str, float]) -> set[str]:
    """The names whose hypothesis falls when all are tested together (Holm 1979), at 5 % for any false one."""
    found: set[str] = set()
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > LEVEL / (len(p_values) - rank):
            break
        found.add(name)
    return found


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation, median and n; None where undefined."""
    found: dict[str, float | int | None] = {"mean": None, "sd": None, "median": None, "n": len(values)}
    if values:
        found |= {"mean": float(np.mean(values)), "median": float(np.median(values))}
    if len(values) > 1:
        found["sd"] = float(np.std(values, ddof=1))
    return found


def patient_means(values: Iterable[tuple[Hashable, float]]) -> list[float]:
    """Of (patient, value), the mean of each patient: cases of one are not independent."""
    of_patient: dict[Hashable, list[float]] = {}
    for patient, value in values:
        of_patient.setdefault(patient, []).append(value)
    return [float(np.mean(some)) for some in of_patient.values()]


def patient_spread(values: Sequence[float], patients: Sequence[Hashable]) -> dict[str, float | int | None]:
    """`spread` of the `patient_means`, so that it fits an interval over patients. values, patients: of each case.

    `n` is the number of cases and `n_patients` that of means; where each patient has one case it is the values' own.
    """
    means = patient_means(zip(patients, values, strict=True))
    return {**spread(means), "n": len(values), "n_patients": len(means)}


def spread_over_patients(
    values: Sequence[float], patients: Sequence[Hashable], within: tuple[float, float] = (-np.inf, np.inf)
) -> dict[str, object]:
    """`patient_spread` with `ci95`, the interval of its mean; None for one patient.

    within: what values can be, beyond which the interval does not go.
    """
    bounds = interval(patient_means(zip(patients, values, strict=True)))
    return {**patient_spread(values, patients), "ci95": None if bounds is None else np.clip(bounds, *within).tolist()}
