"""Watches over the reversible engine while training: what it recomputes must be what was there."""

from __future__ import annotations

import math

import torch

from .events import Reporter
from .reversible import Program

__all__ = ["CHECK_EVERY", "DRIFT_LIMIT", "DriftGuard"]

CHECK_EVERY = 100  # training steps; a check copies some thousand values of each level, and waits for the device once
FIRST_CHECK = 10  # not in the first steps, whose memory is measured
DRIFT_LIMIT = 1e-3  # relative; float32 gives 1e-6 to 1e-5, and above 1e-3 gradients lose digits that bfloat16 has


class DriftGuard:
    """Call `before` and `after` around every training step; nothing happens in most of them.

    A coupling whose input is recomputed with a relative error above DRIFT_LIMIT keeps its input from then on, as plain
    autograd would, and a warning says so. With a fixed-point state, sums that left its range are counted and reported.
    """

    def __init__(self, network: torch.nn.Module, report: Reporter):
        self._programs = [module for module in network.modules() if isinstance(module, Program)]
        self._network = network
        self._report = report

    def before(self, iteration: int) -> None:
        if getattr(self._network, "engine", "") == "reversible":
            for program in self._programs:
                program.watch.due = iteration % CHECK_EVERY == FIRST_CHECK

    def after(self) -> None:
        first = 0  # number of a program's first block among all of the network
        for program in self._programs:
            if program.watch.due:
                program.watch.due = False
                self._examine(program, first)
            first += len(program.steps)

    def _examine(self, program: Program, first: int) -> None:
        watch, errors = program.watch, program.reconstruction_errors()
        if not errors:
            return
        overflows = 0 if watch.overflows is None else int(watch.overflows)
        worst = max(errors, key=lambda index: errors[index])
        self._report.emit(
            {
                "event": "drift",
                "worst": _finite(errors[worst]),
                "block": first + worst,
                "blocks": len(errors),
                "overflows": overflows,
            }
        )
        for index in program.keep_drifting(DRIFT_LIMIT):
            self._report.warning(
                f"Block {first + index} of the network is recomputed with a relative error of {errors[index]:.1e}; "
                "from now on its input is stored, which takes a little more memory."
            )
        if overflows:
            self._report.warning(
                f"{overflows} values of the 16-bit state left the range of -256 to 256 since the last check; if that "
                "goes on, train with memory 'lower'."
            )
        watch.errors.clear()
        watch.overflows = None


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if math.isfinite(error) else None
