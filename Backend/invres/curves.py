"""The picture of a training: loss and Dice by epoch, redrawn while it runs."""

from __future__ import annotations

import json
from pathlib import Path

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
    validated = [e for e in entries if "dice" in e]
    for name in validated[-1]["dice"] if validated else ():
        style = {"color": "black", "linewidth": 2} if name == "mean" else {"linewidth": 1}
        right.plot([e["epoch"] for e in validated], [e["dice"][name] for e in validated], label=name, **style)
    right.set(xlabel="epoch", ylabel="Dice", ylim=(0, 1), title="Validation, full volumes")
    if validated:
        right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with written_whole(folder / "curves.png") as temporary:
        figure.savefig(temporary)
    return folder / "curves.png"
