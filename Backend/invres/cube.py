"""The largest cube that can be trained in a given amount of a CUDA card's memory, found by trying."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from .events import SILENT, Reporter
from .faults import is_out_of_memory
from .memory import CONTEXT_BYTES, measure_training
from .networkconfig import NetworkConfig

__all__ = ["CARDS_GIB", "bench_cube"]

CARDS_GIB = (8, 12, 24)
STEP = 16
LARGEST = 640
# (network, engine, memory setting, precision)
CANDIDATES = (
    ("unet3d", "stored", "low", "fp32"),
    ("fully_invres", "reversible", "low", "fp32"),
    ("fully_invres", "reversible", "lowest", "bf16"),
)


def bench_cube(
    channels: int, classes: int, device: str, deadline: float, report: Reporter = SILENT
) -> list[dict[str, Any]]:
    """One row for each candidate and card size: side of the largest cube whose training step ran.

    Smaller cards are imitated by a limit on the allocator. deadline: time.monotonic() at which no new try is made; what
    was found until then is given with `complete` False; `side` is None where that is nothing.
    """
    rows: list[dict[str, Any]] = []
    total = torch.cuda.get_device_properties(device).total_memory
    todo = [(gib, candidate) for gib in CARDS_GIB for candidate in CANDIDATES]
    for done, (gib, (name, engine, memory, precision)) in enumerate(todo):
        report.progress("bench.cube", done, len(todo))
        budget = gib * 2**30 - CONTEXT_BYTES
        row = {"card_gib": gib, "network": name, "engine": engine, "memory": memory, "precision": precision}
        if budget > total:
            continue
        config = NetworkConfig(name=name, in_channels=channels, out_channels=classes)
        low, high, complete = 1, LARGEST // STEP + 1, True  # in steps: `low` fits, `high` does not
        torch.cuda.set_per_process_memory_fraction(budget / total, device)
        try:
            while high - low > 1:
                if time.monotonic() > deadline:
                    complete = False
                    break
                middle = (low + high) // 2
                if _fits(config, middle * STEP, engine, memory, precision, device):
                    low = middle
                else:
                    high = middle
            # A side of one step was never tried: where time ended before anything fitted, nothing is known.
            rows.append({**row, "side": low * STEP if low > 1 or complete else None, "complete": complete})
        except Exception as error:
            rows.append({**row, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    report.progress("bench.cube", len(todo), len(todo))
    return rows


def _fits(config: NetworkConfig, side: int, engine: str, memory: str, precision: str, device: str) -> bool:
    try:
        measure_training(config, (side, side, side), engine=engine, memory=memory, precision=precision, device=device)
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
