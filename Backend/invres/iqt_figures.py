"""Figure 6 of Blumberg et al. 2018: what the networks of image quality transfer cost, published and ours."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

from .memory import TrainingMemory, predict_enhancement
from .networkconfig import NetworkConfig
from .networks import build_enhancer, unshuffle
from .step import enhancement_step, make_optimizer

__all__ = ["BATCH", "PATCH", "PUBLISHED", "FigureRow", "figure_6", "map_bytes", "step_seconds"]

PATCH = (11, 11, 11)
BATCH = 12  # of the authors' published code; the paper names none
CHANNELS = 6


class Published(NamedTuple):
    """A row of figure 6: "memory usage and computational time on a single epoch with 8 TVS subjects", on one NVIDIA
    Pascal card. How memory was measured, and what of it belongs to CUDA and its libraries, is not said."""

    model: str
    memory_mb: float
    seconds: float


PUBLISHED = (
    Published("ESPCN", 523, 20),
    Published("ESPCN-RN4", 541, 309),
    Published("ESPCN-RN4 Naive", 1091, 231),
)
_NETWORKS = {
    "ESPCN": (NetworkConfig(name="espcn", in_channels=CHANNELS, out_channels=CHANNELS), "stored"),
    "ESPCN-RN4": (
        NetworkConfig(name="espcn_rn", in_channels=CHANNELS, out_channels=CHANNELS, blocks=(4,)),
        "reversible",
    ),
    "ESPCN-RN4 Naive": (
        NetworkConfig(name="espcn_rn", in_channels=CHANNELS, out_channels=CHANNELS, blocks=(4,)),
        "stored",
    ),
}


class FigureRow(NamedTuple):
    """published_*: see `Published`. bytes: peak of live tensors in a training step. seconds: of one step, not of an
    epoch; None where it was not measured."""

    model: str
    published_memory_mb: float
    published_seconds: float
    bytes: int
    seconds: float | None


def figure_6(measure_time: bool = False, device: str = "cpu", rounds: int = 3) -> list[FigureRow]:
    """The rows of figure 6 beside ours: batches of 12 patches of 11x11x11, 6 channels, float32, Adam.

    Memory is predicted on tensors without values and exact for any device; time is measured on `device`.
    """
    rows = []
    for model, memory_mb, seconds in PUBLISHED:
        config, engine = _NETWORKS[model]
        peak = predict_enhancement(config, PATCH, BATCH, engine).peak_bytes
        rows.append(
            FigureRow(
                model,
                memory_mb,
                seconds,
                peak,
                step_seconds(config, engine, device, rounds) if measure_time else None,
            )
        )
    return rows


def map_bytes(found: TrainingMemory) -> int:
    """What is alive at the peak besides parameters, their gradients and Adam's state, all of which grow with depth."""
    return found.peak_bytes - sum(found.by_role[role] for role in ("parameters", "gradients", "optimizer"))


def step_seconds(config: NetworkConfig, engine: str, device: str, rounds: int) -> float:
    """Median seconds of a training step after a first one."""
    network = build_enhancer(config, engine).to(device).train()
    optimizer = make_optimizer(network, learning_rate=1e-4)
    image = torch.randn(BATCH, CHANNELS, *PATCH, device=device)
    target = unshuffle(torch.randn(BATCH, CHANNELS, 14, 14, 14, device=device), (2, 2, 2))
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        enhancement_step(network, optimizer, image, target)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
