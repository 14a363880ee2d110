"""The picture of a training: loss and score by epoch, redrawn while it runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .events import SCORES, Reporter
from .files import written_whole

__all__ = ["Curves", "draw_curves"]

FEW = 6  # points on a line: they are marked, as a single one draws no line; and labels: more stand beside the axes
SHARE = 0.05  # of a training's time that drawing may take while it runs


class Curves:
    """Draws the curves of a run's trainings, and says once where matplotlib is missing."""

    def __init__(self) -> None:
        self._told = False
        self._next_s = -math.inf

    @property
    def due(self) -> bool:
        """Whether drawing them again would take no more than its share of the time."""
        return time.monotonic() >= self._next_s

    def draw(self, folder: Path, report: Reporter) -> None:
        """`draw_curves`, of which nothing ends a training, nor hides how it ended: what fails is a warning."""
        begun = time.monotonic()
        try:
            drawn = draw_curves(folder)
        except Exception as error:
            report.warning(f"The curves could not be drawn ({getattr(error, 'strerror', None) or error}).")
            return
        finally:
            ended = time.monotonic()
            self._next_s = ended + (ended - begun) / SHARE
        if drawn is None and not self._told:
            self._told = True
            report.note(
                "curves.png is not drawn, as the package matplotlib is not installed (`pip install matplotlib`); "
                "metrics.jsonl has its figures."
            )


def draw_curves(folder: Path) -> Path | None:
    """Draws metrics.jsonl of a run folder as curves.png. Does nothing (None) where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    score = next((key for key in SCORES if any(key in entry for entry in entries)), "dice")
    validated = [e for e in entries if score in e]
    names = list(validated[-1][score]) if validated else []
    beside = len(names) > FEW
    figure = Figure(figsize=(11.5 if beside else 9, 4.4 if beside else 3.6), dpi=110)
    if beside:
        figure.set_layout_engine("constrained")  # the names may be long; to find room for them takes half of the time
    else:
        figure.subplots_adjust(left=0.105, right=0.985, bottom=0.14, top=0.91, wspace=0.26)
    left, right = figure.subplots(1, 2)
    for key, label in (("loss", "total"), ("cross_entropy", "cross entropy"), ("dice_loss", "Dice loss")):
        points = [(e["epoch"], e[key]) for e in entries if key in e]
        if points:
            left.plot(*zip(*points, strict=True), marker=_marker(points), label=label)
    left.set(xlabel="epoch", ylabel="training loss", title="Loss")
    left.legend(frameon=False)
    for number, name in enumerate(names):
        style: dict[str, Any] = {"color": f"C{number}", "linewidth": 1, "linestyle": ("-", "--")[number // 10 % 2]}
        if name == "mean":
            style = {"color": "black", "linewidth": 2}
        values = [e[score][name] for e in validated]
        right.plot([e["epoch"] for e in validated], values, marker=_marker(values), label=name, **style)
    right.set(xlabel="epoch", ylabel=SCORES[score], title="Validation")
    if score == "dice":
        right.set(ylim=(0, 1), title="Validation, full volumes")
    if validated:
        if beside:
            right.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        else:
            right.legend(frameon=False, loc="lower right" if score == "dice" else "upper right")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with written_whole(folder / "curves.png") as temporary:
        figure.savefig(temporary)
    return folder / "curves.png"


def _marker(points: Sequence[Any]) -> str:
    return "o" if len(points) < FEW else ""
