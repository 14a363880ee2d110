"""What else changes the memory of a training step: VAE branch, classes, depth, whole volumes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import InvresError
from .cardplan import WHOLE_VOLUME
from .events import SILENT, Reporter
from .memory import predict_training
from .networkconfig import NetworkConfig, VAEConfig
from .networks import build

__all__ = ["bench_variants"]

Triple = tuple[int, int, int]
MANY_CLASSES = 104  # of a whole body
DEEP = 16  # blocks a level
INVERTIBLE = ("partially_invres", "fully_invres")


def bench_variants(patch: Triple, channels: int, classes: int, report: Reporter = SILENT) -> list[dict[str, Any]]:
    """One row for each variant, on hollow tensors: nothing is allocated. Batch 1.

    ratio, activation_ratio: to the first row of its group: the plain network, one block a level, the baseline.
    A row that cannot be has an `error` and no figures.
    """
    groups: list[list[tuple[NetworkConfig, str, Triple, dict[str, Any]]]] = []
    for name in INVERTIBLE:
        network = NetworkConfig(name=name, in_channels=channels, out_channels=classes)
        groups += [
            [
                (network, "plain", patch, {}),
                (dataclasses.replace(network, vae=VAEConfig()), "with the VAE branch", patch, {}),
                (dataclasses.replace(network, out_channels=MANY_CLASSES), f"{MANY_CLASSES} classes", patch, {}),
            ],
            [
                (_with_blocks(network, 1), "1 block a level", patch, {}),
                (_with_blocks(network, DEEP), f"{DEEP} blocks a level", patch, {}),
            ],
        ]
    baseline = NetworkConfig(name="unet3d", in_channels=channels, out_channels=classes)
    ours = dataclasses.replace(baseline, name="fully_invres")
    groups.append(
        [
            (baseline, "whole volume", WHOLE_VOLUME, {"engine": "stored"}),
            (ours, "whole volume", WHOLE_VOLUME, {}),
            (ours, "whole volume", WHOLE_VOLUME, {"precision": "bf16", "memory": "lowest"}),
        ]
    )
    rows: list[dict[str, Any]] = []
    total = sum(len(group) for group in groups)
    for group in groups:
        first: dict[str, int] = {}
        for network, variant, size, options in group:
            report.progress("bench.variants", len(rows), total)
            row: dict[str, Any] = {
                "network": network.name,
                "variant": variant,
                "patch": "x".join(map(str, size)),
                "precision": options.get("precision", "fp32"),
                "memory": options.get("memory", "low"),
            }
            rows.append(row)
            try:
                found = predict_training(network, size, **options)
            except InvresError as error:  # such as a patch too small for the VAE branch
                row["error"] = str(error)
                continue
            first = first or {"peak": found.peak_bytes, "activation": found.activation_bytes}
            row |= {"peak_bytes": found.peak_bytes, "ratio": found.peak_bytes / first["peak"]}
            row |= {"activation_bytes": found.activation_bytes}
            row |= {"activation_ratio": found.activation_bytes / first["activation"]}
    report.progress("bench.variants", total, total)
    return rows


def _with_blocks(network: NetworkConfig, count: int) -> NetworkConfig:
    """With so many blocks at every level, down and up."""
    with torch.device("meta"):
        levels = len(build(network).config.channels)
    return dataclasses.replace(network, blocks=(count,) * levels, decoder_blocks=(count,) * (levels - 1))
