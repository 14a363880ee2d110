"""`invres bench`: runs the parts that were asked for and writes their tables."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from typing import Any

from . import InvresError
from .console import check_sizes, load_torch, say
from .events import Reporter
from .files import written_whole

__all__ = ["bench"]

BENCH_SECONDS = 420.0  # after which `bench` starts no further try for the largest cube


def bench(options: argparse.Namespace, report: Reporter) -> None:
    check_sizes(options)
    if options.rounds < 1:
        raise InvresError(f"--rounds must be 1 or more, got {options.rounds}.", hint="5 is usual.")
    load_torch(report, "benchmark")
    from .benchmark import bench_gradients, bench_memory, bench_time, describe_machine, table
    from .cube import bench_cube
    from .depth import bench_depth, draw_depth
    from .devices import choose_device
    from .variants import bench_variants

    deadline = time.monotonic() + BENCH_SECONDS
    patch = tuple(options.patch)
    size = (patch, options.channels, options.classes)
    device = str(choose_device("cuda:0" if options.device == "cuda" else options.device))
    on_card = device.startswith("cuda")
    results: dict[str, Any] = {"machine": describe_machine(device), "date": date.today().isoformat()}
    texts = [f"{results['machine']}, {results['date']}\n"]

    def section(what: str, title: str, make: Callable[[], list[dict[str, Any]]], columns: list[str]) -> None:
        """Runs one part; in a run of all parts, one that fails is recorded and does not cost the others."""
        if options.what not in (what, "all"):
            return
        try:
            rows = make()
        except Exception as error:
            if options.what != "all" or isinstance(error, InvresError):
                raise
            results[what] = {"error": f"{type(error).__name__}: {error}"}
            report.warning(f"The part {what} failed: {type(error).__name__}: {error}")
            rows = []
        else:
            results[what] = rows
        shown = [c for c in columns if c == "complete" or any(row.get(c) not in (None, "", 0) for row in rows)]
        if rows:
            texts.append(f"### {title}\n\n{table(rows, shown)}\n")
        if options.output:
            for name, text in (("bench.json", json.dumps(results, indent=1)), ("bench.md", "\n".join(texts))):
                with written_whole(options.output / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")

    words = f"{'x'.join(map(str, patch))}, {options.channels} channels, {options.classes} classes, batch 1"
    kind = "measured" if options.measure or on_card else "predicted on hollow tensors"
    row = ["network", "engine", "memory", "precision"]
    peaks = ["peak_bytes", "ratio", "activation_bytes", "activation_ratio"]
    section(
        "memory",
        f"Peak live tensor bytes of a training step ({kind}; {words})",
        lambda: bench_memory(*size, device, options.measure, report),
        [
            *row,
            *("parameter_bytes", *peaks, "flops_ratio"),
            *("allocated_bytes", "reserved_bytes", "card_used_bytes", "error"),
        ],
    )
    section(
        "time",
        f"Median seconds of a training step ({words})",
        lambda: bench_time(*size, device, options.rounds, report),
        [*row, "seconds", "ratio", "ratio_to_memcnn", "ratio_to_unet3d", "error"],
    )
    if on_card:
        section(
            "cube",
            "Largest cube whose training step fits a card",
            lambda: bench_cube(options.channels, options.classes, device, deadline, report),
            ["card_gib", *row, "side", "complete", "error"],
        )
    small = (tuple(min(p, 32) for p in patch), options.channels, options.classes)
    section(
        "gradients",
        "Largest relative difference of any gradient to `stored` (CPU)",
        lambda: bench_gradients(*small, draws=12 if options.what == "gradients" else 3, report=report),
        [
            *("network", "engine", "memory", "dtype", "activation", "image", "relative_error"),
            *("median_error", "error_to_float64"),
        ],
    )
    section(
        "depth",
        "Peak memory and operations against depth, by strategy",
        lambda: bench_depth(report=report),
        ["strategy", "blocks", "peak_states", "flops_ratio"],
    )
    section(
        "variants",
        f"VAE branch, classes, depth and whole volumes: peak live tensor bytes of a training step (predicted; {words})",
        lambda: bench_variants(*size, report),
        ["network", "variant", "patch", "memory", "precision", *peaks, "error"],
    )
    rows = [row for part in results.values() if isinstance(part, list) for row in part]
    if rows and all(row.get("error") for row in rows):
        raise InvresError(
            f"Nothing could be measured; the first error is: {str(rows[0]['error']).rstrip('.')}.",
            hint="Try another --patch, --channels or --classes.",
        )
    if options.output and isinstance(results.get("depth"), list):
        draw_depth(results["depth"], options.output / "depth.png")
    say(report, "\n".join(texts))
    report.result(**results)
