"""How well image quality transfer does: errors inside the brain and at its edge, beside cubic interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage, stats

from . import InvresError
from .events import aligned

__all__ = ["REGIONS", "cubic", "paired_test", "region_errors", "regions", "scores_table", "summary_of"]

Triple = tuple[int, int, int]
REGIONS = ("interior", "exterior", "total")


def cubic(low: np.ndarray, factor: Triple, border: int = 0) -> np.ndarray:
    """(C, d, h, w) by cubic splines at the voxel centres of the finer grid, (C, d * f0, ...): the baseline; float32.

    border: voxels of `low` at each side that the result lacks.
    """
    shape = [(size - 2 * border) * step for size, step in zip(low.shape[1:], factor, strict=True)]
    # The centre of fine voxel i lies at (i + 1/2) / f - 1/2 of the coarse ones.
    matrix, offset = [1 / step for step in factor], [border + 0.5 / step - 0.5 for step in factor]
    transform = ndimage.affine_transform
    return np.stack(
        [transform(one.astype(np.float64), matrix, offset, tuple(shape), order=3, mode="nearest") for one in low]
    ).astype(np.float32)


def regions(low_mask: np.ndarray, high_mask: np.ndarray, patch: Triple, factor: Triple) -> dict[str, np.ndarray]:
    """Masks (D, H, W) at high resolution of the interior, the exterior, and both ("total", the brain mask).

    Exterior are the voxels of the brain whose input patch, `patch` low-resolution voxels around their own one, reaches
    beyond the brain mask or the volume; interior are the others. (Blumberg et al. 2018 follow Alexander et al. 2017 and
    Tanno et al. 2017 in telling the two apart by whether a patch lies inside the brain; that it is the patch centred on
    the voxel is chosen, so that the regions do not depend on how patches are stitched.)
    """
    inside = low_mask.astype(np.uint8)
    for axis, size in enumerate(patch):  # a box is worn away axis by axis
        inside = ndimage.minimum_filter1d(inside, size, axis=axis, mode="constant", cval=0)
    fine = np.repeat(np.repeat(np.repeat(inside, factor[0], 0), factor[1], 1), factor[2], 2).astype(bool)
    return {"interior": high_mask & fine, "exterior": high_mask & ~fine, "total": high_mask}


def region_errors(
    prediction: np.ndarray, reference: np.ndarray, parts: dict[str, np.ndarray]
) -> dict[str, float | None]:
    """Root mean square errors over the voxels of each region and all channels; None for a region without voxels.

    prediction, reference: (C, D, H, W). parts: as `regions` gives them.
    """
    squares = ((prediction.astype(np.float64) - reference) ** 2).mean(axis=0)
    return {name: float(np.sqrt(squares[part].mean())) if part.any() else None for name, part in parts.items()}


def paired_test(ours: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Wilcoxon's signed-rank test for the errors of the same subjects: W (the smaller rank sum), exact p, two-sided.

    The paper's p = 0.0117 for W = 0 and 8 subjects is the normal approximation; `p_normal` is that one.
    """
    if len(ours) != len(others):
        raise InvresError(f"Paired errors must be of the same subjects, got {len(ours)} and {len(others)}.")
    different = np.asarray(ours, float) - np.asarray(others, float)
    if len(different) < 2 or not np.any(different):
        return {"n": len(different), "W": None, "p": None, "p_normal": None}
    exact = stats.wilcoxon(different, method="exact" if (different != 0).all() else "auto")
    normal = stats.wilcoxon(different, method="approx", correction=False)
    return {
        "n": len(different),
        "W": float(exact.statistic),
        "p": float(exact.pvalue),
        "p_normal": float(normal.pvalue),
    }


def summary_of(subjects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sd over subjects by method and region, and the test of the network against cubic interpolation.

    subjects: each with "network" and "cubic", their errors by region.
    """
    summary: dict[str, Any] = {}
    for method in ("network", "cubic"):
        summary[method] = {}
        for region in REGIONS:
            values = [s[method][region] for s in subjects if s[method][region] is not None]
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            summary[method][region] = {"mean": float(np.mean(values)) if values else None, "sd": sd, "n": len(values)}
    totals = [[s[method]["total"] for s in subjects] for method in ("network", "cubic")]
    summary["wilcoxon"] = paired_test(*totals)
    return summary


def scores_table(subjects: Sequence[dict[str, Any]], summary: dict[str, Any], unit: str, factor: float) -> str:
    """The errors, times `factor`, of each subject and, for several, their summary, as lines of text."""

    def cell(value: float | None, sd: float | None = None) -> str:
        if value is None:
            return "none"
        return f"{value * factor:.4g}" + (f" ± {sd * factor:.2g}" if sd is not None else "")

    rows = [["", "method", *REGIONS]]
    for subject in subjects:
        rows += [[subject["name"], m, *(cell(subject[m][r]) for r in REGIONS)] for m in ("network", "cubic")]
    if len(subjects) > 1:
        for method in ("network", "cubic"):
            spreads = [summary[method][region] for region in REGIONS]
            rows.append([f"{len(subjects)} scans", method, *(cell(s["mean"], s["sd"]) for s in spreads)])
    lines = [f"Root mean square error ({unit}):", *aligned(rows)]
    test = summary["wilcoxon"]
    if test["p"] is not None:
        lines.append(
            f"Wilcoxon signed-rank test of the totals: W = {test['W']:g}, p = {test['p']:.4f}, n = {test['n']}"
        )
    else:
        lines.append("One scan says nothing about others: no test.")
    return "\n".join(lines)
