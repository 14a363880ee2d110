"""Table 1 of the memory-efficient FCN (Wang, Oda, Mori 2020): published figures, and what our networks take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .events import SILENT, Reporter
from .memory import predict_training
from .networkconfig import NetworkConfig
from .networks import build

__all__ = ["SIZES", "VARIANTS", "Variant", "compare_table"]

Triple = tuple[int, int, int]

SIZES: dict[str, Triple] = {
    "96x96x96": (96, 96, 96),
    "256x256x152": (152, 256, 256),
    "256x256x234": (234, 256, 256),
}
"""Inputs of the table as published, and as (D, H, W). "Full" is up to 234 slices."""


@dataclass(frozen=True)
class Variant:
    """A row: what the paper says of it, and our network for it; batch size 1, one channel, three classes (KiTS19).

    parameters: published, None for a row that only we have. gigabytes: published, in the order of SIZES, by nvidia-smi
    on a V100 of 32 GB; None where it did not fit. network: `compact_fcn` unless it names another.
    """

    title: str
    parameters: float | None
    gigabytes: tuple[float | None, float | None, float | None]
    network: NetworkConfig
    precision: str = "fp32"


def _variant(
    title: str,
    parameters: float,
    gigabytes: tuple[float | None, float | None, float | None],
    precision: str = "fp32",
    **options: Any,
) -> Variant:
    network = NetworkConfig(name="compact_fcn", in_channels=1, out_channels=3, **options)
    return Variant(title, parameters, gigabytes, network, precision)


_COMPACT = "Baseline+CCBlock"
VARIANTS = (
    _variant("Baseline U-Net", 9.5e6, (3.7, 28.4, None), block="plain"),
    _variant("Baseline+Bottleneck", 3.2e6, (3.1, 28.3, None), block="bottleneck"),
    _variant("Baseline+SepConv", 2.7e6, (3.2, 30.1, None), block="separable"),
    _variant(_COMPACT, 2.6e6, (3.0, 27.2, None), block="ccblock"),
    _variant(f"{_COMPACT}+Inplace-ABN", 2.6e6, (2.3, 20.0, 30.2), block="ccblock", inplace_norm=True),
    _variant(f"{_COMPACT}+Inplace-ABN+MP", 2.6e6, (1.6, 11.7, 17.6), "fp16", block="ccblock", inplace_norm=True),
    Variant("fully_invres", None, (None, None, None), NetworkConfig(out_channels=3)),
)


def compare_table(sizes: tuple[str, ...] = tuple(SIZES), report: Reporter = SILENT) -> list[dict[str, Any]]:
    """A row for each variant and size, published beside ours; nothing is allocated.

    sizes: keys of SIZES. Keys of a row: network, size, published_parameters, parameters, published_gb (None: the paper
    has no figure), published_ratio and ratio (to the baseline of that size; published None where one of both is
    lacking), peak_bytes (predicted live bytes of a training step), precision, engine.
    """
    rows: list[dict[str, Any]] = []
    total = len(sizes) * len(VARIANTS)
    for size in sizes:
        column = tuple(SIZES).index(size)
        published_base, base = VARIANTS[0].gigabytes[column], None
        for variant in VARIANTS:
            report.progress("fcn.table", len(rows), total)
            with torch.device("meta"):
                network = build(variant.network)
            found = predict_training(variant.network, SIZES[size], precision=variant.precision)
            base = base or found.peak_bytes
            published = variant.gigabytes[column]
            rows.append(
                {
                    "network": variant.title,
                    "size": size,
                    "published_parameters": variant.parameters,
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "published_gb": published,
                    "published_ratio": published / published_base if published and published_base else None,
                    "peak_bytes": found.peak_bytes,
                    "ratio": found.peak_bytes / base,
                    "precision": variant.precision,
                    "engine": network.engine,
                }
            )
    report.progress("fcn.table", total, total)
    return rows
