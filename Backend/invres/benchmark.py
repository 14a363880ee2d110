"""`invres bench`: memory, time and gradients of every network and engine, side by side in one run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from .config import NETWORKS, LossWeights, NetworkConfig
from .events import SILENT, Reporter, format_bytes
from .memory import measure_training, predict_training
from .networks import build
from .step import make_optimizer, training_step

__all__ = ["ENGINE_TABLE", "bench_gradients", "bench_memory", "bench_time", "describe_machine", "table"]

Triple = tuple[int, int, int]
ENGINE_TABLE = {
    "unet3d": ("stored", "checkpoint"),
    "partially_invres": ("stored", "checkpoint", "recursive", "memcnn", "reversible"),
    "fully_invres": ("stored", "checkpoint", "recursive", "memcnn", "reversible"),
}


def describe_machine(device: str) -> str:
    """The kind of machine that figures were taken on, in words."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def bench_memory(
    patch: Triple, channels: int, classes: int, device: str = "cpu", measure: bool = False, report: Reporter = SILENT
) -> list[dict[str, Any]]:
    """Peak live tensor bytes of a training step, ratios to `unet3d` under `stored` in the same run.

    measure False predicts on fake tensors (any size, nothing allocated); True runs the step. On a CUDA device
    `torch.cuda.max_memory_allocated` stands beside it.
    """
    rows: list[dict[str, Any]] = []
    pairs = [(name, engine) for name in NETWORKS for engine in ENGINE_TABLE[name]]
    for done, (name, engine) in enumerate(pairs):
        report.progress("bench.memory", done, len(pairs))
        config = NetworkConfig(name=name, in_channels=channels, out_channels=classes)
        on_card = device.startswith("cuda")
        if on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        if measure or on_card:
            found = measure_training(config, patch, engine=engine, device=device)
        else:
            found = predict_training(config, patch, engine=engine)
        row = {"network": name, "engine": engine, **dataclasses.asdict(found)}
        base = rows[0] if rows else row
        row["ratio"] = found.peak_bytes / base["peak_bytes"]
        row["activation_ratio"] = found.activation_bytes / base["activation_bytes"]
        if on_card:
            row["cuda_max_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        rows.append(row)
    report.progress("bench.memory", len(pairs), len(pairs))
    return rows


def bench_time(
    patch: Triple, channels: int, classes: int, device: str = "cpu", rounds: int = 5, report: Reporter = SILENT
) -> list[dict[str, Any]]:
    """Median seconds of a training step; engines of one network take turns, so that a drifting machine hits all alike.

    ratio: to `stored` of the same network.
    """
    rows = []
    for name in NETWORKS:
        config = NetworkConfig(name=name, in_channels=channels, out_channels=classes)
        torch.manual_seed(0)
        network = build(config).to(device).train()
        optimizer = make_optimizer(network)
        image = torch.randn(1, channels, *patch, device=device)
        target = torch.randint(0, classes, (1, *patch), device=device).to(torch.int16)
        seconds: dict[str, list[float]] = {engine: [] for engine in ENGINE_TABLE[name]}
        for turn in range(rounds + 1):
            report.progress(f"bench.time {name}", turn, rounds + 1)
            for engine, known in seconds.items():
                network.engine = engine
                start = _now(device)
                training_step(network, optimizer, image, target, False, LossWeights())
                known.append(_now(device) - start)
        report.progress(f"bench.time {name}", rounds + 1, rounds + 1)
        medians = {engine: statistics.median(known[1:]) for engine, known in seconds.items()}  # the first warms up
        for engine, median in medians.items():
            rows.append({"network": name, "engine": engine, "seconds": median, "ratio": median / medians["stored"]})
    return rows


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bench_gradients(patch: Triple, channels: int, classes: int, report: Reporter = SILENT) -> list[dict[str, Any]]:
    """The largest relative difference of any gradient (input and every parameter) to `stored`, float64 and float32."""
    rows = []
    names = [name for name in NETWORKS if "reversible" in ENGINE_TABLE[name]]
    pairs = [(name, dtype) for name in names for dtype in (torch.float64, torch.float32)]
    for done, (name, dtype) in enumerate(pairs):
        report.progress("bench.gradients", done, len(pairs))
        torch.manual_seed(0)
        network = build(NetworkConfig(name=name, in_channels=channels, out_channels=classes)).to(dtype)
        image = torch.randn(1, channels, *patch, dtype=dtype, requires_grad=True)
        wanted: list[torch.Tensor] = []
        for engine in ENGINE_TABLE[name]:
            network.engine = engine
            network.zero_grad(set_to_none=True)
            image.grad = None
            network(image).logits.square().mean().backward()  # memcnn refuses torch.autograd.grad
            found = [t.grad for t in (image, *network.parameters()) if t.grad is not None]
            wanted = wanted or found
            error = max(float((f - w).norm() / w.norm().clamp(min=1e-12)) for f, w in zip(found, wanted, strict=True))
            rows.append({"network": name, "engine": engine, "dtype": str(dtype)[6:], "relative_error": error})
    report.progress("bench.gradients", len(pairs), len(pairs))
    return rows


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as an aligned Markdown table; bytes are written in binary units."""
    cells = [[_cell(column, row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column.endswith("bytes"):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.1e}" if "error" in column else f"{value:.3f}"
    return str(value)
