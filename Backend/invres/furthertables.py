"""Tables of the memory-efficient FCN (Wang et al. 2020) and of image quality transfer (Blumberg et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import InvresError
from .published import FCN_4, IQT_4, IQT_TESTS
from .reproduction import Comparison, Request, Row, table

__all__: list[str] = []  # importing this module registers its tables

_FCN = "Wang, Oda and Mori 2020, Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN"
_IQT = "Blumberg et al. 2018, Deeper Image Quality Transfer"
_MB = 2**20


@table("fcn-1", "Compact blocks, in-place norms and mixed precision: parameters and memory", f"{_FCN}, table 1")
def fcn_1(request: Request) -> Comparison:
    from .fcn_table import compare_table

    rows: list[Row] = []
    for found in compare_table(report=request.report):
        name = found["network"]
        if not any(row.of == name for row in rows):
            rows.append(Row(name, "parameters, M", _millions(found["published_parameters"]), found["parameters"] / 1e6))
        for figure, published, ours in (
            ("GB", found["published_gb"], found["peak_bytes"] / 2**30),
            ("of the baseline's", found["published_ratio"], found["ratio"]),
        ):
            remark = "did not fit 32 GB" if found["published_parameters"] and published is None else ""
            rows.append(Row(name, f"{found['size']}, {figure}", published, ours, remark if figure == "GB" else ""))
    order = list(dict.fromkeys(row.of for row in rows))
    rows.sort(key=lambda row: order.index(row.of))
    return Comparison(
        rows,
        (
            "Theirs is nvidia-smi's figure for the whole process; ours are predicted live tensors of a training step.",
            "The last network is this project's own and not in the paper.",
        ),
    )


@table("fcn-4", FCN_4.title, f"{_FCN}, {FCN_4.source}", tuple(FCN_4.rows))
def fcn_4(request: Request) -> Comparison:
    ours = {name: _mean_dice(name, content) for name, content in request.metrics.items()}
    large, small = FCN_4.rows
    gained = ours[large] - ours[small] if len(ours) == len(FCN_4.rows) else None
    rows = [Row(FCN_4.names[name], "Dice, %", None, ours.get(name)) for name in FCN_4.rows]
    return Comparison(
        [*rows, Row("gained by large patches", "Dice, %", FCN_4.rows[large][0], gained)],
        (
            "The figure has curves without values, of KiTS19, which was not at hand; what it shows besides is that "
            "compact blocks and in-place norms keep the baseline's Dice.",
            "The gain is in percentage points of the mean Dice over labels; the paper does not say of what it is 5 %.",
            "Fill the column with two trainings. SMALL: invres train --recipe kits19 --data FOLDER --output SMALL. "
            "LARGE: the same with --output LARGE --set 'training.patch=[152,256,256]'. "
            "For each: invres evaluate --run SMALL --data FOLDER --output SMALL.json. Then: invres reproduce fcn-4 "
            f"--metrics {small}=SMALL.json --metrics {large}=LARGE.json.",
        ),
    )


@table("iqt-6", "Memory and time of ESPCN, ESPCN-RN4 and ESPCN-RN4 naive", f"{_IQT}, figure 6")
def iqt_6(request: Request) -> Comparison:
    from .iqt_figures import figure_6

    device = request.device or "cpu"
    found = figure_6(measure_time=True, device=device)
    base, naive = found[0], found[-1]
    rows = []
    for one in found:
        assert one.seconds is not None and base.seconds and naive.seconds  # measured above
        rows += [
            Row(one.model, "memory, MB", one.published_memory_mb, one.bytes / _MB),
            Row(
                one.model,
                "memory, of naive",
                one.published_memory_mb / naive.published_memory_mb,
                one.bytes / naive.bytes,
            ),
            Row(
                one.model,
                "time, of naive",
                one.published_seconds / naive.published_seconds,
                one.seconds / naive.seconds,
            ),
        ]
    return Comparison(
        rows,
        (
            "Theirs is of a whole process on an NVIDIA Pascal card, and the way of measuring is not given; ours are "
            f"predicted live tensors of a training step. Our time is that of a step on {device}, theirs of an epoch.",
        ),
    )


@table("iqt-4", "Errors of ESPCN and its elongations on diffusion tensors", f"{_IQT}, figure 4", tuple(IQT_4.rows))
def iqt_4(request: Request) -> Comparison:
    rows = []
    for name, published in IQT_4.rows.items():
        ours = _errors(name, request.metrics[name]) if name in request.metrics else {}
        for column, value in zip(IQT_4.columns, published, strict=True):
            rows.append(Row(IQT_4.names[name], column.title, value, ours.get((column.of, column.quantity))))
    for pair, values in IQT_TESTS.items():
        found = _tested(*(request.metrics[name] for name in pair)) if set(pair) <= set(request.metrics) else {}
        of = f"{IQT_4.names[pair[0]]}, against {IQT_4.names[pair[1]]}"
        rows += [Row(of, f"Wilcoxon's {key}", value, found.get(key)) for key, value in zip("Wp", values, strict=True)]
    return Comparison(
        rows,
        (
            "The paper's errors are in its own unit, on 8 test subjects of the Human Connectome Project, which need "
            "registration; ours, in 10^-3 mm2/s, only compare with one another.",
            "Fill the column with: invres train --recipe iqt --data SCANS --output RUN; invres evaluate --model "
            "RUN/model --data TEST --output errors.json; invres reproduce iqt-4 --metrics espcn_rn4-8=errors.json.",
        ),
    )


def _errors(name: str, content: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(region, "mean" or "sd") -> RMSE of what `invres evaluate --model` wrote, in 10^-3 mm2/s."""
    try:
        regions = content["summary"]["network"]
        values = {(column.of, column.quantity): regions[column.of].get(column.quantity) for column in IQT_4.columns}
        return {key: 1000 * float(value) for key, value in values.items() if value is not None}
    except (KeyError, TypeError, ValueError):
        raise InvresError(
            f"The metrics of {name} are none of a model that enhances.",
            hint="`invres evaluate --model M --data SCANS --output errors.json` writes them.",
        ) from None


def _tested(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """W and p of the totals of the scans that both were scored on, in the paper's way; nothing for fewer than two."""
    from .enhancementscores import paired_test

    totals = [_totals(content) for content in (one, other)]
    both = [name for name in totals[0] if name in totals[1]]
    found = paired_test(*([total[name] for name in both] for total in totals))
    return {} if found["W"] is None else {"W": found["W"], "p": found["p_normal"]}


def _totals(content: Mapping[str, Any]) -> dict[str, float]:
    """Scan -> its error in total, of the scans that have one."""
    try:
        found = {str(scan["name"]): scan["network"]["total"] for scan in content.get("scans", ())}
        return {name: float(total) for name, total in found.items() if total is not None}
    except (KeyError, TypeError, ValueError):
        return {}  # the summary may be good all the same


def _mean_dice(name: str, content: Mapping[str, Any]) -> float:
    """In per cent, over the labels of what `invres evaluate` wrote."""
    try:
        means = [100 * float(label["Dice"]["mean"]) for label in content["summary"].values()]
        return sum(means) / len(means)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        raise InvresError(
            f"The metrics of {name} hold no Dice.", hint="`invres evaluate --output metrics.json` writes them."
        ) from None


def _millions(count: float | None) -> float | None:
    return None if count is None else count / 1e6
