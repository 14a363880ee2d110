"""Memory and compute of the strategies against depth, on one stack of couplings: the papers' table 1, measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .events import SILENT, Reporter
from .hollow import without_values
from .livebytes import LiveBytes
from .networkconfig import NetworkConfig
from .networks.blocks import CouplingFunction
from .operations import Operations
from .reversible import Couple, Program

__all__ = ["DEPTHS", "STRATEGIES", "bench_depth", "draw_depth"]

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
WIDTH, SIDE = 16, 32  # of the stack; memory is given in maps of this size, so the figures hold for others
# What is kept for L blocks, in units that the measurement at the smallest depth fixes.
STRATEGIES = {
    "stored": lambda depth: float(depth),
    "checkpoint": lambda depth: 2 * math.sqrt(depth),
    "recursive": lambda depth: 1 + math.log2(depth),
    "memcnn": lambda depth: 1.0,
    "reversible": lambda depth: 1.0,
}


def bench_depth(depths: Sequence[int] = DEPTHS, report: Reporter = SILENT) -> list[dict[str, Any]]:
    """One row for each strategy and depth, on hollow tensors: nothing is allocated.

    peak_states: peak of live bytes without parameters and their gradients, in states (x1, x2 together). flops_ratio: to
    `stored` at the same depth. theory: O(L), O(sqrt L), O(log L) or O(1), in arbitrary units.
    """
    rows = []
    stored: dict[int, int] = {}
    for done, (strategy, theory) in enumerate(STRATEGIES.items()):
        report.progress("bench.depth", done, len(STRATEGIES))
        for depth in depths:
            peak, flops = _run(strategy, depth)
            stored.setdefault(depth, flops)
            rows.append(
                {
                    "strategy": strategy,
                    "blocks": depth,
                    "peak_states": peak / (WIDTH * SIDE**3 * 4),
                    "flops_ratio": flops / stored[depth],
                    "theory": theory(depth),
                }
            )
    report.progress("bench.depth", len(STRATEGIES), len(STRATEGIES))
    return rows


def _run(strategy: str, depth: int) -> tuple[int, int]:
    """(peak bytes, floating-point operations) of forward and backward through `depth` couplings."""
    config = NetworkConfig()

    def function() -> CouplingFunction:
        return CouplingFunction(WIDTH // 2, config)

    with without_values():
        program = Program([Couple(function(), function()) for _ in range(depth)], private=True)
        inputs = [torch.zeros(1, WIDTH // 2, SIDE, SIDE, SIDE, requires_grad=True) for _ in range(2)]
        probe = LiveBytes()
        probe.watch([*inputs, *program.parameters()])
        with Operations() as counter, probe:
            outputs, _ = program(inputs, strategy)
            loss = outputs[0].sum() + outputs[1].sum()
            del outputs
            loss.backward()
    parameters = sum(p.numel() * p.element_size() for p in program.parameters())
    return probe.peak - 2 * parameters, counter.total


def draw_depth(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Peak and compute against depth as a picture, with the theoretical curves; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for index, strategy in enumerate(STRATEGIES):
        mine = [row for row in rows if row["strategy"] == strategy]
        depths = [row["blocks"] for row in mine]
        colour = f"C{index}"
        left.plot(depths, [row["peak_states"] for row in mine], "o-", color=colour, label=strategy)
        last = mine[-1]
        scaled = [row["theory"] * last["peak_states"] / last["theory"] for row in mine]
        left.plot(depths, scaled, ":", color=colour)
        right.plot(depths, [row["flops_ratio"] for row in mine], "o-", color=colour, label=strategy)
        if strategy == "recursive":
            # O(L log L): at each level half of the blocks go forward once more, and forward is a third of a step.
            right.plot(depths, [1 + math.log2(depth) / 6 for depth in depths], ":", color="black")
    left.set(xscale="log", yscale="log", xlabel="couplings", ylabel="peak, in states (dotted: theory)")
    right.set(xscale="log", xlabel="couplings", ylabel="operations, relative to stored (dotted: theory)")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
