"""Tables of the memory-efficient FCN (Wang et al. 2020) and of image quality transfer (Blumberg et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import InvresError
from .published import IQT_4
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
            rows.append(Row(IQT_4.names[name], column.title, value, ours.get(column.of)))
    return Comparison(
        rows,
        (
            "The paper's errors are in its own unit, on 8 test subjects of the Human Connectome Project, which need "
            "registration; ours, in 10^-3 mm2/s, only compare with one another.",
            "Fill the column with: invres train --recipe iqt --data SCANS --output RUN; invres evaluate --model "
            "RUN/model --data TEST --output errors.json; invres reproduce iqt-4 --metrics espcn_rn4-8=errors.json.",
        ),
    )


def _errors(name: str, content: Mapping[str, Any]) -> dict[str, float]:
    """Region -> mean RMSE of what `invres evaluate --model` wrote, in 10^-3 mm2/s."""
    try:
        means = {region: content["summary"]["network"][region]["mean"] for region in ("interior", "exterior", "total")}
        return {region: 1000 * float(mean) for region, mean in means.items() if mean is not None}
    except (KeyError, TypeError, ValueError):
        raise InvresError(
            f"The metrics of {name} are none of a model that enhances.",
            hint="`invres evaluate --model M --data SCANS --output errors.json` writes them.",
        ) from None


def _millions(count: float | None) -> float | None:
    return None if count is None else count / 1e6
