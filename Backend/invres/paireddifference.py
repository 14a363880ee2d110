"""A difference between two results on the same patients: its size, how sure it is, and what that is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .intervals import interval, p_value, rejected, spread

__all__ = ["NOTHING", "NOT_ENOUGH", "beyond_doubt", "difference", "mean_text", "signed_text", "told", "verdict"]

AS_GOOD = 0.01
"""A difference in Dice that does not matter (chosen): an interval within it means "as good as before"."""
FEWEST_TOLD = 3
"""Below this many patients nothing is claimed, whatever the interval."""
NOT_ENOUGH = "not enough data to tell"
NOTHING = "nothing to compare"


def difference(values: Sequence[float]) -> dict[str, Any]:
    """`intervals.spread` of the differences, one for each patient, with `ci95`, the interval of their mean or None."""
    bounds = interval(values)
    return {**spread(values), "ci95": None if bounds is None else list(bounds)}


def beyond_doubt(differences: Mapping[str, Sequence[float]]) -> set[str]:
    """The labels whose mean difference is not 0, all tested together (`intervals.rejected`).

    differences: by label, one for each patient; labels of too few patients take no part.
    """
    enough = {name: values for name, values in differences.items() if len(values) >= FEWEST_TOLD}
    return rejected({name: p_value(values) for name, values in enough.items()})


def verdict(overall: Mapping[str, Any]) -> str:
    """Of a `difference` in Dice: better, worse, as good, `NOT_ENOUGH`, or `NOTHING` where no patient has one."""
    if not overall["n"]:
        return NOTHING
    if overall["n"] < FEWEST_TOLD:
        return NOT_ENOUGH
    low, high = overall["ci95"]
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "as good" if low >= -AS_GOOD and high <= AS_GOOD else NOT_ENOUGH


def told(overall: Mapping[str, Any]) -> str:
    """As " (difference +0.020, 95 % interval +0.010 to +0.030)"; nothing where there is no interval."""
    if overall["ci95"] is None:
        return ""
    low, high = overall["ci95"]
    return f" (difference {overall['mean']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})"


def mean_text(spread: Mapping[str, Any], decimals: int) -> str:
    """Mean and standard deviation for a table; "-" where there is none."""
    if spread["mean"] is None:
        return "-"
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.{decimals}f}"
    return f"{spread['mean']:.{decimals}f}{sd}"


def signed_text(difference: Mapping[str, Any], decimals: int) -> str:
    """A `difference` with its interval for a table; "-" where there is none."""
    if difference["mean"] is None:
        return "-"
    bounds = difference["ci95"]
    text = "[n/a]" if bounds is None else "[{:+.{d}f}, {:+.{d}f}]".format(*bounds, d=decimals)
    return f"{difference['mean']:+.{decimals}f} {text}"
