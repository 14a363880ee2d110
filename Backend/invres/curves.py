"""The picture of a training: loss and score by epoch, redrawn while it runs."""

from __future__ import annotations

import json
from pathlib import Path

from .events import SCORES
from .files import written_whole

__all__ = ["draw_curves"]


def draw_curves(folder: Path) -> Path | None:
    """Draws metrics.jsonl of a run folder as curves.png. Does nothing (None) where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label in (("loss", "total"), ("cross_entropy", "cross entropy"), ("dice_loss", "Dice loss")):
        points = [(e["epoch"], e[key]) for e in entries if key in e]
        if points:
            left.plot(*zip(*points, strict=True), label=label)
    left.set(xlabel="epoch", ylabel="training loss", title="Loss")
    left.legend(frameon=False)
    score = next((key for key in SCORES if any(key in entry for entry in entries)), "dice")
    validated = [e for e in entries if score in e]
    for name in validated[-1][score] if validated else ():
        style = {"color": "black", "linewidth": 2} if name == "mean" else {"linewidth": 1}
        right.plot([e["epoch"] for e in validated], [e[score][name] for e in validated], label=name, **style)
    right.set(xlabel="epoch", ylabel=SCORES[score], title="Validation")
    if score == "dice":
        right.set(ylim=(0, 1), title="Validation, full volumes")
    if validated:
        right.legend(frameon=False, loc="lower right" if score == "dice" else "upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with written_whole(folder / "curves.png") as temporary:
        figure.savefig(temporary)
    return folder / "curves.png"
